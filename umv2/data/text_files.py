"""Documents in plain text, JSON lines and Parquet files, optionally compressed, by file name."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from pyarrow import types

from umv2 import files
from umv2.data.paths import DataError, format_of

_HEAD_BYTES = 64
_PARQUET = "Parquet"
# Python refuses to parse integers of more than 4,300 digits; numbers are not text, so ignore them.
_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)


def file_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yields the non-empty documents of a file.

    The suffix of the name determines the format, ignoring case. A document is a line of .jsonl and
    .ndjson; a line or array element of .json, or all of it if it is one record; a row of .parquet;
    and the complete file otherwise. An additional suffix .gz, .bz2, .xz or .zst means that the file
    is compressed.

    Args:
      path: of the file.
      text_field: key or column of the text.

    Raises:
      DataError: the file is empty, unreadable, damaged or not of the format that its name implies;
        the message gives the position in it.
    """
    name = path.name.lower()
    suffix = next((suffix for suffix in _DECOMPRESSORS if name.endswith(suffix)), "")
    name, opener = name.removesuffix(suffix), _DECOMPRESSORS.get(suffix, _open_plain)
    empty = True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        for document in _documents(path, name, opener, head, text_field):
            if document:
                empty = False
                yield document
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {files.reason(error)}") from error
    except (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if empty:
        raise DataError(f"{path}: holds no text")


def _documents(
    path: Path, name: str, opener: Callable[[Path], BinaryIO], head: bytes, text_field: str
) -> Iterator[str]:
    if name.endswith(".parquet"):
        if opener is not _open_plain:
            raise DataError(f"{path}: Parquet is compressed inside; decompress the file")
        if format_of(head) != _PARQUET:
            raise DataError(f"{path}: cannot be read: not Parquet by its first bytes")
        return _parquet_rows(path, text_field)
    if name.endswith((".csv", ".tsv")):
        raise DataError(
            f"{path}: tables are read from Parquet and JSON lines; convert it, or rename it to .txt"
            " if all of it is one document"
        )
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return _json_records(path, opener, text_field, may_be_one_value=name.endswith(".json"))
    return _whole_file(path, opener)


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    # The standard library supports zstd from Python 3.14 on.
    return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"))


_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _text(path: Path, content: bytes, offset: int = 0) -> str:
    """Decodes UTF-8 content found at `offset` of a file; strips a byte order mark.

    Raises:
      DataError: the bytes are not UTF-8.
    """
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[mark:].decode()
    except UnicodeDecodeError as error:
        name = None if offset else format_of(content[:_HEAD_BYTES])
        hint = f"; it starts like {name}" if name else ""
        position = offset + mark + error.start
        raise DataError(f"{path}: not UTF-8 at byte offset {position}{hint}") from error


def _whole_file(path: Path, opener: Callable[[Path], BinaryIO]) -> Iterator[str]:
    with opener(path) as file:
        content = file.read()
    text = _text(path, content)
    if "\0" in text:
        raise DataError(f"{path}: not text: a null byte at byte offset {content.index(0)}")
    yield text


def _json_records(
    path: Path, opener: Callable[[Path], BinaryIO], text_field: str, *, may_be_one_value: bool
) -> Iterator[str]:
    offset = 0
    with opener(path) as file:
        for number, line in enumerate(file, start=1):
            text = _text(path, line, offset)
            place = f"{path}: line {number} (byte offset {offset})"
            if text.strip():
                if may_be_one_value and not _is_record(text):
                    yield from _json_value(path, opener, text_field)
                    return
                may_be_one_value = False
                yield _text_of(_parsed(text, place), text_field, place)
            offset += len(line)


def _is_record(line: str) -> bool:
    try:
        return isinstance(_DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_value(path: Path, opener: Callable[[Path], BinaryIO], text_field: str) -> Iterator[str]:
    with opener(path) as file:
        value = _parsed(_text(path, file.read()), str(path))
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _text_of(record, text_field, f"{path}: record {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return _DECODER.decode(text)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deep") from error


def _text_of(record: Any, text_field: str, place: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{place}: no text in field data.text_field={text_field!r}")
    # JSON can contain a lone surrogate, which UTF-8 cannot encode.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise DataError(
                f"{path}: no column data.text_field={text_field!r}, only {schema.names}"
            )
        if schema.names.count(text_field) > 1:
            raise DataError(f"{path}: several columns data.text_field={text_field!r}")
        column_type = schema.field(text_field).type
        if not _holds_text(column_type):
            raise DataError(
                f"{path}: column data.text_field={text_field!r} holds {column_type}, not strings"
            )
        row = 0
        for batch in file.iter_batches(columns=[text_field]):
            for value in batch.column(0):
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: row {row}: not UTF-8") from error
                if text is not None:
                    yield text
                row += 1


def _holds_text(column_type: pyarrow.DataType) -> bool:
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    )
