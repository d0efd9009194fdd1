"""Sizes every family to the cost of UltraMemV2, and reports what could not be matched.

    python -m experiments.ablations.match --config=configs/paper_227m_1b2.py

Prints for each family the sizes that the solver finds and their cost relative to the reference, and
the same for the sizes in configs/: those of the paper's Table 10 if it has the family, otherwise an
earlier solution.
"""

import math
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import families
from experiments import cli

_CONFIG = cli.define_config("config", "Configuration of the reference.")
_FAMILIES = flags.DEFINE_list("families", None, "Families to size; default: all that exist.")


def candidate(reference: ConfigDict, family: str, sizes: families.Sizes) -> ConfigDict:
    """Returns the reference switched to another family, with the sizes in configs/."""
    return families.switch(reference.copy_and_resolve_references(), family, sizes)


def report(reference: ConfigDict, sizes: families.Sizes, names: list[str]) -> str:
    """Returns a table of the found and the shipped sizes of each family, with their costs."""
    from umv2.config import from_config_dict
    from umv2.cost import matching

    target = from_config_dict(reference)
    expected = matching.quantities(target)
    lines = [
        f"{'family':<13}{'sizes':<9}{'active M':>10}{'':>8}{'total M':>10}{'':>8}"
        f"{'MFLOP':>10}{'':>8}{'values read':>13}{'':>8}  sizes; what could not be matched"
    ]
    lines.append(_line(families.REFERENCE, "", expected, expected, ""))
    for family in names:
        shipped = from_config_dict(candidate(reference, family, sizes))
        match = matching.match(target, shipped)
        unmatched = ", ".join(
            f"{name} {'does not exist' if math.isnan(deviation) else f'{deviation:+.1%}'}"
            for name, deviation in match.unmatched.items()
        )
        note = _sizes(match.sizes) + (f"; not matched: {unmatched}" if unmatched else "")
        lines.append(_line(family, "found", match.quantities, expected, note))
        values = {path: _value(shipped.model, path) for path in match.sizes}
        lines.append(_line("", "shipped", matching.quantities(shipped), expected, _sizes(values)))
    return "\n".join(lines)


def _line(family: str, kind: str, ours: Any, expected: Any, note: str) -> str:
    cells = f"{family:<13}{kind:<9}"
    for name, scale, digits, width in (
        ("active", 1e6, 2, 10),
        ("total", 1e6, 2, 10),
        ("flops", 1e6, 2, 10),
        ("values_read", 1, 0, 13),
    ):
        value, reference = getattr(ours, name), getattr(expected, name)
        share = f"{value / reference - 1:+.2%}" if kind and value and reference else ""
        cells += f"{value / scale:>{width},.{digits}f}{share:>8}"
    return f"{cells}  {note}".rstrip()


def _sizes(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{path.rpartition('.')[2]}={value}" for path, value in sizes.items())


def _value(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def main(_: list[str]) -> None:
    """Prints the report of one configuration file."""
    config, sizes = cli.configuration(_CONFIG), cli.sizes_of_families(_CONFIG)
    print(report(config, sizes, cli.families(_FAMILIES, sizes)))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
