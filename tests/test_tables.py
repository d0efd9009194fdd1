"""Tables at different terminal widths: nothing is wider, and nothing is lost."""

import re
from collections import Counter

import pytest

from umv2 import tables

WIDTHS = (40, 60, 80, 100, 200)
LONG = "a_name/" * 30 + "without_a_single_break" + "x" * 150
NAMES = {
    "short": "tiny",
    "long": LONG,
    "wide": "記憶層モデル" * 20,
    "accents": "e\u0301" * 150,
    "control characters": "two\nlines\tand \x1b[31mred\udcff" * 8,
    "blank": "",
}


def widest(text: str) -> int:
    return max(map(tables.display_width, text.split("\n")))


def letters(text: str) -> str:
    """Returns the characters of a text, independent of line breaks."""
    return re.sub(r"\s", "", text)


def column(text: str, start: str) -> list[str]:
    """Returns the numbers of the rows that begin with `start`, over all blocks."""
    rows = [line for line in text.split("\n") if line.startswith(start)]
    return [cell for row in rows for cell in row.split()[1:]]


def test_a_table_that_fits_is_aligned() -> None:
    rows = [("", "a", "long name"), ("sizes",), ("  one", "1,000", "2")]
    assert tables.table(rows, 60) == ("           a  long name\nsizes\n  one  1,000          2")
    assert tables.table(rows, 60, left=(0, 1), rule=True).splitlines()[:2] == [
        "       a      long name",
        "-----  -----  ---------",
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("place", ["title", "row", "cell", "heading"])
def test_no_name_makes_a_table_wider_than_the_terminal(place: str, name: str, width: int) -> None:
    rows = [("", "one", name if place == "title" else "two", "three")]
    rows += [("row", "123,456,789", name if place == "cell" else "9,876,543.210", "some words")]
    rows += [(name if place == "row" else "last", "1", "2", "3")]
    text = tables.table([*rows, (name if place == "heading" else "end",)], width, left=(0, 3))
    assert widest(text) <= width
    assert set(column(text, "row")) >= {"123,456,789"}
    assert Counter(letters(tables.printable(name))) <= Counter(letters(text))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", range(1, 13))
def test_columns_that_do_not_fit_are_continued_below(count: int, width: int) -> None:
    values = [f"{10**9 + number:,}" for number in range(count)]
    titles = [f"configuration_{number}" for number in range(count)]
    rows = [("", *titles), ("section",), ("  total", *values), ("  part", *values[::-1])]
    text = tables.table(rows, width)
    assert widest(text) <= width
    assert column(text, "  total") == values
    assert column(text, "  part") == values[::-1]
    blocks = text.split("\n\n")
    assert (len(blocks) == 1) == (7 + 15 * count <= width)
    assert all("section" in block for block in blocks)


def test_words_are_wrapped_before_columns_are_moved_below() -> None:
    rows = [("name", "shape", "size"), ("model/blocks/attention/key", "16 x 2048 x 2048", "67,108")]
    assert tables.table(rows, 40, left=(0, 1)) == (
        "name              shape             size\n"
        "model/blocks/     16 x 2048 x     67,108\n"
        "attention/key     2048"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_with_one_row_no_rows_and_one_column(width: int) -> None:
    assert tables.table([], width) == ""
    assert tables.table([("title", "other")], width) == "title  other"
    assert tables.table([("title",), ("1",), ("2",)], width) == "title\n1\n2"
    one = tables.table([(LONG,), (LONG,)], width, rule=True)
    assert widest(one) <= width
    assert letters(one).replace("-", "") == 2 * LONG
    # A number too long for any terminal.
    assert letters(tables.table([("n", "m"), ("1" * 300, "2" * 300)], width)) != ""
    assert widest(tables.table([("n", "m"), ("1" * 300, "2" * 300)], width)) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("text", [*NAMES.values(), "  indented " + "words " * 50])
def test_paragraphs_keep_every_letter_and_their_indentation(text: str, width: int) -> None:
    wrapped = tables.paragraph(text, width)
    assert widest(wrapped) <= width
    assert letters(wrapped) == letters(tables.printable(text))
    if text.startswith("  "):
        assert all(re.match(r"  \S", line) for line in wrapped.split("\n"))


def test_options_are_continued_with_backslashes() -> None:
    options = [f"--config.field_{number}={number}" for number in range(9)]
    lines = tables.command_line(options, 50).split("\n")
    assert max(map(len, lines)) <= 50
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert "".join(line.removesuffix("\\") for line in lines).split() == options
    assert tables.command_line(options, 500) == " ".join(options)


@pytest.mark.parametrize(
    ("columns", "width"),
    [("72", 72), ("500", 500), ("3", 40), ("0", 100), ("wide", 100), ("", 100)],
)
def test_the_width_comes_from_columns(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.__stdout__", None)  # no terminal
    assert tables.terminal_width() == width
    words = "word " * 200
    assert widest(tables.paragraph(words)) <= width < widest(tables.paragraph(words)) + 5
