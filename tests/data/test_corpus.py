"""Documents of both splits, and the identity of a corpus."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.contents import contents, take
from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Identity, load_corpus
from umv2.data.paths import DataError
from umv2.data.prepare import prepare
from umv2.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe


@pytest.fixture
def config(config: DataConfig, text_folder: Path) -> DataConfig:
    """The section of a corpus of these files."""
    return dataclasses.replace(config, paths=(f"{text_folder}/*.txt",))


def test_the_split_keeps_copies_together_and_leaks_nothing(
    config: DataConfig, text_folder: Path
) -> None:
    texts = {path.read_text(encoding="utf-8") for path in text_folder.iterdir()}
    for path in list(text_folder.iterdir()):
        (text_folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    corpus = load_corpus(config, ByteTokenizer(), vocab_size=257)
    decode = ByteTokenizer().decode
    train, held_out = (
        [decode(tokens) for tokens in contents(side)] for side in (corpus.train, corpus.held_out)
    )
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == texts
    assert len(train) + len(held_out) == 2 * len(texts)
    assert min(len(train), len(held_out)) > 10


def test_held_out_text_and_its_bytes(config: DataConfig) -> None:
    corpus = load_corpus(config, ByteTokenizer(), vocab_size=300)
    text = corpus.held_out_text()
    assert "世界".encode() in text
    assert corpus.held_out_bytes == len(text) == corpus.held_out.lengths.sum()
    tokens_only = dataclasses.replace(corpus, held_out_texts=None)
    assert tokens_only.held_out_bytes == len(text)
    assert tokens_only.held_out_text() == text


def test_the_same_text_is_held_out_under_any_tokenizer(
    config: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    train_bpe((path.read_text() for path in text_folder.iterdir()), 300, tmp_path / "bpe.json")
    bpe = load_tokenizer(str(tmp_path / "bpe.json"))
    by_bytes = load_corpus(config, ByteTokenizer(), vocab_size=300)
    by_bpe = load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "cache")
    assert by_bpe.held_out.lengths.sum() < by_bytes.held_out.lengths.sum()
    assert by_bpe.held_out_text() == by_bytes.held_out_text()
    tokens_only = dataclasses.replace(by_bpe, held_out_texts=None)
    assert tokens_only.held_out_bytes == by_bytes.held_out_bytes
    assert tokens_only.held_out_text() == by_bytes.held_out_text()


def test_the_default_corpus_loads(config: DataConfig) -> None:
    standard = dataclasses.replace(
        config, source="standard_library", held_out_fraction=0.05, sequence_length=256
    )
    corpus = load_corpus(standard, ByteTokenizer(), vocab_size=257)
    assert corpus.held_out_bytes is not None
    assert 0.01 < corpus.held_out_bytes / corpus.train.lengths.sum() < 0.1
    (batch,) = take(corpus, standard, 1)
    assert batch.inputs.shape == (4, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hugging_face", "hugging_face_name": "x"}, "--mode=prepare"),
        ({"held_out_fraction": 1e-9}, "held_out_fraction=1e-09: leaves all of 40 documents"),
        ({"held_out_fraction": 1 - 1e-9}, "leaves none of 40 documents for training"),
        ({"sequence_length": 100_000}, "sequence_length=100000: .* have only .* less than one"),
    ],
)
def test_an_unusable_corpus_is_rejected(
    config: DataConfig, changes: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(config, **changes)
    with pytest.raises(DataError, match=message):
        load_corpus(config, ByteTokenizer(), vocab_size=257)


def test_a_vocabulary_that_does_not_fit_is_rejected(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"its 257 ids do not fit model\.vocab_size=256"):
        load_corpus(config, ByteTokenizer(), vocab_size=256)
    with pytest.raises(DataError, match="source 'text' needs a tokenizer"):
        load_corpus(dataclasses.replace(config, end_of_text_id=0), None, vocab_size=10)
    with pytest.raises(DataError, match=r"end_of_text_id=10: must be in \[0, model.vocab_size=10"):
        load_corpus(dataclasses.replace(config, end_of_text_id=10), None, vocab_size=10)


def test_the_identity_of_a_corpus_is_its_content(
    config: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    def identity(**changes: Any) -> Identity:
        changed = dataclasses.replace(config, **changes)
        return load_corpus(changed, ByteTokenizer(), vocab_size=257).identity

    first = identity()
    assert json.loads(json.dumps(dataclasses.asdict(first))) == dataclasses.asdict(first)
    # Recorded once: the same on every machine.
    assert first == Identity(
        tokenizer="bytes",
        documents="e0ca30cc527ed27a8dfd35d07ec20119",
        held_out="89fff159e7a0fd5017619d2b96e74223",
        description={
            "source": "text",
            "documents": 40,
            "tokens": 3145,
            "held_out_documents": 23,
            "held_out_tokens": 1755,
        },
    )
    shutil.copytree(text_folder, tmp_path / "elsewhere")
    assert identity(paths=(f"{tmp_path}/elsewhere/*",), seed=7, sequence_length=8) == first
    tasks = LongContextDataConfig(("key_value",), 3, 0.25, 1.0, 0, 0)
    assert identity(sequence_length=64, long_context=tasks) == first
    another_split = identity(held_out_fraction=0.1)
    assert another_split.documents == first.documents
    assert another_split.held_out != first.held_out
    (text_folder / "40.txt").write_text("one more")
    assert identity().documents != first.documents


def test_shards_without_a_configured_tokenizer_use_their_own(
    config: DataConfig, tmp_path: Path
) -> None:
    text = load_corpus(config, ByteTokenizer(), vocab_size=257).identity
    prepare(config, tmp_path / "shards", num_processes=1)
    config = dataclasses.replace(
        config,
        source="array_record",
        paths=(f"{tmp_path}/shards/*.array_record",),
        tokenizer="none",
        end_of_text_id=256,
    )
    tokens = load_corpus(config, None, vocab_size=257).identity
    assert dataclasses.replace(tokens, description=text.description) == text
