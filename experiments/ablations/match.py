"""Sizes every family so that it costs what UltraMemV2 does, and says what could not be matched.

    python -m experiments.ablations.match --config=configs/paper_227m_1b2.py

Prints for each family the sizes found, what they cost relative to the reference, and the same for
the sizes that configs/ ships: Table 10 of the paper where it has the family, an earlier solution
where it has not.
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
    """Returns the reference as another family, with its shipped sizes."""
    return families.switch(reference.copy_and_resolve_references(), family, sizes)


def report(reference: ConfigDict, sizes: families.Sizes, names: list[str]) -> str:
    """Returns a table: for each family the sizes found and the sizes shipped, with their costs."""
    from umv2.config import from_config_dict
    from umv2.cost import matching

    target = from_config_dict(reference)
    wanted = matching.quantities(target)
    lines = [
        f"{'family':<13}{'sizes':<9}{'active M':>10}{'':>8}{'total M':>10}{'':>8}"
        f"{'MFLOP':>10}{'':>8}{'values read':>13}{'':>8}  sizes; what could not be matched"
    ]
    lines.append(_line(families.REFERENCE, "", wanted, wanted, ""))
    for family in names:
        shipped = from_config_dict(candidate(reference, family, sizes))
        found = matching.match(target, shipped)
        unmatched = ", ".join(
            f"{name} {'does not exist' if math.isnan(deviation) else f'{deviation:+.1%}'}"
            for name, deviation in found.unmatched.items()
        )
        note = _sizes(found.sizes) + (f"; not matched: {unmatched}" if unmatched else "")
        lines.append(_line(family, "found", found.quantities, wanted, note))
        values = {path: _value(shipped.model, path) for path in found.sizes}
        lines.append(_line("", "shipped", matching.quantities(shipped), wanted, _sizes(values)))
    return "\n".join(lines)


def _line(family: str, kind: str, ours: Any, wanted: Any, note: str) -> str:
    cells = f"{family:<13}{kind:<9}"
    for name, scale, digits, width in (
        ("active", 1e6, 2, 10),
        ("total", 1e6, 2, 10),
        ("flops", 1e6, 2, 10),
        ("values_read", 1, 0, 13),
    ):
        value, reference = getattr(ours, name), getattr(wanted, name)
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
