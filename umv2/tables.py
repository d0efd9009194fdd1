"""Text tables that fit the width of the terminal.

Imports neither jax nor numpy.
"""

import re
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence

_GAP = "  "
_DEFAULT_WIDTH = 100  # for pipes and files, if COLUMNS is not set
_MIN_WIDTH = 40
# Minimum widths for wrapping: of cells of words, of cells with a long word, and of the first
# column, which names the rows.
_MIN_CELL_WIDTH = 8
_MIN_WORD_WIDTH = 12
_MIN_NAME_WIDTH = 16
# Numbers, which are never broken.
_NUMBER = re.compile(r"[-+~]?\d[\d,.]*(e[-+]?\d+)?\s?[%\w]{0,3}|nan|-?inf", re.IGNORECASE)
_AFTER_SEPARATOR = re.compile(r"(?<=[/_:=.,-])")
_WORD_END = re.compile(rf"\s+|{_AFTER_SEPARATOR.pattern}")


def terminal_width() -> int:
    """Returns the width given by COLUMNS or the terminal, or else 100 columns."""
    return max(_MIN_WIDTH, shutil.get_terminal_size((_DEFAULT_WIDTH, 0)).columns)


def display_width(text: str) -> int:
    """Returns the width of a text in columns: 2 for wide characters, 0 for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def printable(text: str) -> str:
    """Returns a text with control and other non-printable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Wraps a text at spaces or, for long words, after separators in names or else anywhere.

    All lines keep the indentation of the first.
    """
    text = printable(text)
    if display_width(text) <= width:
        return [text]
    words = text.split()
    indent = text[: len(text) - len(text.lstrip())]
    if 2 * len(indent) > width:
        indent = ""
    lines = [indent]
    for word in words:
        pieces = [word]
        if len(indent) + display_width(word) > width:
            pieces = list(_pieces(word, width - len(indent)))
        for number, piece in enumerate(pieces):
            space = " " if number == 0 and lines[-1] != indent else ""
            if display_width(lines[-1] + space + piece) > width:
                lines.append(indent + piece)
            else:
                lines[-1] += space + piece
    return lines


def _pieces(word: str, width: int) -> Iterator[str]:
    """Splits a word that is longer than a line after its separators, or else at the width."""
    for piece in _AFTER_SEPARATOR.split(word):
        start = 0
        for end in range(1, len(piece) + 1):
            if display_width(piece[start:end]) > width:
                yield piece[start : end - 1]
                start = end - 1
        yield piece[start:]


def paragraph(text: str, width: int | None = None) -> str:
    """Wraps a text to the given or the terminal's width."""
    return "\n".join(wrapped(text, width or terminal_width()))


def command_line(options: Sequence[str], width: int | None = None) -> str:
    r"""Formats options of a command as shell lines that fit the width, continued with \."""
    limit = (width or terminal_width()) - 2
    lines = [""]
    for option in options:
        longer = f"{lines[-1]} {option}".lstrip()
        if lines[-1] and display_width(longer) > limit:
            lines.append(option)
        else:
            lines[-1] = longer
    return " \\\n".join(lines)


def table(
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    left: Collection[int] = (0,),
    rule: bool = False,
) -> str:
    """Formats a table that is no wider than the terminal.

    If the rows are too wide, words are wrapped within their columns. If that is not enough, the
    remaining columns are printed as a further table below, with the first column repeated. Numbers
    are broken only if a single one is wider than the terminal.

    Args:
      rows: rows of cells, the first of which is the header. A row with a single cell is a heading
        over all columns.
      width: width in columns; None: that of the terminal.
      left: left-aligned columns; the others are right-aligned.
      rule: whether to draw a line below the header.
    """
    width = width or terminal_width()
    if not rows:
        return ""
    rows = [[printable(cell) for cell in row] for row in rows]
    full_rows = [row for row in rows if len(row) == len(rows[0])]
    natural = [max(map(display_width, column)) for column in zip(*full_rows, strict=True)]
    minimum = [
        max((_min_width(cell, number) for number, cell in enumerate(column)))
        for column in zip(*full_rows, strict=True)
    ]
    minimum[0] = min(natural[0], max(minimum[0], _MIN_NAME_WIDTH))
    if _total(minimum) > width:  # keep names readable: up to half the width for the first column
        minimum[0] = max(minimum[0], min(natural[0], width // 2))
    blocks = []
    for columns in _blocks(minimum, width):
        widths = _shrunk([natural[c] for c in columns], [minimum[c] for c in columns], width)
        blocks.append(_lines(rows, columns, widths, width, left=left, rule=rule))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _min_width(cell: str, row: int) -> int:
    size = display_width(cell)
    if row and _NUMBER.fullmatch(cell.strip()):
        return size
    longest = max((display_width(w) for w in _WORD_END.split(cell)), default=0)
    return min(size, max(_MIN_CELL_WIDTH, min(longest, _MIN_WORD_WIDTH)))


def _blocks(minimum: Sequence[int], width: int) -> list[list[int]]:
    """Splits the columns into blocks that fit the width; each block has the first column."""
    blocks = [[0]]
    for column in range(1, len(minimum)):
        total = _total([minimum[c] for c in (*blocks[-1], column)])
        if total > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _shrunk(widths: Sequence[int], minimum: Sequence[int], width: int) -> list[int]:
    """Shrinks the widest columns until all fit, below their minimum widths only if necessary."""
    widths = [min(size, width) for size in widths]
    for floors in (minimum, [2] * len(widths)):
        while _total(widths) > width:
            wide = [c for c, size in enumerate(widths) if size > floors[c]]
            if not wide:
                break
            widths[max(wide, key=lambda c: widths[c])] -= 1
    return widths


def _lines(
    rows: Sequence[Sequence[str]],
    columns: list[int],
    widths: list[int],
    width: int,
    *,
    left: Collection[int],
    rule: bool,
) -> list[str]:
    aligned: list[Callable[[str, int], str]] = [
        _to_left if column in left else _to_right for column in columns
    ]
    lines = []
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            lines += wrapped(" ".join(row), width)
            continue
        cells = [wrapped(row[c], size) for c, size in zip(columns, widths, strict=True)]
        for depth in range(max(map(len, cells))):
            parts = [cell[depth] if depth < len(cell) else "" for cell in cells]
            padded = [
                place(*each)
                for place, each in zip(aligned, zip(parts, widths, strict=True), strict=True)
            ]
            lines.append(_GAP.join(padded).rstrip())
        if rule and number == 0:
            lines.append(_GAP.join("-" * size for size in widths))
    return lines


def _to_left(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))


def _to_right(text: str, width: int) -> str:
    return " " * (width - display_width(text)) + text
