"""Paths that a user names, files that appear complete or not at all, what JSON can say, and locks.

What the operating system refuses (a full disk, a read-only folder) becomes a `FileError`: one line
with the path and the reason. Imports neither jax nor numpy.
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umv2.config.schema import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# What the operating system answers when the machine or a disk cannot do more at this moment, which
# says nothing about the program or about what a file holds.
PASSING_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EAGAIN,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# What file systems that cannot lock answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FileError(UserError, OSError):
    """A path that cannot be used; the message names it and says why."""


class InUse(FileError):
    """A lock that another live process holds."""


def user_path(given: str, name: str) -> Path:
    """Returns the path that a flag or a field gives, with `~` expanded.

    Args:
      given: as the user wrote it.
      name: of the flag or field, for messages.

    Raises:
      FileError: a URL (paths are of local or mounted disks), or a name that no file can have.
    """
    if not given:
        raise FileError(f"{name}={given!r}: must not be empty")
    if _SCHEME.match(given):
        raise FileError(
            f"{name}={given}: must be a path of this machine, not a URL; mount the bucket or share"
        )
    if "\0" in given or not _is_unicode(given):
        raise FileError(f"{name}={given!r}: must be a name in UTF-8 without null bytes")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # ~ of a user that there is not
        raise FileError(f"{name}={given}: {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(error: OSError) -> str:
    """Returns what the operating system says of an error, without numbers and paths."""
    return error.strerror or str(error)


@contextlib.contextmanager
def errors(path: Path, failed: str = "cannot be written") -> Iterator[None]:
    """Turns what the operating system refuses into a `FileError` about `path`."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: {failed}: {reason(error)}") from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
      FileError: it cannot be made, or is a file.
    """
    with errors(path, "cannot be made a folder"):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it to `path` at the end.

    Whoever reads `path` sees the old content or the new, never a part. Its folder is made.

    Raises:
      FileError: the operating system refuses; what stood at `path` is unchanged.
    """
    # The suffix stays last, for libraries that go by it.
    unfinished = path.with_name(f".unfinished_{os.getpid()}_{path.name}")
    make_folder(path.parent)
    with errors(path):
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of text, in UTF-8, as a whole; see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def json_value(value: Any) -> Any:
    """Returns a value as JSON can say it: None, which is null, for NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Holds a lock file while `work` is done in its folder.

    The lock ends with the process, however that ends: the file may stay, and means nothing. On file
    systems that cannot lock, there is no lock.

    Args:
      path: of the lock file; its folder is made.
      work: what the holder does, for the message of whoever comes second.

    Raises:
      InUse: another process holds it.
      FileError: the file cannot be made.
    """
    make_folder(path.parent)
    with errors(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InUse(f"{path.parent}: {holder} works there; wait for it or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise FileError(f"{path}: cannot be locked: {reason(error)}") from error
        with errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} ({work})")
            file.flush()
        yield
