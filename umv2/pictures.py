"""Plot helpers: distinguishable curves, labels that fit, and reproducible files.

Imports neither jax nor numpy, and matplotlib only when something is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umv2 import files, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("C0", "C1", "C2", "C3", "C4", "black", "C6", "C8", "C9", "C7")
_MARKERS = "osD^vP*Xp<"
_DPI = 144
_LEGEND_SIZE = 9  # points
_LETTER = 0.66  # width of an average letter as a fraction of the font size, with some margin


def new(width: float, height: float) -> "Figure":
    """Returns an empty figure with a constrained layout; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve_styles(count: int) -> list[dict[str, Any]]:
    """Returns line styles for `count` curves, in drawing order.

    Each curve is thinner than the previous one and has a different colour, and markers at different
    points, so that curves with equal values all remain visible.
    """
    thinnest, step = 1.2, min(1.2, 9 / max(1, count - 1))
    styles = []
    for index in range(count):
        above = count - 1 - index
        width = thinnest + step * above
        styles.append(
            {
                "color": _COLORS[index % len(_COLORS)],
                "linewidth": width,
                "marker": _MARKERS[index % len(_MARKERS)],
                "markersize": 9,
                "markeredgecolor": "white",
                "markeredgewidth": 0.7,
                "markevery": (index, count),
            }
        )
    return styles


def literal(name: str, width: int | None = None) -> str:
    """Escapes a name for matplotlib, and wraps it to at most `width` characters per line."""
    lines = tables.wrapped(name, width) if width else [tables.printable(name)]
    return "\n".join(lines).replace("$", r"\$")


def legend_below(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Adds a legend below all axes, in as many columns as fit."""
    if not handles:
        return
    points = 72 * figure.get_figwidth()
    letters = int(points / (_LEGEND_SIZE * _LETTER))
    longest = min(letters - 8, max(map(tables.display_width, names)))
    columns = max(1, min(len(names), letters // (longest + 8)))  # 8: the sample of the line
    legend = figure.legend(
        handles,
        [str(index) for index in range(len(names))],
        loc="outside lower center",
        ncols=columns,
        fontsize=_LEGEND_SIZE,
    )
    # Set the names afterwards: matplotlib omits labels that start with an underscore.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(literal(name, longest))


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure atomically as a PNG without metadata, so that the file is reproducible.

    Raises:
      FileError: the file cannot be written.
    """
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=_DPI, format="png", metadata={"Software": None})
