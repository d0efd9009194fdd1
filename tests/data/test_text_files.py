import bz2
import errno
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from umv2.data.paths import DataError
from umv2.data.text_files import file_documents

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}
BOM = b"\xef\xbb\xbf"
RECORDS = [{"text": "eins", "id": 1}, {"text": ""}, {"text": "zwei ü", "score": float("nan")}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path: Path, content: bytes | None = None, field: str = "text") -> list[str]:
    if content is not None:
        path.write_bytes(content)
    return list(file_documents(path, field))


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("upper", [False, True])
def test_suffixes_of_any_case_determine_format_and_compression(
    tmp_path: Path, mark: bytes, compression: str, upper: bool
) -> None:
    compress = COMPRESSORS[compression]

    def path(suffix: str) -> Path:
        name = suffix + compression
        return tmp_path / ("a" + (name.upper() if upper else name))

    for suffix in (".jsonl", ".ndjson", ".json"):
        assert read(path(suffix), compress(mark + LINES)) == ["eins", "zwei ü"]
        assert read(path(suffix), compress(mark + b"\n" + LINES.replace(b"\n", b"\r\n\r\n"))) == [
            *("eins", "zwei ü")
        ]
    content = "one\r\ntwo ü".encode()
    for suffix in (".txt", ".py", ""):
        assert read(path(suffix), compress(mark + content)) == ["one\r\ntwo ü"]
    # Files of several streams, as pigz, pbzip2, xz and pzstd write them.
    assert read(path(".jsonl"), compress(mark + LINES) + compress(mark + LINES)) == 2 * [
        *("eins", "zwei ü")
    ]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_json_may_be_one_array_or_one_record(
    tmp_path: Path, indent: int | None, mark: bytes
) -> None:
    array = json.dumps(RECORDS, indent=indent).encode()
    assert read(tmp_path / "a.json", mark + array) == ["eins", "zwei ü"]
    record = json.dumps(RECORDS[2], indent=indent).encode()
    assert read(tmp_path / "b.json", mark + record) == ["zwei ü"]


def test_a_lone_surrogate_in_json_becomes_valid_text(tmp_path: Path) -> None:
    content = rb'{"text": "a\ud800b\ud83d\ude00"}'
    assert read(tmp_path / "a.jsonl", content) == ["a\ufffdb\U0001f600"]


def test_records_may_have_numbers_of_any_size(tmp_path: Path) -> None:
    numbers = [b"9" * 5000, b"-1" + b"0" * 5000, b"1e999", b"NaN", b"-Infinity"]
    content = b"\n".join(b'{"id": %s, "text": "x"}' % number for number in numbers)
    assert read(tmp_path / "a.jsonl", content) == ["x"] * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", BOM, "a.txt: holds no text"),
        ("a.jsonl", b"", "a.jsonl: holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: holds no text"),
        ("a.json", b"[]", "a.json: holds no text"),
        ("a.txt.gz", b"", "a.txt.gz: holds no text"),
        ("a.txt", b"abc\xffdef", "a.txt: not UTF-8 at byte offset 3$"),
        ("a.txt", BOM + b"abc\xff", "a.txt: not UTF-8 at byte offset 6$"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "not UTF-8 at byte offset 24$"),
        ("a.txt", "text".encode("utf-16"), "byte offset 0; it starts like UTF-16 or UTF-32"),
        ("a.txt", "text".encode("utf-32"), "byte offset 0; it starts like UTF-16 or UTF-32"),
        ("a.jsonl", "{}".encode("utf-16"), "byte offset 0; it starts like UTF-16 or UTF-32"),
        ("a.txt", "text".encode("utf-16-le"), "not text: a null byte at byte offset 1"),
        ("a.txt", "text".encode("utf-16-be"), "not text: a null byte at byte offset 0"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "line 1 .*: not JSON"),
        ("a.txt", gzip.compress(b"x", mtime=0), "it starts like gzip"),
        ("a.jsonl", lzma.compress(b"x"), "it starts like xz"),
        ("a.txt", bz2.compress(b"x" * 99), "it starts like bzip2"),
        ("a.json", COMPRESSORS[".zst"](b"x"), "it starts like zstd"),
        ("a.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "it starts like gzip"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "it starts like PNG"),
        ("a.jpg", b"\xff\xd8\xff\xe0", "it starts like JPEG"),
        ("a.zip", b"PK\x03\x04\x14\x00\x00\x00", "not text: a null byte at byte offset 5"),
        ("a.csv", b"id,text\n1,x\n", "a.csv: tables are read from Parquet and JSON lines"),
        ("a.TSV.gz", gzip.compress(b"x", mtime=0), "tables are read from Parquet and JSON lines"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl: line 2 \(byte offset 14\): not JSON"),
        ("a.jsonl", b'{"text": "x"} {"text": "y"}', "line 1 .*: not JSON: Extra data"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 \(byte offset 0\): no text in field .*'text'"),
        ("a.jsonl", b"[1]", "no text in field"),
        ("a.jsonl", b'[{"text": "x"}]', "no text in field"),
        ("a.jsonl", b'{"text": 3}', "no text in field"),
        ("a.jsonl", b'{"text": %s}' % (b"3" * 5000), "no text in field"),
        ("a.jsonl", b'{"text": null}', "no text in field"),
        ("a.jsonl", b'{"text": ["x"]}', "no text in field"),
        ("a.jsonl", b'{"text": "x", "a": ' + b"[" * 99_999, "line 1 .*: JSON nested too deep"),
        ("a.json", b'{"a":' * 99_999, "a.json: JSON nested too deep"),
        ("a.json", b'[{"text": "x"}, "y"]', "a.json: record 2: no text in field"),
        ("a.json", b'{\n"text": "x"', "a.json: not JSON"),
        ("a.json", b'{"text": "x"}\n[]', "line 2 .*: no text in field"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.txt.bz2", b"not bzip2", "a.txt.bz2: cannot be read: Invalid data"),
        ("a.txt.xz", b"not xz at all", "a.txt.xz: cannot be read: Input format not supported"),
        ("a.txt.zst", b"not zstd", "a.txt.zst: cannot be read: ZSTD decompress failed"),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read"),
        ("a.parquet", b"", "a.parquet: cannot be read: not Parquet"),
        ("a.parquet", b"text", "a.parquet: cannot be read: not Parquet"),
        ("a.PARQUET.gz", gzip.compress(b"PAR1", mtime=0), "Parquet is compressed inside"),
    ],
)
def test_invalid_text_names_file_and_position(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESSORS if suffix])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_truncated_compressed_file_is_named(tmp_path: Path, compression: str, name: str) -> None:
    noise = np.random.default_rng(0).bytes(9_999).hex()
    content = COMPRESSORS[compression](json.dumps({"text": noise}).encode())
    path = tmp_path / (name + compression)
    for size in (len(content) - 3, len(content) // 2, 12):
        with pytest.raises(DataError, match=rf"{name}{compression}: cannot be read: "):
            read(path, content[:size])


def test_a_misnamed_npy_and_parquet_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(DataError, match=r"a\.npy: not UTF-8 .* starts like NumPy's \.npy"):
        read(tmp_path / "a.npy")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99]}), tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: not (UTF-8 .* starts like Parquet|text)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.json.zst", "a.parquet"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_an_unreadable_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / name))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=f"{name}: cannot be read: {os.strerror(number)}$"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["drei", None, "", "vier"]),
        pyarrow.array(["drei", None, "", "vier"], pyarrow.large_string()),
        pyarrow.array(["drei", None, "", "vier"]).dictionary_encode(),
    ],
    ids=["string", "large_string", "dictionary"],
)
def test_parquet_rows_are_documents(tmp_path: Path, column: Any) -> None:
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.Parquet", row_group_size=2)
    assert read(tmp_path / "a.Parquet") == ["drei", "vier"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([3], "int64"),
        ([b"x"], "binary"),
        ([["x"]], "list<"),
        ([{"text": "x"}], "struct<"),
        ([None], "null"),
    ],
)
def test_a_parquet_column_without_strings_is_named(tmp_path: Path, column: list, kind: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"column data.text_field='text' holds {kind}"):
        read(tmp_path / "a.parquet")


def test_a_wrong_parquet_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table([pyarrow.array(["x"])] * 3, names=["body", "twice", "twice"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"no column data.text_field='story', only \['body'"):
        read(path, field="story")
    with pytest.raises(DataError, match=r"several columns data.text_field='twice'"):
        read(path, field="twice")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [str(i) * 9 for i in range(999)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    content = path.read_bytes()
    for damaged in (content[:-9], content[: len(content) // 2], content[:99] + content[2000:]):
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
            read(path, damaged)


def test_a_parquet_string_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pyarrow.array([b"good", b"b\xffd"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 1: not UTF-8"):
        read(path)
