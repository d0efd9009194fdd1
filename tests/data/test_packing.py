"""Which tokens are in which row of which batch."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.contents import MakeCorpus, arrays, assert_equal, take
from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Corpus, Identity
from umv2.data.documents import InMemoryDocuments
from umv2.data.loader import held_out_batches

END = 0
THREE_DOCUMENTS = [[1, 2, 3], [4, 5], [6]]


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


def test_an_epoch_predicts_every_token_once_except_the_tail(
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
                assert batch.inputs[second, 0] == batch.targets[first, -1], "one token is in both"
                seen.add(stream)
                first_windows.add(first)
                break
        else:
            pytest.fail(f"not an epoch: {batch.targets.tolist()}")
    assert seen == orders, "20 epochs show all 6 orders of the documents"
    assert first_windows == {0, 1}, "and both orders of the windows"


def test_a_batch_mixes_documents(make_corpus: MakeCorpus, config: DataConfig) -> None:
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


def test_resuming_at_a_step_continues_the_uninterrupted_stream(
    corpus: Corpus, config: DataConfig
) -> None:
    every = take(corpus, config, 30)  # about five epochs
    assert len({batch.inputs.tobytes() for batch in every}) > 20
    for step in (1, 5, 17):
        assert_equal(take(corpus, config, 30 - step, start_step=step), every[step:])


@pytest.mark.parametrize(
    "shards", [[range(4)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [[0], [3], [1], [2]]]
)
def test_rows_are_those_of_the_global_batch(
    corpus: Corpus, config: DataConfig, shards: list[Sequence[int]]
) -> None:
    every = take(corpus, config, 9, start_step=2)
    assert len({row.tobytes() for row in every[0].inputs}) == 4, "the rows differ"
    all_held_out = list(held_out_batches(corpus, config, batch_size=4))
    for rows in shards:
        some = take(corpus, config, 9, start_step=2, rows=rows)
        some_held_out = list(held_out_batches(corpus, config, batch_size=4, rows=rows))
        for batch, expected in zip(some + some_held_out, every + all_held_out, strict=True):
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


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64, 2**200])
def test_seeds_may_have_any_size(corpus: Corpus, config: DataConfig, seed: int) -> None:
    config = dataclasses.replace(config, seed=seed)
    first, second = (take(corpus, config, 3) for _ in range(2))
    assert_equal(first, second)
