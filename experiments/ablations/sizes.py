"""Sizes every arm of every ablation so that it costs what its baseline does.

    python -m experiments.ablations.sizes            # solve, write sizes.json beside this file
    python -m experiments.ablations.sizes --check    # print what is held fixed, and how well

What the solver of `umv2.cost.matching` finds is stored, so that a configuration loads without
it. The table gives each arm's deviation from its baseline in what the ablation holds fixed; more
than 1 % is marked.
"""

import json
import math
from typing import Any

from absl import flags

from experiments import cli
from experiments.ablations import scales
from experiments.ablations.arms import field
from experiments.ablations.catalogue import ABLATIONS, SIZES_FILE, configuration
from umv2 import files

_CHECK = flags.DEFINE_bool("check", False, "Print the stored sizes' deviations, solve nothing.")
_SCALES = flags.DEFINE_list("scales", list(scales.SCALES), "Scales to solve or to check.")


def solve(ablation: str, scale: str) -> dict[str, dict[str, Any]]:
    """Returns the sizes of an ablation's arms that differ from the arm's own, by path.

    A baseline that differs from the base of its scale is sized by that, the others by the baseline.
    Arms whose sizes the paper gives stay as they are.

    Raises:
      ConfigError: an arm that no sizes make as cheap as its baseline.
    """
    from umv2.config import Config, from_config_dict
    from umv2.config.schema import ConfigError, build
    from umv2.cost import matching

    entry = ABLATIONS[ablation]
    if not entry.fixed:
        return {}
    found: dict[str, dict[str, Any]] = {}
    reference = from_config_dict(entry.base(scale))
    for arm in entry.arms:
        values = entry.unsized(arm, scale)
        candidate = build(Config, values)  # valid once it is sized
        if entry.is_published(arm, scale) or candidate == reference:
            matched = candidate
        else:
            try:
                match = matching.match(reference, candidate, entry.fixed, entry.free)
            except ConfigError as error:
                raise ConfigError(f"{ablation}/{arm}/{scale}: {error}") from error
            matched = match.config
            sizes = {f"model.{path}": value for path, value in match.sizes.items()}
            changed = {path: v for path, v in sizes.items() if field(values, path) != v}
            if changed:
                found[f"{ablation}/{arm}"] = changed
        if arm == entry.baseline:
            reference = matched
    return found


def deviations(ablation: str, scale: str) -> dict[str, dict[str, float]]:
    """Returns each arm's relative deviations from the baseline in what the ablation holds fixed.

    NaN: the family has no such quantity.
    """
    from umv2.config import from_config_dict
    from umv2.cost import matching

    entry = ABLATIONS[ablation]
    counted = {
        arm: matching.quantities(from_config_dict(configuration(ablation, arm, scale)))
        for arm in entry.arms
    }
    reference = counted[entry.baseline]
    return {
        arm: {
            rule: getattr(ours, rule) / getattr(reference, rule) - 1
            if getattr(ours, rule) and getattr(reference, rule)
            else math.nan
            for rule in entry.fixed
        }
        for arm, ours in counted.items()
    }


def table(names: list[str]) -> str:
    """Returns the deviations of all arms at the given scales, in aligned columns."""
    from umv2.cost import matching

    lines = [f"{'scale':<7}{'arm':<40}" + "".join(f"{rule:>14}" for rule in matching.RULES)]
    for scale in names:
        for ablation in ABLATIONS:
            for arm, row in deviations(ablation, scale).items():
                cells = ""
                for rule in matching.RULES:
                    value = row.get(rule)
                    cell = "" if value is None else "none" if math.isnan(value) else f"{value:+.2%}"
                    mark = " !" if value is not None and abs(value) > matching.TOLERANCE else "  "
                    cells += f"{cell:>12}{mark}"
                lines.append(f"{scale:<7}{f'{ablation}/{arm}':<40}{cells}".rstrip())
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Solves and stores, or checks what is stored."""
    for scale in _SCALES.value or [""]:
        cli.require(f"--scales={scale}", scale, scales.SCALES)
    if not _CHECK.value:
        stored = json.loads(SIZES_FILE.read_text()) if SIZES_FILE.exists() else {}
        for scale in _SCALES.value:
            stored[scale] = {}
            for ablation in ABLATIONS:
                stored[scale] |= solve(ablation, scale)
            files.write_text(SIZES_FILE, json.dumps(stored, indent=1, sort_keys=True) + "\n")
    print(table(_SCALES.value))


if __name__ == "__main__":
    cli.run(main)
