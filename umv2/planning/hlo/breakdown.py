"""A table of a program's work by the part of the step that it comes from."""

from umv2 import tables
from umv2.planning.hlo.sources import Phase
from umv2.planning.hlo.workload import SourceWork, Work

_PHASES: tuple[Phase, ...] = ("forward", "remat", "backward")
_LARGE = 10e9  # bytes


def as_text(work: Work, width: int | None = None) -> str:
    """Returns a table with one row per source, most bytes first: bytes that one device moves.

    The sum includes work outside of differentiation, such as the optimizer's. FLOPs are those of
    matrix products.

    Args:
      work: of a program.
      width: maximum number of columns of text; None: the width of the terminal.
    """
    unit, scale = ("GB", 1e9) if work.bytes > _LARGE else ("MB", 1e6)
    rows: list[tuple[str, ...]] = [(f"{unit} of HBM", *_PHASES, "sum", "share", "FLOPs")]
    for source in (*work.sources, SourceWork("total", _by_phase(work), work.flops)):
        sizes = [source.bytes.get(phase, 0) for phase in _PHASES]
        rows.append((
            source.source,
            *(f"{size / scale:,.1f}" if size else "" for size in sizes),
            f"{source.total_bytes / scale:,.1f}",
            f"{source.total_bytes / (work.bytes or 1):.1%}",
            f"{source.flops:.3g}" if source.flops else "",
        ))  # fmt: skip
    return tables.table(rows, width)


def _by_phase(work: Work) -> dict[str, int]:
    phases = {phase for source in work.sources for phase in source.bytes}
    return {phase: sum(source.bytes.get(phase, 0) for source in work.sources) for phase in phases}
