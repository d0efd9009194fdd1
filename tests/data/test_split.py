import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.data.contents import contents
from tests.tiny_run import logged
from umv2.config import DataConfig
from umv2.data.corpus import load_corpus
from umv2.data.documents import InMemoryDocuments
from umv2.data.hashing import content_hashes
from umv2.data.loader import held_out_batches, train_batches
from umv2.data.paths import DataError
from umv2.data.prepare import prepare
from umv2.data.split import is_held_out, split_texts, split_tokens, training_texts
from umv2.data.tokenizers import ByteTokenizer

PLAY = "".join(f"Speaker {i % 7}:\nLine {i}, grüße an die 世界.\n\n" for i in range(900))


@pytest.fixture
def play(config: DataConfig, tmp_path: Path) -> DataConfig:
    """A corpus of a single file, like the Shakespeare of tutorials."""
    (tmp_path / "input.txt").write_text(PLAY)
    return dataclasses.replace(
        config, paths=(f"{tmp_path}/input.txt",), held_out_fraction=0.1, sequence_length=64
    )


def test_the_split_is_stable_and_close_to_its_fraction() -> None:
    many = content_hashes(str(i).encode() for i in range(10_000))
    held_out = is_held_out(many, 0.2)
    assert abs(held_out.mean() - 0.2) < 0.02
    assert np.all(held_out[is_held_out(many, 0.1)]), "a larger fraction keeps what a smaller holds"


def test_the_end_of_a_single_file_is_held_out(play: DataConfig) -> None:
    with logged() as messages:
        corpus = load_corpus(play, ByteTokenizer(), vocab_size=257)
    assert any(
        "the end of each is held out instead, 10 % in total" in message for message in messages
    )
    (head,), (tail,) = contents(corpus.train), contents(corpus.held_out)
    assert bytes(head + tail).decode() == PLAY, "every token is on one side"
    assert 0.09 < len(tail) / len(head + tail) < 0.11
    assert head[-1] == ord("\n"), "cut between lines"
    assert corpus.held_out_text() == bytes(tail)
    assert corpus.held_out_bytes == len(tail)

    trained = train_batches(corpus, play, batch_size=4)
    steps = 2 * len(head) // (4 * 64)
    seen = {row.tobytes() for batch in itertools.islice(trained, steps) for row in batch.targets}
    trained.close()
    evaluated = {
        row.tobytes() for b in held_out_batches(corpus, play, batch_size=4) for row in b.targets
    }
    assert len(seen) > 300 and len(evaluated) > 40 and not seen & evaluated


def test_a_single_document_is_split_the_same_every_time(play: DataConfig) -> None:
    first, second, resumed = (
        load_corpus(config, ByteTokenizer(), vocab_size=257)
        for config in (play, play, dataclasses.replace(play, seed=5, num_workers=2))
    )
    assert first.identity == second.identity == resumed.identity
    other = dataclasses.replace(play, held_out_fraction=0.2)
    changed = load_corpus(other, ByteTokenizer(), vocab_size=257).identity
    assert changed.documents == first.identity.documents
    assert changed.held_out != first.identity.held_out


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", [PLAY, PLAY.replace("\n", " "), "世" * 5000, "ü\n" * 3000])
def test_documents_are_cut_close_to_the_fraction(text: str, fraction: float) -> None:
    content = text.encode()
    (head, tail), held_out = split_texts([content], np.array([2**63], np.uint64), fraction)
    assert held_out.tolist() == [False, True]
    assert head + tail == content
    assert head.decode() + tail.decode() == text, "no character is cut"
    assert fraction / 1.1 < len(tail) / len(content) < 1.3 * fraction


def test_copies_are_cut_at_the_same_place() -> None:
    contents = [PLAY.encode()] * 2 + [b"short. " * 50]
    texts, held_out = split_texts(contents, np.full(3, 2**63, np.uint64), 0.1)
    assert texts[:2] == texts[2:4]
    assert held_out.tolist() == 3 * [False, True]


def test_a_document_too_short_to_cut_stays_in_training() -> None:
    texts, held_out = split_texts([b"a", b"b" * 100], np.full(2, 2**63, np.uint64), 0.1)
    assert texts == [b"a", b"b" * 90, b"b" * 10]
    assert held_out.tolist() == [False, False, True]


def test_nothing_is_cut_if_documents_can_be_split() -> None:
    texts = [str(i).encode() * 100 for i in range(100)]
    assert split_texts(texts, content_hashes(texts), 0.1)[0] is texts


@pytest.mark.parametrize(
    ("fraction", "message"), [(1e-9, "leaves all of 2 doc"), (1 - 1e-12, "leaves none of 2 doc")]
)
def test_an_empty_side_is_rejected(fraction: float, message: str) -> None:
    texts = [b"one" * 9, b"two" * 9]
    with pytest.raises(DataError, match=message):
        split_texts(texts, content_hashes(texts), fraction)
    tokens = np.arange(20, dtype=np.uint16)
    documents = InMemoryDocuments(tokens, np.array([9, 11]), content_hashes(texts))
    with pytest.raises(DataError, match=message):
        split_tokens(documents, fraction)


def test_the_end_of_tokens_is_held_out(play: DataConfig, tmp_path: Path) -> None:
    prepare(play, tmp_path / "shards", num_processes=1)
    tokens = np.array([*PLAY.encode(), 256], "<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    shards = dataclasses.replace(
        play, source="array_record", paths=(f"{tmp_path}/shards/*.array_record",)
    )
    for config in (
        shards,
        dataclasses.replace(play, source="memmap", paths=(f"{tmp_path}/*.bin",)),
    ):
        corpus = load_corpus(config, ByteTokenizer(), vocab_size=257)
        (head,), (tail,) = contents(corpus.train), contents(corpus.held_out)
        assert head + tail == list(PLAY.encode())
        assert len(tail) == round(0.1 * len(head + tail))
        assert corpus.held_out.read_weights(0, 2, 5).tolist() == [1, 1, 1]
        hashes = (corpus.train.content_hashes[0], corpus.held_out.content_hashes[0])
        assert hashes[0] != hashes[1]


@pytest.mark.parametrize("count", [1, 2, 3, 60])
def test_training_texts_match_the_training_split(count: int) -> None:
    texts = [f"{i} " * 50 for i in range(count)]
    encoded = [text.encode() for text in texts]
    parts, held_out = split_texts(encoded, content_hashes(encoded), 0.1)
    expected = [part.decode() for part, is_out in zip(parts, held_out, strict=True) if not is_out]
    assert list(training_texts(texts, 0.1)) == expected
    assert list(training_texts([], 0.1)) == []
