"""Stored measurements: JSON lines that record where their numbers come from.

A line has the measured values, `about()` and, where the device matters, `device()`.
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

# Packages whose versions are stored if they are installed.
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
    """Stored records are invalid; the message names the file."""


def about() -> dict[str, Any]:
    """Returns the command, the date (UTC), the number of CPU cores, and versions."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = ["-m", spec.name] if spec else [sys.argv[0]]
    return {
        "command": shlex.join(["python", *name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def device() -> dict[str, Any]:
    """Describes the devices that JAX runs on; initialises its backend."""
    import jax

    first = jax.devices()[0]
    return {
        "device": first.device_kind,
        "platform": first.platform,
        "num_devices": jax.device_count(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON objects, one per line.

    Raises:
      RecordsError: a line is not a JSON object.
      FileError: the file cannot be read.
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
    """Writes records, one per line, atomically.

    Raises:
      FileError: the file cannot be written.
    """
    files.write_text(path, "".join(map(_line, lines)))


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends records, one per line, to a file; creates it if it does not exist.

    Raises:
      FileError: the file cannot be written.
    """
    files.make_folder(path.parent)
    with files.errors(path), path.open("a") as file:
        file.write("".join(map(_line, lines)))


def merged(
    path: Path, records: Iterable[Mapping[str, Any]], by: Iterable[str]
) -> list[Mapping[str, Any]]:
    """Returns the records of a file, with new records replacing those of the same case.

    Args:
      path: the file; if it does not exist, only the new records are returned.
      records: the new records; those of new cases come last.
      by: the fields that identify a case.

    Raises:
      RecordsError: a line of the file is not a JSON object.
      FileError: the file cannot be read.
    """
    old, names = read(path) if path.exists() else [], tuple(by)
    return list({tuple(r.get(n) for n in names): r for r in [*old, *records]}.values())


def require_writable(path: Path) -> None:
    """Checks that a file can be written, before there are results; creates its folder.

    Raises:
      FileError: it cannot be written.
    """
    files.make_folder(path.parent)
    with files.errors(path):
        if path.exists():
            path.open("a").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(files.json_value(record), allow_nan=False) + "\n"
