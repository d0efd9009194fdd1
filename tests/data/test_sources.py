import dataclasses
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umv2.config import DataConfig
from umv2.data.paths import DataError
from umv2.data.sources import content_hashes, text_documents

type Library = Callable[[Callable[..., object]], None]


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
    with pytest.raises(DataError, match="'standard_library': no Python sources in "):
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


def test_token_sources_have_no_text(config: DataConfig) -> None:
    with pytest.raises(DataError, match="'memmap' holds tokens"):
        list(text_documents(dataclasses.replace(config, source="memmap")))


def test_text_is_the_documents_of_all_files(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "two"}) + "\n")
    paths = (f"{tmp_path}/*.txt", f"{tmp_path}/*")
    text = dataclasses.replace(config, paths=paths, text_field="body")
    assert list(text_documents(text)) == ["two", "one"]


def test_python_sources_leave_out_marks_and_what_is_no_file(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to("nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for source in ("standard_library", "site_packages"):
        assert list(text_documents(dataclasses.replace(config, source=source))) == ["x = 1\n"]


def test_content_hashes_stay_the_same() -> None:
    eins, zwei = 10896600607207707157, 1606067403276999281
    # Written down once: a new hash would move documents across the split of a resumed run.
    assert content_hashes([b"eins", b"zwei", b"eins"]).tolist() == [eins, zwei, eins]


@pytest.fixture
def hugging_face(config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, source="hugging_face", hugging_face_name="stories")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Puts a function in the place of Hugging Face's `load_dataset`."""

    def put(load_dataset: Callable[..., object]) -> None:
        module = types.ModuleType("datasets")
        monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
        monkeypatch.setitem(sys.modules, "datasets", module)

    return put


def test_hugging_face_is_streamed(hugging_face: DataConfig, library: Library) -> None:
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"text": "eins"}, {"text": ""}, {"text": "zwei"}, {"body": "drei"}]

    library(load_dataset)
    documents = text_documents(hugging_face)
    assert [next(documents), next(documents)] == ["eins", "zwei"]
    assert calls == [(("stories", None), {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match=r"'stories': row 3: no text in field .* only \['body'\]"):
        next(documents)


class OfTheLibrary(Exception):
    """The library raises what has nothing in common with anything."""


ERRORS = [
    OfTheLibrary("Dataset 'stories' doesn't exist on the Hub\nor cannot be accessed."),
    ConnectionError("Couldn't reach the Hub"),
    ValueError("Unknown split 'train'. Should be one of ['test']."),
    ValueError("BuilderConfig 'eins' not found. Available: ['zwei']"),
    PermissionError("stories is a gated dataset; ask for access"),
    KeyError("text"),
    RuntimeError("Dataset scripts are no longer supported"),
    TimeoutError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("streams_first", [False, True])
def test_what_the_library_raises_is_one_line(
    hugging_face: DataConfig,
    library: Library,
    error: Exception,
    streams_first: bool,
) -> None:
    def stream() -> Iterator[dict[str, str]]:
        yield {"text": "eins"}
        raise error

    def load_dataset(*args: object, **kwargs: object) -> Iterator[dict[str, str]]:
        if not streams_first:
            raise error
        return stream()

    library(load_dataset)
    config = dataclasses.replace(hugging_face, hugging_face_config="tiny")
    documents = text_documents(config)
    if streams_first:
        assert next(documents) == "eins"
    with pytest.raises(DataError) as raised:
        next(documents)
    message = str(raised.value)
    assert message.startswith(
        "data.hugging_face_name='stories', hugging_face_config='tiny', hugging_face_split='train':"
        f" cannot be read: {type(error).__name__}"
    )
    assert str(error).split()[-1:] == message.split()[-1:] or not str(error)
    assert "\n" not in message


def test_rows_that_are_no_records_are_named(hugging_face: DataConfig, library: Library) -> None:
    library(lambda *args, **kwargs: {"train": [], "test": []})
    with pytest.raises(DataError, match=r"row 0: no text in field .*, only str"):
        next(text_documents(hugging_face))


def test_hugging_face_without_the_extra_names_it(
    hugging_face: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[hugging_face\]'"):
        next(text_documents(hugging_face))
