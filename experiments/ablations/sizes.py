"""Sizes every arm of every ablation to the cost of its baseline.

    python -m experiments.ablations.sizes            # solve, and write sizes.json next to this file
    python -m experiments.ablations.sizes --check    # print the deviations of the stored sizes

Solutions of `umv2.cost.matching` are stored, so that loading a configuration needs no solver. The
table shows the deviation of each arm from its baseline in the quantities that the ablation holds
fixed; more than 1 % is marked.
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

_CHECK = flags.DEFINE_bool("check", False, "Only print the deviations of the stored sizes.")
_SCALES = flags.DEFINE_list("scales", list(scales.SCALES), "Scales to solve or to check.")


def solve(ablation: str, scale: str) -> dict[str, dict[str, Any]]:
    """Solves an ablation; returns, by arm, the sizes by path that differ from the arm's diff.

    A baseline that differs from the base of its scale is matched to that base, the other arms to
    the baseline. Arms with published sizes are not changed.

    Raises:
      ConfigError: no sizes give an arm the cost of its baseline.
    """
    from umv2.config import Config, from_config_dict
    from umv2.config.schema import ConfigError, build
    from umv2.cost import matching

    entry = ABLATIONS[ablation]
    if not entry.fixed:
        return {}
    solved: dict[str, dict[str, Any]] = {}
    reference = from_config_dict(entry.base(scale))
    for arm in entry.arms:
        values = entry.unsized(arm, scale)
        candidate = build(Config, values)  # may become valid only by sizing
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
                solved[f"{ablation}/{arm}"] = changed
        if arm == entry.baseline:
            reference = matched
    return solved


def deviations(ablation: str, scale: str) -> dict[str, dict[str, float]]:
    """Returns each arm's relative deviations from the baseline in the fixed quantities.

    NaN: the family has no such quantity.
    """
    from umv2.config import from_config_dict
    from umv2.cost import matching

    entry = ABLATIONS[ablation]
    quantities = {
        arm: matching.quantities(from_config_dict(configuration(ablation, arm, scale)))
        for arm in entry.arms
    }
    reference = quantities[entry.baseline]
    return {
        arm: {
            rule: getattr(ours, rule) / getattr(reference, rule) - 1
            if getattr(ours, rule) and getattr(reference, rule)
            else math.nan
            for rule in entry.fixed
        }
        for arm, ours in quantities.items()
    }


def table(names: list[str]) -> str:
    """Returns the deviations of all arms at the given scales as text in aligned columns."""
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
    """Solves and stores sizes, or checks the stored ones."""
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
