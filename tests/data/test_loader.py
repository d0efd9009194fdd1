"""Threads and processes that build batches ahead."""

import dataclasses
import threading

import numpy as np
import pytest
from absl import flags

from tests.data.contents import arrays, assert_equal, take
from umv2.config import DataConfig
from umv2.data.corpus import Corpus
from umv2.data.documents import InMemoryDocuments
from umv2.data.loader import train_batches
from umv2.data.paths import DataError


def test_closing_stops_the_prefetch_thread(corpus: Corpus, config: DataConfig) -> None:
    before = set(threading.enumerate())
    batches = train_batches(corpus, config, batch_size=4)
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_worker_processes_yield_the_same_stream(corpus: Corpus, config: DataConfig) -> None:
    if not flags.FLAGS.is_parsed():  # grain's workers read flags, which main has parsed
        flags.FLAGS.mark_as_parsed()
    with_workers = dataclasses.replace(config, num_workers=2, prefetch_batches=3)
    batches = take(corpus, with_workers, 5, start_step=3)
    assert_equal(batches, take(corpus, config, 5, start_step=3))
    assert all(isinstance(array, np.ndarray) for array in arrays(batches[0]))


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
