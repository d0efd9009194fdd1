"""The files that `data.paths` names: each once, in order, and none of them left out in silence."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from umv2 import files
from umv2.config.schema import UserError

# How files begin that are neither text nor tokens, whatever their names say.
_SIGNATURES = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((b"BZh%d1AY&SY" % level, "bzip2") for level in range(1, 10)),
    (b"PK\x03\x04", "zip"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\x93NUMPY", "NumPy's .npy"),
    (b"\x89PNG\r\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"%PDF-", "PDF"),
    (b"\xff\xfe", "UTF-16 or UTF-32"),
    (b"\xfe\xff", "UTF-16"),
)


class DataError(UserError, ValueError):
    """Data that cannot be trained on; the message names the file and the place in it."""


def format_of(head: bytes, *, min_bytes: int = 1) -> str | None:
    """Returns the format that begins as `head` does, by `min_bytes` or more; None if unknown."""
    return next(
        (name for start, name in _SIGNATURES if len(start) >= min_bytes and head.startswith(start)),
        None,
    )


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that match any of the globs, sorted by path, each once.

    `~` is the home folder, `**` any number of folders, and a path that is there counts as itself
    even if its name has the characters of a glob. Links are followed; a file with several names
    goes by the first of them.

    Raises:
      DataError: for a glob that matches no file, or anything that is no file and no folder: a link
        that leads nowhere, a pipe, a device.
      files.FileError: for a URL, or a folder or file that the operating system refuses to show.
    """
    matched: set[Path] = set()
    for pattern in patterns:
        matches = list(_matches(files.user_path(pattern, "data.paths")))
        regular = [match for match in matches if _is_file(match)]
        if not regular:
            folders = f" but folders; its files are {pattern.rstrip('/')}/*" if matches else ""
            raise DataError(f"data.paths: no file matches {pattern!r}{folders}")
        matched.update(regular)
    once: dict[object, Path] = {}
    for path in sorted(matched, key=str):
        once.setdefault(_identity(path), path)
    return list(once.values())


def _is_file(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise DataError(
                f"{path}: a link to {path.readlink()}, which cannot be read: {files.reason(error)}"
            ) from error
        raise files.FileError(f"{path}: cannot be read: {files.reason(error)}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path}: not a regular file")
    return stat.S_ISREG(mode)


def _identity(path: Path) -> object:
    """Returns what is the same for all names of one file."""
    status = path.stat()
    # File systems that know no inodes give every file one link.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path.resolve()


def _matches(pattern: Path) -> Iterator[Path]:
    there, parts = Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]
    while parts and os.path.lexists(there / parts[0]):
        there, parts = there / parts[0], parts[1:]
    return _matches_below(there, parts)


def _matches_below(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yields the paths below a folder that match all parts of a glob.

    The standard library's glob leaves out what it cannot list, be it for a moment.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    with files.errors(folder, "cannot be listed"):
        if not glob.has_magic(part):
            if _holds(folder, part):
                yield from _matches_below(folder / part, rest)
            return
        try:
            with os.scandir(folder) as entries:
                # A link to a folder above leads round in circles.
                names = sorted(
                    (entry.name, part == "**" and entry.is_dir() and not _leads_up(entry))
                    for entry in entries
                    if part.startswith(".") or not entry.name.startswith(".")
                )
        except NotADirectoryError:
            return
    if part == "**":
        yield from _matches_below(folder, rest)
    for name, is_below in names:
        if is_below:
            yield from _matches_below(folder / name, parts)
        elif (part == "**" and not rest) or (part != "**" and fnmatch.fnmatchcase(name, part)):
            yield from _matches_below(folder / name, rest)


def _holds(folder: Path, name: str) -> bool:
    try:
        (folder / name).lstat()
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        folder.stat()  # as a link it may lead nowhere
        return False
    return True


def _leads_up(entry: os.DirEntry[str]) -> bool:
    path = Path(entry.path)
    return entry.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
