"""Stored measurements: files of JSON objects, one a line, that say where their numbers come from.

A line holds what was measured, `about()` beside it, and, where the device matters, `device()`.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umv2 import files
from umv2.config.schema import UserError

# Packages whose versions are stored, where they are installed.
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "libtpu",
    "jax-cuda13-plugin",
    "torch",
    "transformers",
    "lm_eval",
)


class RecordsError(UserError, ValueError):
    """Stored records that are not what they should be; the message names the file."""


def about() -> dict[str, Any]:
    """Returns the command, the date (UTC), the CPU cores of the machine, and versions."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = ["-m", spec.name] if spec else [sys.argv[0]]
    return {
        "command": shlex.join(["python", *name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def device() -> dict[str, Any]:
    """Returns what JAX runs on; starts its backend."""
    import jax

    first = jax.devices()[0]
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "num_devices": jax.device_count(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON objects, one a line.

    Raises:
      RecordsError: a line that is not one.
      FileError: a file that cannot be read.
    """
    with files.errors(path, "cannot be read"):
        content = path.read_bytes()
    lines = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordsError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise RecordsError(f"{path}: line {number} is not a JSON object")
        lines.append(record)
    return lines


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes records, a line each, all or none.

    Raises:
      FileError: the file cannot be written.
    """
    files.write_text(path, "".join(map(_line, lines)))


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes records, a line each, behind those that a file has; makes it where there is none.

    Raises:
      FileError: the file cannot be written.
    """
    files.make_folder(path.parent)
    with files.errors(path), path.open("a") as file:
        file.write("".join(map(_line, lines)))


def merged(
    path: Path, records: Iterable[Mapping[str, Any]], by: Iterable[str]
) -> list[Mapping[str, Any]]:
    """Returns the records of a file with new ones in place of those of equal cases.

    Args:
      path: of the file; none is there: there are the new records alone.
      records: the new ones; those of new cases come last.
      by: the fields that name a case.

    Raises:
      RecordsError: a line of the file that is no JSON object.
      FileError: the file cannot be read.
    """
    old, names = read(path) if path.exists() else [], tuple(by)
    return list({tuple(r.get(n) for n in names): r for r in [*old, *records]}.values())


def require_writable(path: Path) -> None:
    """Finds out before there are results whether a file can be written; makes its folder.

    Raises:
      FileError: it cannot.
    """
    files.make_folder(path.parent)
    with files.errors(path):
        if path.exists():
            path.open("a").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(files.json_value(record), allow_nan=False) + "\n"
