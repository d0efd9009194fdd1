"""The files that `data.paths` matches: sorted, without duplicates, and never silently skipped."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from umv2 import files
from umv2.config.schema import UserError

# Magic bytes of formats that are neither text nor raw tokens, whatever the file name says.
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
    """Data that cannot be trained on; the message names the file and the position in it."""


def format_of(head: bytes, *, min_bytes: int = 1) -> str | None:
    """Returns the format whose magic bytes start `head`; None if there is none.

    Args:
      head: first bytes of a file.
      min_bytes: ignores shorter magic bytes.
    """
    return next(
        (name for magic, name in _SIGNATURES if len(magic) >= min_bytes and head.startswith(magic)),
        None,
    )


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that match any of the globs, sorted by path, without duplicates.

    `~` is the home folder and `**` matches any number of folders. A path that exists is taken
    literally even if it contains glob characters. Links are followed; a file that matches under
    several names is returned under the first of them.

    Raises:
      DataError: a glob matches no file, or matches something that is neither a file nor a folder:
        a broken link, a pipe, a device.
      files.FileError: a URL, or a folder or file that the operating system does not let us read.
    """
    matched: set[Path] = set()
    for pattern in patterns:
        matches = list(_matches(files.user_path(pattern, "data.paths")))
        regular = [match for match in matches if _is_file(match)]
        if not regular:
            folders = f" but folders; its files are {pattern.rstrip('/')}/*" if matches else ""
            raise DataError(f"data.paths: no file matches {pattern!r}{folders}")
        matched.update(regular)
    unique: dict[object, Path] = {}
    for path in sorted(matched, key=str):
        unique.setdefault(_identity(path), path)
    return list(unique.values())


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
    """Returns a key that is equal for all names of one file."""
    status = path.stat()
    # File systems without inodes report one link for every file.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path.resolve()


def _matches(pattern: Path) -> Iterator[Path]:
    folder, parts = Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]
    while parts and os.path.lexists(folder / parts[0]):
        folder, parts = folder / parts[0], parts[1:]
    return _matches_below(folder, parts)


def _matches_below(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yields the paths below a folder that match all parts of a glob.

    Unlike the standard library's `glob`, raises for a folder that cannot be listed.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    with files.errors(folder, "cannot be listed"):
        if not glob.has_magic(part):
            if _contains(folder, part):
                yield from _matches_below(folder / part, rest)
            return
        try:
            with os.scandir(folder) as entries:
                # Following a link to a parent folder would never end.
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


def _contains(folder: Path, name: str) -> bool:
    try:
        (folder / name).lstat()
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        folder.stat()  # raises if the folder is itself a broken link
        return False
    return True


def _leads_up(entry: os.DirEntry[str]) -> bool:
    path = Path(entry.path)
    return entry.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
