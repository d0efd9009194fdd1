"""Tables of text that fit the terminal, whatever the names and the numbers in them.

Imports neither jax nor numpy.
"""

import re
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence

_GAP = "  "
_NO_TERMINAL = 100  # columns of a pipe or a file, where COLUMNS does not say
_LEAST = 40  # columns: no table is narrower
# Columns that cells of words may be wrapped to, more for a longer word up to the second, and those
# of the first column, which names the rows.
_LEAST_CELL = 8
_LEAST_WORD = 12
_LEAST_NAME = 16
# A cell that is never broken.
_NUMBER = re.compile(r"[-+~]?\d[\d,.]*(e[-+]?\d+)?\s?[%\w]{0,3}|nan|-?inf", re.IGNORECASE)
_AFTER_SEPARATOR = re.compile(r"(?<=[/_:=.,-])")
_WORD_END = re.compile(rf"\s+|{_AFTER_SEPARATOR.pattern}")


def terminal_width() -> int:
    """Returns the columns of the terminal, as COLUMNS or the terminal says; 100 where none does."""
    return max(_LEAST, shutil.get_terminal_size((_NO_TERMINAL, 0)).columns)


def display_width(text: str) -> int:
    """Returns the columns that a text takes: two for a wide character, none for a mark upon one."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def printable(text: str) -> str:
    """Returns a text on one line: what moves the cursor, or is no character, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Breaks a text into lines: at spaces, else behind separators of names, else anywhere.

    Lines keep the indentation of the first.
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
    """Cuts a word that is longer than a line behind its separators, and what is still too long."""
    for piece in _AFTER_SEPARATOR.split(word):
        start = 0
        for end in range(1, len(piece) + 1):
            if display_width(piece[start:end]) > width:
                yield piece[start : end - 1]
                start = end - 1
        yield piece[start:]


def paragraph(text: str, width: int | None = None) -> str:
    """Returns a text in lines that fit."""
    return "\n".join(wrapped(text, width or terminal_width()))


def command_line(options: Sequence[str], width: int | None = None) -> str:
    r"""Returns options of a command in lines that fit and that a shell takes: each ends with \."""
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
    """Lines up the cells of a table that is no wider than the terminal.

    Where the cells of a row do not fit side by side, words are wrapped within their columns. Where
    that is not enough, the table is continued below itself: the first column again, with those
    that did not fit. Numbers are never broken unless one alone is wider than the terminal.

    Args:
      rows: the titles of the columns first. A row of one cell is a heading over all columns.
      width: columns of the terminal; None: as many as it has.
      left: columns that start at the left; the others end at the right.
      rule: whether a line is drawn below the titles.
    """
    width = width or terminal_width()
    if not rows:
        return ""
    rows = [[printable(cell) for cell in row] for row in rows]
    whole = [row for row in rows if len(row) == len(rows[0])]
    natural = [max(map(display_width, column)) for column in zip(*whole, strict=True)]
    least = [
        max((_least_width(cell, number) for number, cell in enumerate(column)))
        for column in zip(*whole, strict=True)
    ]
    least[0] = min(natural[0], max(least[0], _LEAST_NAME))
    if _total(least) > width:  # Names are to be read: the first column gets up to half the width.
        least[0] = max(least[0], min(natural[0], width // 2))
    blocks = []
    for columns in _blocks(least, width):
        widths = _shrunk([natural[c] for c in columns], [least[c] for c in columns], width)
        blocks.append(_lines(rows, columns, widths, width, left=left, rule=rule))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _least_width(cell: str, row: int) -> int:
    size = display_width(cell)
    if row and _NUMBER.fullmatch(cell.strip()):
        return size
    longest = max((display_width(w) for w in _WORD_END.split(cell)), default=0)
    return min(size, max(_LEAST_CELL, min(longest, _LEAST_WORD)))


def _blocks(least: Sequence[int], width: int) -> list[list[int]]:
    """Returns the columns that stand side by side; the first column is in every block."""
    blocks = [[0]]
    for column in range(1, len(least)):
        beside = _total([least[c] for c in (*blocks[-1], column)])
        if beside > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _shrunk(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Takes from the widest columns until all fit: from words first, from numbers if need be."""
    widths = [min(size, width) for size in widths]
    for floors in (least, [2] * len(widths)):
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
