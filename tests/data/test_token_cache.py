"""Text is tokenized once, and the tokens are cached."""

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.contents import contents
from tests.tiny_run import logged
from umv2.config import DataConfig
from umv2.data.corpus import load_corpus
from umv2.data.tokenizers import Tokenizer, load_tokenizer, train_bpe


@pytest.fixture
def config(config: DataConfig, text_folder: Path) -> DataConfig:
    """The section of a corpus of these files."""
    return dataclasses.replace(config, paths=(f"{text_folder}/*.txt",))


def test_text_is_tokenized_once(
    config: DataConfig, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_bpe((path.read_text() for path in text_folder.iterdir()), 300, tmp_path / "bpe.json")
    bpe = load_tokenizer(str(tmp_path / "bpe.json"))
    assert bpe is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = load_corpus(config, bpe, vocab_size=300)
    encoded: list[str] = []
    encode = bpe.encode

    def record(text: str) -> np.ndarray:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(bpe, "encode", record)
    second = load_corpus(config, bpe, vocab_size=300)
    assert not encoded
    assert contents(first.train) == contents(second.train)
    (text_folder / "00.txt").write_text("changed")
    load_corpus(config, bpe, vocab_size=300)
    assert len(encoded) == 40
    assert {path.suffix for path in (tmp_path / "cache" / "umv2").iterdir()} == {".npz"}


@pytest.fixture
def bpe(text_folder: Path, tmp_path: Path) -> Tokenizer:
    train_bpe((path.read_text() for path in text_folder.iterdir()), 300, tmp_path / "bpe.json")
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    assert tokenizer is not None
    return tokenizer


def damages(path: Path) -> dict[str, Callable[[], object]]:
    """Returns ways to damage a file of cached tokens."""
    with np.load(path) as cached:
        arrays = dict(cached)
    content = path.read_bytes()
    beyond, fewer = arrays["tokens"].copy(), arrays["lengths"][:-1]
    beyond[7] = 300
    return {
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "flipped": lambda: path.write_bytes(content[:999] + b"?" + content[1000:]),
        "text": lambda: path.write_text("hello"),
        "one array": lambda: path.write_bytes(arrays["tokens"].tobytes()),
        "no key": lambda: np.savez(path, tokens=arrays["tokens"], lengths=arrays["lengths"]),
        "another's": lambda: np.savez(path, **arrays | {"key": np.uint64(1)}),
        "ids": lambda: np.savez(path, **arrays | {"tokens": beyond}),
        "negative": lambda: np.savez(path, **arrays | {"tokens": -beyond}),
        "floats": lambda: np.savez(path, **arrays | {"tokens": beyond.astype(np.float32)}),
        "fewer": lambda: np.savez(path, **arrays | {"lengths": fewer}),
        "square": lambda: np.savez(path, **arrays | {"tokens": arrays["tokens"][None]}),
    }


def test_a_damaged_cache_only_warns(config: DataConfig, bpe: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = contents(load_corpus(config, bpe, vocab_size=300, cache_dir=cache).train)
    (path,) = cache.iterdir()
    for name, damage in damages(path).items():
        damage()
        with logged() as messages:
            corpus = load_corpus(config, bpe, vocab_size=300, cache_dir=cache)
        assert contents(corpus.train) == expected, name
        assert sum("the text is tokenized again" in message for message in messages) == 1, name
    with logged() as messages:
        load_corpus(config, bpe, vocab_size=300, cache_dir=cache)
    assert not any("again" in message for message in messages), "it was written anew"


def test_a_cache_that_cannot_be_written_only_warns(
    config: DataConfig,
    bpe: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    with logged() as messages:
        load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "file")
    assert any("tokens are not cached for the next run: " in message for message in messages)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with logged() as messages:
        load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "cache")
    assert any("No space left on device" in message for message in messages)
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_home_folder_there_is_no_cache(
    config: DataConfig, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    load_corpus(config, bpe, vocab_size=300)
