"""Batches for training and evaluation, prefetched by workers."""

import math
import signal
from collections.abc import Iterator, Sequence

import grain

from umv2.config import DataConfig
from umv2.data.corpus import Corpus
from umv2.data.packing import PackedBatches, TrainBatches
from umv2.types import Batch


class BatchIterator(Iterator[Batch]):
    """Prefetched batches of NumPy arrays.

    Attributes:
      num_batches: number of batches from the first one; practically unlimited in training.
    """

    def __init__(self, batches: PackedBatches, config: DataConfig, start_step: int) -> None:
        """Starts the threads or processes that build batches; `close` stops them."""
        self.num_batches = len(batches) - start_step
        # One thread takes packing off the training loop and keeps the batches in order. More
        # threads would not help, since packing holds the GIL; num_workers adds processes.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch_batches)
        dataset = grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options)
        if config.num_workers:
            dataset = dataset.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=config.num_workers,
                    per_worker_buffer_size=math.ceil(config.prefetch_batches / config.num_workers),
                ),
                worker_init_fn=_ignore_interrupts,
            )
        self._fields = iter(dataset)

    def __next__(self) -> Batch:
        return Batch(**next(self._fields))

    def close(self) -> None:
        """Stops prefetching; the iterator cannot be used afterwards."""
        self._fields.close()


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    """Ignores Ctrl-C, which a terminal sends to all processes: the training process handles it."""
    del worker, num_workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> BatchIterator:
    """Yields `rows` (default: all) of every batch from `start_step` on, forever.

    In a multi-process run, each process takes its `sharding.local_rows`. Worker processes
    (`config.num_workers`) require absl flags to be parsed.
    """
    batches = TrainBatches(
        corpus.train,
        corpus.end_of_text_id,
        config,
        warm_up=corpus.warm_up,
        batch_size=batch_size,
        rows=rows,
    )
    return BatchIterator(batches, config, start_step)


def held_out_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> BatchIterator:
    """Yields `rows` (default: all) of one pass over the held-out documents, in a fixed order.

    Every token, and the end-of-text after each document, is a target of weight 1 exactly once;
    padding of the last batch has weight 0.
    """
    batches = PackedBatches(
        corpus.held_out,
        corpus.end_of_text_id,
        config,
        batch_size=batch_size,
        rows=rows,
    )
    return BatchIterator(batches, config, 0)
