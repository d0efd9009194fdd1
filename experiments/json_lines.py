"""Files of results: a JSON object a line."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umv2 import files
from umv2.config.schema import UserError


class RecordsError(UserError, ValueError):
    """Stored records that are not what they should be; the message names the file."""


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


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes records, a line each, behind those that a file has; makes it where there is none.

    Raises:
      FileError: the file cannot be written.
    """
    files.make_folder(path.parent)
    with files.errors(path), path.open("a") as file:
        file.write("".join(map(_line, lines)))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(files.json_value(record), allow_nan=False) + "\n"
