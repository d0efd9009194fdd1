"""User paths, atomic file writes, JSON values and lock files.

Errors of the operating system (a full disk, a read-only folder) become a `FileError`: one line with
the path and the reason. Imports neither jax nor numpy.
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
# Errors that come from the current state of the machine or a disk, not from a bug or the content of
# a file.
TRANSIENT_ERRNOS = frozenset(
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
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FileError(UserError, OSError):
    """A path that cannot be used; the message gives the path and the reason."""


class InUse(FileError):
    """Another live process holds the lock."""


def user_path(given: str, name: str) -> Path:
    """Returns the path given by a flag or a field, with `~` expanded.

    Args:
      given: the path as the user wrote it.
      name: name of the flag or field, for error messages.

    Raises:
      FileError: the path is empty, a URL (only local and mounted disks are supported), or not a
        valid file name.
    """
    if not given:
        raise FileError(f"{name}={given!r}: must not be empty")
    if _SCHEME.match(given):
        raise FileError(
            f"{name}={given}: must be a local path, not a URL; mount the bucket or share"
        )
    if "\0" in given or not _is_unicode(given):
        raise FileError(f"{name}={given!r}: must be a name in UTF-8 without null bytes")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise FileError(f"{name}={given}: {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(error: OSError) -> str:
    """Returns the operating system's message for an error, without number and path."""
    return error.strerror or str(error)


@contextlib.contextmanager
def errors(path: Path, failed: str = "cannot be written") -> Iterator[None]:
    """Turns errors of the operating system into a `FileError` about `path`."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: {failed}: {reason(error)}") from error


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, if missing.

    Raises:
      FileError: the folder cannot be created, or is a file.
    """
    with errors(path, "cannot be created"):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes `path` atomically: yields a temporary path, which is renamed to `path` on success.

    Readers of `path` see either the old or the new content, never a part of it. The folder of
    `path` is created if missing.

    Raises:
      FileError: writing failed; `path` is unchanged.
    """
    # Keep the suffix last, since some libraries infer the format from it.
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
    """Writes a UTF-8 text file atomically; see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def json_value(value: Any) -> Any:
    """Returns a value that is valid JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Holds a lock on a file.

    The lock is released when the process ends for any reason; a remaining file has no effect. On
    file systems without locks, this does nothing.

    Args:
      path: path of the lock file; its folder is created if missing.
      work: description of the work, for the error message of other processes.

    Raises:
      InUse: another process holds the lock.
      FileError: the file cannot be created.
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
            raise InUse(
                f"{path.parent}: is in use by {holder}; wait until it ends, or stop it"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise FileError(f"{path}: cannot be locked: {reason(error)}") from error
        with errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} ({work})")
            file.flush()
        yield
