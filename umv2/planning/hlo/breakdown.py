"""A table of a program's work by the part of the step that it comes from."""

from umv2 import tables
from umv2.planning.hlo.sources import Phase
from umv2.planning.hlo.workload import SourceWork, Work

_PHASES: tuple[Phase, ...] = ("forward", "remat", "backward")


def as_text(work: Work, width: int | None = None) -> str:
    """Returns a table with one row per source, most bytes first, in GB moved on one device.

    The sum includes work outside of differentiation, such as the optimizer's. FLOPs are those of
    matrix products.

    Args:
      work: of a program.
      width: maximum number of columns of text; None: the width of the terminal.
    """
    rows: list[tuple[str, ...]] = [("GB of HBM", *_PHASES, "sum", "share", "FLOPs")]
    rows += [_row(source, work.bytes) for source in work.sources]
    total = SourceWork("total", _by_phase(work), work.flops)
    return tables.table([*rows, _row(total, work.bytes)], width)


def _by_phase(work: Work) -> dict[str, int]:
    phases = {phase for source in work.sources for phase in source.bytes}
    return {phase: sum(source.bytes.get(phase, 0) for source in work.sources) for phase in phases}


def _row(source: SourceWork, total: float) -> tuple[str, ...]:
    by_phase = (source.bytes.get(phase, 0) for phase in _PHASES)
    return (
        source.source,
        *(f"{size / 1e9:,.1f}" if size else "" for size in by_phase),
        f"{source.total_bytes / 1e9:,.1f}",
        f"{source.total_bytes / (total or 1):.1%}",
        f"{source.flops:.3g}" if source.flops else "",
    )
