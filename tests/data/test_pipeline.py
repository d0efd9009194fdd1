import dataclasses
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_run import logged
from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Corpus, Identity, load_corpus
from umv2.data.documents import Documents, InMemoryDocuments
from umv2.data.loader import held_out_batches, train_batches
from umv2.data.paths import DataError
from umv2.data.prepare import prepare
from umv2.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from umv2.types import Batch

type MakeCorpus = Callable[[Sequence[Sequence[int]]], Corpus]

END = 0
THREE_DOCUMENTS = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture
def corpus(make_corpus: MakeCorpus) -> Corpus:
    """Twelve documents of 1 to 12 tokens, 90 targets in all."""
    return make_corpus([[10 * n + i for i in range(n)] for n in range(1, 13)])


def take(corpus: Corpus, config: DataConfig, count: int, **kwargs: Any) -> list[Batch]:
    with_defaults: dict[str, Any] = {"batch_size": 4} | kwargs
    batches = train_batches(corpus, config, **with_defaults)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def arrays(batch: Batch) -> list[np.ndarray]:
    return [np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)]


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        for x, y in zip(arrays(a), arrays(b), strict=True):
            np.testing.assert_array_equal(x, y)


def contents(documents: Documents) -> list[list[int]]:
    return [documents.read(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]


def test_three_documents_packed_by_hand(make_corpus: MakeCorpus, config: DataConfig) -> None:
    (batch,) = held_out_batches(make_corpus(THREE_DOCUMENTS), config, batch_size=3)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0], [6, 0, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.segment_ids[:2].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert [array.dtype for array in arrays(batch)] == [np.int32, np.int32, np.int32, np.float32]


def test_segments_count_documents_unless_attention_crosses_them(
    make_corpus: MakeCorpus, config: DataConfig
) -> None:
    corpus = make_corpus([[1], [2], [3, 4], [5]])
    config = dataclasses.replace(config, sequence_length=9)
    (masked,) = held_out_batches(corpus, config, batch_size=1)
    assert masked.inputs.tolist() == [[0, 1, 0, 2, 0, 3, 4, 0, 5]]
    assert masked.segment_ids.tolist() == [[0, 0, 1, 1, 2, 2, 2, 3, 3]]
    config = dataclasses.replace(config, mask_across_documents=False)
    (crossed,) = held_out_batches(corpus, config, batch_size=1)
    assert crossed.inputs.tolist() == masked.inputs.tolist()
    assert not crossed.segment_ids.any()


def test_an_epoch_predicts_every_token_but_the_tail_once(
    make_corpus: MakeCorpus, config: DataConfig
) -> None:
    corpus = make_corpus(THREE_DOCUMENTS)  # 9 targets: two windows of four, one token dropped
    documents = [[*document, END] for document in THREE_DOCUMENTS]
    orders = {tuple(itertools.chain(*order))[:8] for order in itertools.permutations(documents)}
    seen, first_windows = set(), set()
    for epoch in range(20):
        (batch,) = take(corpus, config, 1, batch_size=2, start_step=epoch)
        assert batch.weights.all()
        for first, second in ((0, 1), (1, 0)):  # the windows are shuffled
            stream = tuple(batch.targets[[first, second]].ravel().tolist())
            if batch.inputs[first, 0] == END and stream in orders:
                assert batch.inputs[second, 0] == batch.targets[first, -1], "one token is shared"
                seen.add(stream)
                first_windows.add(first)
                break
        else:
            pytest.fail(f"not an epoch: {batch.targets.tolist()}")
    assert seen == orders, "20 epochs show all 6 orders of the documents"
    assert first_windows == {0, 1}, "and both orders of the windows"


def test_a_batch_is_not_one_document(make_corpus: MakeCorpus, config: DataConfig) -> None:
    corpus = make_corpus([[number] * 400 for number in range(1, 11)])  # 100 windows each
    (batch,) = take(corpus, config, 1, batch_size=8)
    assert len(set(batch.targets[:, 1].tolist())) > 2


@given(
    token_lists=st.lists(st.lists(st.integers(1, 300), max_size=9), min_size=1, max_size=8),
    sequence_length=st.integers(2, 11),
    batch_size=st.integers(1, 4),
)
def test_held_out_covers_each_token_once(
    token_lists: list[list[int]], sequence_length: int, batch_size: int
) -> None:
    documents = InMemoryDocuments(
        np.array([token for tokens in token_lists for token in tokens], np.uint16),
        np.array([len(tokens) for tokens in token_lists], np.int64),
        np.arange(len(token_lists), dtype=np.uint64),
    )
    identity = Identity(tokenizer="", documents="", held_out="", description={})
    corpus = Corpus(documents, documents, END, None, held_out_texts=None, identity=identity)
    config = DataConfig(
        *("text", (), "text", "uint16", "", "", "", "none", END),
        sequence_length=sequence_length,
        held_out_fraction=0.5,
        long_context=LongContextDataConfig((), 0, 0.25, 1.0, 0, 0),
        mask_across_documents=True,
        num_workers=0,
        prefetch_batches=1,
        seed=0,
    )
    batches = list(held_out_batches(corpus, config, batch_size=batch_size))
    assert {batch.inputs.shape for batch in batches} == {(batch_size, sequence_length)}
    counted = [batch.targets[batch.weights == 1].tolist() for batch in batches]
    expected = [token for tokens in token_lists for token in [*tokens, END]]
    assert [token for tokens in counted for token in tokens] == expected
    assert all(set(np.unique(batch.weights)) <= {0.0, 1.0} for batch in batches)
    inputs = np.concatenate([batch.inputs[batch.weights == 1] for batch in batches])
    assert inputs.tolist() == [END, *expected[:-1]]


def test_resuming_at_a_step_gives_the_uninterrupted_stream(
    corpus: Corpus, config: DataConfig
) -> None:
    whole = take(corpus, config, 30)  # about five epochs
    assert len({batch.inputs.tobytes() for batch in whole}) > 20
    for step in (1, 5, 17):
        assert_equal(take(corpus, config, 30 - step, start_step=step), whole[step:])


@pytest.mark.parametrize(
    "shares", [[range(4)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [[0], [3], [1], [2]]]
)
def test_rows_are_those_of_the_whole_batch(
    corpus: Corpus, config: DataConfig, shares: list[Sequence[int]]
) -> None:
    whole = take(corpus, config, 9, start_step=2)
    assert len({row.tobytes() for row in whole[0].inputs}) == 4, "the rows differ"
    whole_held_out = list(held_out_batches(corpus, config, batch_size=4))
    for rows in shares:
        some = take(corpus, config, 9, start_step=2, rows=rows)
        some_held_out = list(held_out_batches(corpus, config, batch_size=4, rows=rows))
        for batch, expected in zip(some + some_held_out, whole + whole_held_out, strict=True):
            for array, full in zip(arrays(batch), arrays(expected), strict=True):
                np.testing.assert_array_equal(array, full[list(rows)])


def test_another_seed_and_another_epoch_give_another_order(
    corpus: Corpus, config: DataConfig
) -> None:
    rows_per_epoch = 90 // 4
    same, other = (
        take(corpus, dataclasses.replace(config, seed=seed), 2, batch_size=rows_per_epoch)
        for seed in (0, 1)
    )
    orders = [batch.inputs.tobytes() for batch in (*same, *other)]
    assert len(set(orders)) == 4
    assert_equal(same, take(corpus, config, 2, batch_size=rows_per_epoch))


def test_closing_ends_the_prefetching_thread(corpus: Corpus, config: DataConfig) -> None:
    before = set(threading.enumerate())
    batches = train_batches(corpus, config, batch_size=4)
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_worker_processes_give_the_same_stream(corpus: Corpus, config: DataConfig) -> None:
    if not flags.FLAGS.is_parsed():  # grain's workers read flags, which main has parsed
        flags.FLAGS.mark_as_parsed()
    with_workers = dataclasses.replace(config, num_workers=2, prefetch_batches=3)
    taken = take(corpus, with_workers, 5, start_step=3)
    assert_equal(taken, take(corpus, config, 5, start_step=3))
    assert all(isinstance(array, np.ndarray) for array in arrays(taken[0]))


def test_a_damaged_document_stops_the_stream_with_its_error(
    corpus: Corpus, config: DataConfig
) -> None:
    class Damaged(InMemoryDocuments):
        def read(self, index: int, start: int, stop: int) -> np.ndarray:
            raise DataError("shard 3 is gone")

    damaged = Damaged(np.zeros(9, np.uint8), np.array([9]), np.zeros(1, np.uint64))
    batches = train_batches(dataclasses.replace(corpus, train=damaged), config, batch_size=1)
    with pytest.raises(DataError, match="shard 3 is gone"):
        next(batches)
    batches.close()


def text_config(config: DataConfig, folder: Path) -> DataConfig:
    return dataclasses.replace(config, paths=(f"{folder}/*.txt",))


def test_the_split_keeps_copies_together_and_leaks_nothing(
    config: DataConfig, text_folder: Path
) -> None:
    texts = {path.read_text(encoding="utf-8") for path in text_folder.iterdir()}
    for path in list(text_folder.iterdir()):
        (text_folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    corpus = load_corpus(text_config(config, text_folder), ByteTokenizer(), vocab_size=257)
    decode = ByteTokenizer().decode
    train, held_out = (
        [decode(tokens) for tokens in contents(side)] for side in (corpus.train, corpus.held_out)
    )
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == texts
    assert len(train) + len(held_out) == 2 * len(texts)
    assert min(len(train), len(held_out)) > 10


def test_held_out_text_and_its_bytes(config: DataConfig, text_folder: Path) -> None:
    corpus = load_corpus(text_config(config, text_folder), ByteTokenizer(), vocab_size=300)
    text = corpus.held_out_text()
    assert "世界".encode() in text
    assert corpus.held_out_bytes == len(text) == corpus.held_out.lengths.sum()
    tokens_only = dataclasses.replace(corpus, held_out_texts=None)
    assert tokens_only.held_out_bytes == len(text)
    assert tokens_only.held_out_text() == text


def test_the_same_text_is_held_out_under_any_tokenizer(
    config: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    config = text_config(config, text_folder)
    train_bpe((path.read_text() for path in text_folder.iterdir()), 300, tmp_path / "bpe.json")
    bpe = load_tokenizer(str(tmp_path / "bpe.json"))
    by_bytes = load_corpus(config, ByteTokenizer(), vocab_size=300)
    by_bpe = load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "cache")
    assert by_bpe.held_out.lengths.sum() < by_bytes.held_out.lengths.sum()
    assert by_bpe.held_out_text() == by_bytes.held_out_text()
    tokens_only = dataclasses.replace(by_bpe, held_out_texts=None)
    assert tokens_only.held_out_bytes == by_bytes.held_out_bytes
    assert tokens_only.held_out_text() == by_bytes.held_out_text()


def test_text_is_tokenized_once(
    config: DataConfig, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(config, text_folder)
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
    """Ways to spoil a file of cached tokens."""
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


def test_a_damaged_cache_is_only_a_warning(
    config: DataConfig, text_folder: Path, bpe: Tokenizer, tmp_path: Path
) -> None:
    config, cache = text_config(config, text_folder), tmp_path / "cache"
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


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    config: DataConfig,
    text_folder: Path,
    bpe: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = text_config(config, text_folder)
    (tmp_path / "file").touch()
    with logged() as messages:
        load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "file")
    assert any("tokens are not kept for the next run: " in message for message in messages)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with logged() as messages:
        load_corpus(config, bpe, vocab_size=300, cache_dir=tmp_path / "cache")
    assert any("No space left on device" in message for message in messages)
    assert not list((tmp_path / "cache").iterdir())


def test_a_user_without_a_home_has_no_cache(
    config: DataConfig, text_folder: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    load_corpus(text_config(config, text_folder), bpe, vocab_size=300)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64, 2**200])
def test_seeds_have_any_size(corpus: Corpus, config: DataConfig, seed: int) -> None:
    config = dataclasses.replace(config, seed=seed)
    first, second = (take(corpus, config, 3) for _ in range(2))
    assert_equal(first, second)


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
        ({"held_out_fraction": 1 - 1e-9}, "leaves nothing of 40 documents for training"),
        ({"sequence_length": 100_000}, "sequence_length=100000: .* hold only .* less than one"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_refused(
    config: DataConfig, text_folder: Path, changes: dict, message: str
) -> None:
    config = dataclasses.replace(text_config(config, text_folder), **changes)
    with pytest.raises(DataError, match=message):
        load_corpus(config, ByteTokenizer(), vocab_size=257)


def test_a_vocabulary_that_does_not_fit_is_refused(config: DataConfig, text_folder: Path) -> None:
    config = text_config(config, text_folder)
    with pytest.raises(DataError, match=r"its 257 ids do not fit model\.vocab_size=256"):
        load_corpus(config, ByteTokenizer(), vocab_size=256)
    with pytest.raises(DataError, match="source 'text' needs a tokenizer"):
        load_corpus(dataclasses.replace(config, end_of_text_id=0), None, vocab_size=10)
    with pytest.raises(DataError, match=r"end_of_text_id=10: must lie in \[0, model.vocab_size=10"):
        load_corpus(dataclasses.replace(config, end_of_text_id=10), None, vocab_size=10)


def test_the_identity_of_a_corpus_is_its_content(
    config: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    config = text_config(config, text_folder)

    def identity(**changes: Any) -> Identity:
        changed = dataclasses.replace(config, **changes)
        return load_corpus(changed, ByteTokenizer(), vocab_size=257).identity

    first = identity()
    assert json.loads(json.dumps(dataclasses.asdict(first))) == dataclasses.asdict(first)
    # Written down once: the same on every machine.
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


def test_shards_without_a_tokenizer_know_theirs(
    config: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    config = text_config(config, text_folder)
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
