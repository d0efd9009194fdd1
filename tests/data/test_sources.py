import dataclasses
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from umv2.config import ConfigError, DataConfig, LongContextDataConfig
from umv2.config.data import SOURCE_RULES, SourceRule
from umv2.data import sources
from umv2.data.corpus import load_corpus, open_corpus
from umv2.data.documents import InMemoryDocuments
from umv2.data.hashing import content_hashes
from umv2.data.loader import held_out_batches, train_batches
from umv2.data.paths import DataError
from umv2.data.prepare import prepare, train_tokenizer
from umv2.data.sources import (
    OpenedTokens,
    TextSource,
    TokenSource,
    Vocabulary,
    resolve,
    text_documents,
)
from umv2.data.tokenizers import ByteTokenizer

type Library = Callable[[Callable[..., object]], None]

# The recipe for a data source in docs/extending.md, verbatim.
RECIPE = '''\
from collections.abc import Iterator

from umv2.config import DataConfig
from umv2.config.data import SourceRule
from umv2.data import sources


def count_aloud(config: DataConfig) -> Iterator[str]:
    """Yields the numbers up to that in data.text_field, a document each, ten times over."""
    for number in range(int(config.text_field)):
        yield f"{number}, " * 10


sources.register(
    sources.TextSource(
        "counting",
        documents=count_aloud,
        rule=SourceRule("text", needs={"text_field": "the number to count to"}),
    )
)
'''


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the registry after the test."""
    monkeypatch.setattr(sources, "_REGISTRY", dict(sources._REGISTRY))


@pytest.fixture
def counting(config: DataConfig) -> DataConfig:
    exec(compile(RECIPE, "docs/extending", "exec", dont_inherit=True), {})
    return dataclasses.replace(config, source="counting", text_field="40", sequence_length=16)


def test_registering_adds_a_source(counting: DataConfig, tmp_path: Path) -> None:
    counting.validate()
    corpus = open_corpus(counting, vocab_size=257)
    assert corpus.identity.description["source"] == "counting"
    assert corpus.identity.description["documents"] == 40
    training = train_batches(corpus, counting, batch_size=4)
    assert "7, 7, 7" in ByteTokenizer().decode(
        np.concatenate([next(training).inputs.ravel() for _ in range(40)])
    )
    training.close()
    held_out = list(held_out_batches(corpus, counting, batch_size=4))
    weight = sum(int(batch.weights.sum()) for batch in held_out)
    assert weight == corpus.held_out.lengths.sum() + len(corpus.held_out.lengths)

    manifest = prepare(counting, tmp_path / "shards", num_processes=1)
    assert (manifest.num_documents, manifest.origin["source"]) == (40, "counting")
    shards = dataclasses.replace(
        counting, source="array_record", paths=(f"{tmp_path}/shards/*.array_record",)
    )
    assert open_corpus(shards, 257).identity.documents == corpus.identity.documents
    train_tokenizer(counting, tmp_path / "bpe.json", 260)


def test_documents_of_tasks_mix_with_a_registered_text(counting: DataConfig) -> None:
    tasks = LongContextDataConfig(("key_value",), 4, 0.25, 1.0, 0, 0)
    mixed = dataclasses.replace(counting, long_context=tasks, sequence_length=128)
    train = open_corpus(mixed, 257).train
    assert ":" in ByteTokenizer().decode(train.read(0, 0, int(train.lengths[0])))


def test_the_rule_of_a_registered_source_is_checked_before_it_is_read(counting: DataConfig) -> None:
    changed = dataclasses.replace(counting, text_field="")
    expected = "data.text_field='': source 'counting' needs the number to count to"
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        open_corpus(changed, 257)
    with pytest.raises(ConfigError, match=r"^data.tokenizer='none': only token files \("):
        open_corpus(dataclasses.replace(counting, tokenizer="none", end_of_text_id=256), 257)


def test_registering_adds_a_source_of_tokens(config: DataConfig) -> None:
    def open_squares(config: DataConfig, vocabulary: Vocabulary) -> OpenedTokens:
        lengths = np.arange(1, 41)
        tokens = np.arange(lengths.sum()) ** 2 % (vocabulary.size - 1)
        hashes = content_hashes(part.tobytes() for part in np.split(tokens, lengths.cumsum()[:-1]))
        return OpenedTokens(InMemoryDocuments(tokens, lengths, hashes), vocabulary.tokenizer)

    sources.register(TokenSource("squares", open=open_squares))
    squares = dataclasses.replace(config, source="squares", tokenizer="none", end_of_text_id=99)
    corpus = open_corpus(squares, 100)
    assert (corpus.identity.tokenizer, corpus.held_out_bytes) == ("", None)
    assert len(corpus.train.lengths) + len(corpus.held_out.lengths) == 40
    tasks = LongContextDataConfig(("key_value",), 4, 0.25, 1.0, 0, 0)
    with pytest.raises(
        ConfigError, match="needs a text source to mix documents into, which 'squares' is"
    ):
        open_corpus(dataclasses.replace(squares, long_context=tasks), 100)
    with pytest.raises(DataError, match="'squares' holds tokens, not text"):
        text_documents(squares)


def test_shards_record_the_fields_that_their_source_needs(
    config: DataConfig, tmp_path: Path
) -> None:
    rule = SourceRule("stream", needs={"memmap_dtype": "a type"})
    sources.register(TextSource("feed", documents=lambda config: iter(["one"]), rule=rule))
    feed = dataclasses.replace(config, source="feed")
    prepare(feed, tmp_path, num_processes=1)
    other = dataclasses.replace(feed, memmap_dtype="uint32")
    with pytest.raises(DataError, match=r"another job: origin\.memmap_dtype: 'uint16' -> 'uint32'"):
        prepare(other, tmp_path, num_processes=1)


def test_a_streaming_source_can_only_be_prepared(config: DataConfig) -> None:
    sources.register(
        TextSource("feed", documents=lambda config: iter(["one"]), rule=SourceRule("stream"))
    )
    feed = dataclasses.replace(config, source="feed")
    assert list(text_documents(feed)) == ["one"]
    with pytest.raises(DataError, match=r"^data.source='feed' is streamed once: .*mode=prepare"):
        load_corpus(feed, ByteTokenizer(), vocab_size=257)


def test_a_misspelt_source_is_named_with_the_nearest_one(
    config: DataConfig, tmp_path: Path
) -> None:
    misspelt = dataclasses.replace(config, source="aray_record")
    expected = (
        "data.source='aray_record': must be one of 'standard_library', 'site_packages', 'text',"
        " 'array_record', 'memmap', 'hugging_face' (nearest: array_record)"
    )
    for work in (
        lambda: open_corpus(misspelt, 257),
        lambda: prepare(misspelt, tmp_path / "shards", num_processes=1),
        lambda: train_tokenizer(misspelt, tmp_path / "bpe.json", 300),
    ):
        with pytest.raises(ConfigError) as caught:
            work()
        assert str(caught.value) == expected
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_name_can_be_registered_only_once() -> None:
    with pytest.raises(ValueError, match="'text' is already registered"):
        sources.register(TextSource("text", documents=lambda config: iter(())))


@pytest.mark.parametrize("name", SOURCE_RULES)
def test_the_rule_of_a_source_is_checked_with_the_configuration(
    config: DataConfig, name: str
) -> None:
    """Mistakes are reported when the configuration is read, which loads no source."""
    filled = dataclasses.replace(config, source=name, paths=("a",), hugging_face_name="a")
    source = resolve(filled)
    assert (source.name, source.rule) == (name, SOURCE_RULES[name])
    assert isinstance(source, TokenSource) == (source.rule.holds == "tokens")


def test_every_built_in_source_has_a_rule() -> None:
    assert sources._REGISTRY.keys() == SOURCE_RULES.keys()


def test_standard_library_has_a_fixed_order_and_skips_tests(config: DataConfig) -> None:
    standard = dataclasses.replace(config, source="standard_library")
    documents = list(text_documents(standard))
    assert documents == list(text_documents(standard))
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):
        assert (root / name).read_text(encoding="utf-8") in documents
    assert documents.index((root / "argparse.py").read_text(encoding="utf-8")) < documents.index(
        (root / "json/decoder.py").read_text(encoding="utf-8")
    )
    assert not any(sys.prefix in document for document in documents), "a path of this machine"
    assert 5e6 < sum(map(len, documents)) < 20e6


def test_standard_library_skips_parts_that_distributions_package_separately(
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


def test_installed_sources_are_deduplicated(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages contain copies of each other's files, and both kinds of site folder may coincide."""
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
    assert sum(map(len, documents)) > 20e6  # JAX and its dependencies
    assert Path(pytest.__file__).read_text(encoding="utf-8") in documents


def test_token_sources_have_no_text(config: DataConfig) -> None:
    with pytest.raises(DataError, match="'memmap' holds tokens"):
        list(text_documents(dataclasses.replace(config, source="memmap", paths=("a",))))


def test_text_has_the_documents_of_all_files(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "two"}) + "\n")
    paths = (f"{tmp_path}/*.txt", f"{tmp_path}/*")
    text = dataclasses.replace(config, paths=paths, text_field="body")
    assert list(text_documents(text)) == ["two", "one"]


def test_python_sources_strip_byte_order_marks_and_skip_non_files(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to("nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for source in ("standard_library", "site_packages"):
        assert list(text_documents(dataclasses.replace(config, source=source))) == ["x = 1\n"]


def test_content_hashes_are_stable() -> None:
    eins, zwei = 10896600607207707157, 1606067403276999281
    # Recorded once: another hash would move documents across the split of a resumed run.
    assert content_hashes([b"eins", b"zwei", b"eins"]).tolist() == [eins, zwei, eins]


@pytest.fixture
def hugging_face(config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, source="hugging_face", hugging_face_name="stories")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Replaces Hugging Face's `load_dataset`."""

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


class DatasetLibraryError(Exception):
    """The library's exceptions share no base class."""


ERRORS = [
    DatasetLibraryError("Dataset 'stories' doesn't exist on the Hub\nor cannot be accessed."),
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
def test_errors_of_the_library_are_one_line(
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


def test_rows_that_are_not_records_are_named(hugging_face: DataConfig, library: Library) -> None:
    library(lambda *args, **kwargs: {"train": [], "test": []})
    with pytest.raises(DataError, match=r"row 0: no text in field .*, only str"):
        next(text_documents(hugging_face))


def test_hugging_face_without_its_extra_names_the_extra(
    hugging_face: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[hugging_face\]'"):
        next(text_documents(hugging_face))
