import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from umv2 import files
from umv2.config.schema import UserError
from umv2.data.paths import DataError, matching_files


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with links, and files whose names have glob characters."""
    names = ("a[b].txt", "ab.txt", ".hidden.txt", "sub/c.txt", "sub/deep/d.txt")
    for name in (*names, "data[1]/x.txt", "data1/y.txt", "empty/deep/.keep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "linked").symlink_to(tmp_path / "data1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.txt"], ["a[b].txt", "ab.txt"]),
        (["ab.txt", "./*.txt"], ["a[b].txt", "ab.txt"]),
        (["a[b].txt"], ["a[b].txt"]),
        (["a[a-c].txt"], ["ab.txt"]),
        (["data[1]/*"], ["data[1]/x.txt"]),
        (["data[12]/*"], ["data1/y.txt"]),
        (["dat*/*"], ["data1/y.txt", "data[1]/x.txt"]),
        (["linked/*"], ["linked/y.txt"]),
        ([".h*"], [".hidden.txt"]),
        (["sub/**"], ["sub/c.txt", "sub/deep/d.txt"]),
        (["sub/**/*.txt"], ["sub/c.txt", "sub/deep/d.txt"]),
        (["**/d.txt"], ["sub/deep/d.txt"]),
        # `linked` is below `data1`; a file counts once.
        (["**/?.txt"], ["data1/y.txt", "data[1]/x.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["~/ab.txt"], ["ab.txt"]),
    ],
)
def test_globs_yield_each_file_once_in_sorted_order(
    tree: Path, monkeypatch: pytest.MonkeyPatch, patterns: list[str], expected: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tree))
    paths = matching_files(patterns)
    assert [str(path).removeprefix(f"{tree}/") for path in paths] == expected


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_with_two_names_counts_once(tree: Path, link: Callable[[Path, Path], None]) -> None:
    link(tree / "ab.txt", tree / "sub" / "again.txt")
    assert matching_files(["ab.txt", f"{tree}/*.txt", "sub/again.txt"]) == [
        *(tree / "a[b].txt", tree / "ab.txt")
    ]


def test_copies_of_a_file_are_separate_files(tree: Path) -> None:
    (tree / "copy.txt").write_bytes((tree / "ab.txt").read_bytes())
    assert len(matching_files(["ab.txt", "copy.txt"])) == 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.jsonl", r"no file matches '\*.jsonl'$"),
        ("gone.txt", "no file matches 'gone.txt'$"),
        ("gone/*.txt", "no file matches"),
        ("ab.txt/*", "no file matches"),
        ("ab.txt/x", "no file matches"),
        ("sub", r"no file matches 'sub' but folders; its files are sub/\*"),
        ("empty/*", r"no file matches 'empty/\*' but folders"),
        ("{ab,c}.txt", "no file matches"),
        ("", "data.paths='': must not be empty"),
        ("gs://bucket/*.txt", "data.paths=gs://bucket/.*: must be a local path"),
        ("s3://bucket/x", "must be a local path"),
        ("hf://datasets/x", "must be a local path"),
        ("~nobody-of-that-name/x", "data.paths=~nobody-of-that-name/x: "),
        ("a\0b", "without null bytes"),
        ("/dev/null", "/dev/null: not a regular file"),
        ("x" * 300, "no file matches|File name too long"),
    ],
)
def test_a_pattern_that_matches_no_file_is_named(tree: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        matching_files(["ab.txt", pattern])


@pytest.mark.parametrize("pattern", ["*", "old.txt", "sub/*/*", "**/*.txt", "sub/old/x.txt"])
def test_a_broken_link_is_named(tree: Path, pattern: str) -> None:
    (tree / "old.txt").symlink_to(tree / "unmounted" / "old.txt")
    (tree / "sub" / "old").symlink_to(tree / "unmounted")
    with pytest.raises(UserError, match=r"(old.txt: a link to .*|old: .*): No such file or dir"):
        matching_files([pattern])


def test_circular_links_are_named(tree: Path) -> None:
    (tree / "a.txt").symlink_to("b.txt")
    (tree / "b.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"a\.txt: a link to b\.txt, .*Too many levels"):
        matching_files(["*.txt"])


def test_a_path_that_is_not_a_regular_file_is_named(tree: Path) -> None:
    os.mkfifo(tree / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt: not a regular file"):
        matching_files(["*.txt"])


@pytest.mark.parametrize("code", ["EACCES", "EMFILE", "EIO"])
@pytest.mark.parametrize("pattern", ["sub/*/*.txt", "**/*.txt"])
def test_a_folder_that_cannot_be_listed_is_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch, code: str, pattern: str
) -> None:
    scandir = os.scandir
    number = getattr(errno, code)

    def refuse(path: Path) -> object:
        if Path(path).name == "deep":
            raise OSError(number, os.strerror(number))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(files.FileError, match=f"deep: cannot be listed: {os.strerror(number)}"):
        matching_files([pattern])
