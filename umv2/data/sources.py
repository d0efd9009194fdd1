"""Text documents, one after another: Python sources, local files, Hugging Face data sets."""

import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool, UInt64

from umv2.config import DataConfig
from umv2.schema import UserError

# Distributions ship these folders in some packages and not in others, so leaving them out makes the
# corpus nearly the same everywhere; tests and demos are also the least edited text.
_SKIPPED_FOLDERS = re.compile(
    r"site-packages|dist-packages|__pycache__|tests?|idlelib|lib2to3|tkinter|turtledemo|config-.*"
)
# Written when Python was built or installed: they describe the machine, not the library.
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")

HASH_BYTES = 8


class DataError(UserError, ValueError):
    """Data that cannot be trained on; the message names the file and the place in it."""


def content_hash(content: bytes) -> int:
    """Returns the first 64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES).digest(), "little")


def content_hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, "n"]:
    """Returns the hash of each document, which decides the side of the split."""
    return np.array([content_hash(content) for content in contents], np.uint64)


def is_held_out(
    content_hashes: UInt64[np.ndarray, "n"], held_out_fraction: float
) -> Bool[np.ndarray, "n"]:
    """Returns which documents are held out: those in the lowest fraction of the hash range."""
    return content_hashes < np.uint64(held_out_fraction * 2.0**64)


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that match any of the globs, sorted by path, each once.

    Raises:
      DataError: for a glob that matches no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = [match for match in glob(pattern, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise DataError(f"data.paths: no file matches {pattern!r}")
        found.update(matches)
    return [Path(path) for path in sorted(found)]


def text_documents(config: DataConfig) -> Iterator[str]:
    """Yields the non-empty documents of a text source in a fixed order.

    `standard_library` is one document a file of the running Python, by relative path, without
    tests, demos and installed packages; `site_packages` the same of all that is installed beside
    it, tests included, each text once. `text` is one document a line of .jsonl and .json (also
    .gz), one a row of .parquet, and one a file for anything else.

    Raises:
      DataError: for a file that is empty, unreadable or not of its format, or a missing package.
    """
    match config.source:
        case "standard_library":
            yield from _standard_library()
        case "site_packages":
            yield from _site_packages()
        case "text":
            for path in matching_files(config.paths):
                yield from _file_documents(path, config.text_field)
        case "hugging_face":
            yield from _hugging_face_documents(config)
        case _:
            raise DataError(f"data.source={config.source!r} holds tokens, not text")


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    relative = [
        path
        for path in (found.relative_to(root) for found in root.rglob("*.py"))
        if not _SKIPPED_FILES.fullmatch(path.name)
        and not any(_SKIPPED_FOLDERS.fullmatch(folder) for folder in path.parts[:-1])
    ]
    if not relative:
        raise DataError(f"{root}: holds no source files of the standard library")
    yield from _python_sources(root, relative)


def _site_packages() -> Iterator[str]:
    """Packages carry copies of each other's files, so a text counts once."""
    roots = sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
    seen: set[int] = set()
    for root in roots:
        for text in _python_sources(root, [path.relative_to(root) for path in root.rglob("*.py")]):
            if (text_hash := content_hash(text.encode())) not in seen:
                seen.add(text_hash)
                yield text
    if not seen:
        raise DataError(
            f"data.source='site_packages': no Python sources in {', '.join(map(str, roots))}"
        )


def _python_sources(root: Path, relative: Iterable[Path]) -> Iterator[str]:
    for path in sorted(relative, key=Path.as_posix):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        if text:
            yield text


def _file_documents(path: Path, text_field: str) -> Iterator[str]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        documents = _json_lines(path, text_field)
    elif name.endswith(".parquet"):
        documents = _parquet_rows(path, text_field)
    else:
        documents = _whole_file(path)
    empty = True
    try:
        for document in documents:
            if document:
                empty = False
                yield document
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte offset {error.start}") from error
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if empty:
        raise DataError(f"{path}: holds no text")


def _open_bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _whole_file(path: Path) -> Iterator[str]:
    with _open_bytes(path) as file:
        yield file.read().decode("utf-8")


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}: line {number} (byte offset {offset})"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{place}: not JSON: {error}") from error
                text = record.get(text_field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise DataError(f"{place}: no text in field data.text_field={text_field!r}")
                # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            offset += len(line)


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            raise DataError(f"{path}: no column data.text_field={text_field!r}, only {columns}")
        row = 0
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise DataError(f"{path}: row {row}: column {text_field!r} holds no text")
                if text is not None:
                    yield text
                row += 1


def _hugging_face_documents(config: DataConfig) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source='hugging_face' needs the optional extra: pip install 'umv2[hugging_face]'"
        ) from error
    stream = datasets.load_dataset(
        config.hugging_face_name,
        config.hugging_face_config or None,
        split=config.hugging_face_split,
        streaming=True,
    )
    for row, record in enumerate(stream):
        text = record.get(config.text_field)
        if not isinstance(text, str):
            raise DataError(
                f"{config.hugging_face_name}: row {row}: no text in field"
                f" data.text_field={config.text_field!r}, only {sorted(record)}"
            )
        if text:
            yield text
