import dataclasses
import gzip
import json
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from umv2.config import DataConfig
from umv2.data.sources import (
    DataError,
    content_hashes,
    is_held_out,
    matching_files,
    text_documents,
)


def read(config: DataConfig, *paths: Path | str) -> list[str]:
    return list(text_documents(dataclasses.replace(config, paths=tuple(map(str, paths)))))


def test_standard_library_is_in_fixed_order_and_leaves_tests_out(config: DataConfig) -> None:
    standard = dataclasses.replace(config, source="standard_library")
    documents = list(text_documents(standard))
    assert documents == list(text_documents(standard))
    root = Path(sysconfig.get_path("stdlib"))
    for kept in ("argparse.py", "json/decoder.py"):
        assert (root / kept).read_text(encoding="utf-8") in documents
    assert documents.index((root / "argparse.py").read_text(encoding="utf-8")) < documents.index(
        (root / "json/decoder.py").read_text(encoding="utf-8")
    )
    assert not any(sys.prefix in document for document in documents), "a path of this machine"
    assert 5e6 < sum(map(len, documents)) < 20e6


def test_standard_library_skips_what_distributions_package_apart(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        *("b.py", "a.py", "a/z.py", "testing.py", "unittest/test.py"),
        *("test/x.py", "ctypes/tests/x.py", "site-packages/x.py", "dist-packages/x.py"),
        *("_sysconfigdata__linux.py", "sitecustomize.py", "config-3.12/x.py", "idlelib/x.py"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    documents = list(text_documents(dataclasses.replace(config, source="standard_library")))
    assert documents == ["a.py", "a/z.py", "b.py", "testing.py", "unittest/test.py"]


def test_a_python_without_sources_is_reported(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no source files of the standard library"):
        list(text_documents(dataclasses.replace(config, source="standard_library")))


def test_installed_sources_count_once(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages carry copies of each other's files, and one folder may be both kinds of home."""
    for name, text in (
        *(("b/x.py", "x"), ("a/tests/y.py", "y"), ("a/copy_of_x.py", "x")),
        *(("a/empty.py", ""), ("a/data.txt", "not Python")),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    homes = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: homes[name])
    installed = dataclasses.replace(config, source="site_packages")
    assert list(text_documents(installed)) == ["x", "y"]

    homes |= {"purelib": str(tmp_path / "a"), "platlib": str(tmp_path / "b")}
    (tmp_path / "b" / "z.py").write_text("z")
    assert list(text_documents(installed)) == ["x", "y", "z"]

    homes |= {"purelib": str(tmp_path / "none"), "platlib": str(tmp_path / "none")}
    with pytest.raises(DataError, match=r"no Python sources in .*none"):
        list(text_documents(installed))


def test_the_environment_has_installed_sources(config: DataConfig) -> None:
    documents = list(text_documents(dataclasses.replace(config, source="site_packages")))
    assert sum(map(len, documents)) > 20e6  # JAX and its friends
    assert Path(pytest.__file__).read_text(encoding="utf-8") in documents


def test_each_format_yields_its_documents(config: DataConfig, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) + "\n" for text in ("eins", "", "zwei ü")]
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress("".join(lines).encode()))
    table = pyarrow.table({"id": [1, 2, 3], "text": ["drei", None, "vier"]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    expected = ["one\ntwo", "x = 1\n", "eins", "zwei ü", "eins", "zwei ü", "drei", "vier"]
    assert read(config, tmp_path / "*") == expected


def test_half_a_surrogate_pair_in_json_becomes_valid_text(
    config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b\ud83d\ude00"}')
    assert read(config, tmp_path / "a.jsonl") == ["a\ufffdb\U0001f600"]


def test_files_are_sorted_and_taken_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = matching_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt", f"{tmp_path}/*"])
    assert found == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "sub/c.txt"]


def test_a_glob_without_match_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"no file matches '.*/\*\.jsonl'"):
        matching_files([f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: holds no text"),
        ("a.txt", b"abc\xffdef", "a.txt: not UTF-8 at byte offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl: line 2 \(byte offset 14\): not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 \(byte offset 0\): no text in field .*'text'"),
        ("a.jsonl", b"[1]", "no text in field"),
        ("a.jsonl", b'{"text": 3}', "no text in field"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-12],
            "a.jsonl.gz: cannot be read",
        ),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read"),
    ],
)
def test_bad_text_names_file_and_place(
    config: DataConfig, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(config, tmp_path / name)


def test_a_wrong_parquet_column_is_named(config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [3]}), path)
    with pytest.raises(DataError, match=r"no column data.text_field='story', only \['body'"):
        read(dataclasses.replace(config, text_field="story"), path)
    with pytest.raises(DataError, match="row 0: column 'text' holds no text"):
        read(config, path)


def test_token_sources_have_no_text(config: DataConfig) -> None:
    with pytest.raises(DataError, match="'memmap' holds tokens"):
        list(text_documents(dataclasses.replace(config, source="memmap")))


@pytest.fixture
def hugging_face(config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, source="hugging_face", hugging_face_name="stories")


def test_hugging_face_is_streamed(
    hugging_face: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"text": "eins"}, {"text": ""}, {"text": "zwei"}, {"body": "drei"}]

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents = text_documents(hugging_face)
    assert [next(documents), next(documents)] == ["eins", "zwei"]
    assert calls == [(("stories", None), {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match=r"stories: row 3: no text in field .* only \['body'\]"):
        next(documents)


def test_hugging_face_without_the_extra_names_it(
    hugging_face: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"umv2\[hugging_face\]"):
        next(text_documents(hugging_face))


def test_the_split_is_stable_and_near_its_fraction() -> None:
    eins, zwei = 10896600607207707157, 1606067403276999281
    hashes = content_hashes([b"eins", b"zwei", b"eins"])
    # Written down once: a new hash would move documents across the split of a resumed run.
    assert hashes.tolist() == [eins, zwei, eins]
    many = content_hashes(str(i).encode() for i in range(10_000))
    held_out = is_held_out(many, 0.2)
    assert abs(held_out.mean() - 0.2) < 0.02
    assert np.all(held_out[is_held_out(many, 0.1)]), "a larger fraction keeps what a smaller holds"
