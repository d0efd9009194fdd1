"""Packs documents into sequences: which tokens are in which row of which batch.

The documents of an epoch, each preceded by end-of-text, form one stream of tokens. A row is a
window of the stream, and its targets are the same window shifted by one token. A batch is a pure
function of the step, so a run resumes without any data state.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float32, Int32

from umv2.config import DataConfig
from umv2.data.documents import Documents

_ENDLESS = 1 << 62
_SHUFFLE_ROUNDS = 4  # of the block cipher behind index_shuffle; what grain itself uses


def num_targets(documents: Documents) -> int:
    """Returns the number of targets of an epoch: all tokens, and an end-of-text per document."""
    return int(documents.lengths.sum()) + len(documents.lengths)


class PackedBatches:
    """Some rows of every batch, with random access: element `n` is the batch of step `n`.

    Makes one pass over the documents in order; the last batch is padded with weight 0. Elements are
    dicts of the fields of a `Batch` and not a `Batch`, because grain replaces the leaves when it
    sends elements between processes.
    """

    def __init__(
        self,
        documents: Documents,
        end_of_text_id: int,
        config: DataConfig,
        *,
        batch_size: int,
        rows: Sequence[int] | None,
        shuffle_seed: int | None = None,
    ) -> None:
        """Initializes the source.

        Args:
          documents: to pack.
          end_of_text_id: the id that precedes each document.
          config: the data section.
          batch_size: rows of a batch, over all processes.
          rows: of each batch to return; None: all.
          shuffle_seed: shuffles the documents; None keeps their order.
        """
        self._stream = _Stream(documents, end_of_text_id, shuffle_seed)
        self._config = config
        self._end_of_text_id = end_of_text_id
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._num_targets = num_targets(documents)
        self._num_full_windows = self._num_targets // config.sequence_length

    def __len__(self) -> int:
        rows = math.ceil(self._num_targets / self._config.sequence_length)
        return math.ceil(rows / self._batch_size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        length = self._config.sequence_length
        windows, weights = [], []
        for row in self._rows:
            epoch, window = self._window(int(step) * self._batch_size + row)
            start = window * length
            windows.append(self._stream.read(epoch, start, start + length + 1))
            window_weights = self._stream.read_weights(epoch, start + 1, start + length + 1)
            is_target = start + np.arange(length) < self._num_targets
            weights.append(np.where(is_target, window_weights, 0))
        tokens = np.stack(windows)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        segment_ids = np.zeros_like(inputs)
        if self._config.mask_across_documents:
            # The end-of-text before a document is its first token.
            segment_ids[:, 1:] = np.cumsum(inputs[:, 1:] == self._end_of_text_id, axis=1)
        return {
            "inputs": inputs,
            "targets": targets,
            "segment_ids": segment_ids,
            "weights": np.stack(weights).astype(np.float32),
        }

    def _window(self, row: int) -> tuple[int, int]:
        """Returns the epoch and the window of row `row`, counted over all batches."""
        return 0, row


class TrainBatches(PackedBatches):
    """Endless shuffled batches, after warm-up steps whose documents keep their order.

    Each epoch shuffles the documents and the windows anew, and drops an incomplete last window.
    """

    def __init__(
        self,
        documents: Documents,
        end_of_text_id: int,
        config: DataConfig,
        *,
        warm_up: Documents | None,
        batch_size: int,
        rows: Sequence[int] | None,
    ) -> None:
        """Like `PackedBatches`; `warm_up`: documents of `data.long_context.warm_up_steps` steps."""
        super().__init__(
            documents,
            end_of_text_id,
            config,
            batch_size=batch_size,
            rows=rows,
            shuffle_seed=config.seed,
        )
        self._warm_up = None
        if warm_up is not None:
            self._warm_up = _WarmUpBatches(
                warm_up, end_of_text_id, config, batch_size=batch_size, rows=rows
            )

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if self._warm_up is None:
            return super().__getitem__(step)
        if step < len(self._warm_up):
            return self._warm_up[step]
        return super().__getitem__(step - len(self._warm_up))

    def _window(self, row: int) -> tuple[int, int]:
        epoch, window = divmod(row, self._num_full_windows)
        return epoch, _shuffled(window, self._num_full_windows, self._config.seed, epoch)


class _WarmUpBatches(PackedBatches):
    """One pass, stretched over the warm-up steps: skips or repeats windows to fit."""

    def __len__(self) -> int:
        return self._config.long_context.warm_up_steps

    def _window(self, row: int) -> tuple[int, int]:
        return 0, row * self._num_full_windows // (len(self) * self._batch_size)


class _Stream:
    """The documents of each epoch as one stream of tokens.

    `end_of_text_id` precedes each document, and fills all positions after the last one.
    """

    def __init__(self, documents: Documents, end_of_text_id: int, shuffle_seed: int | None) -> None:
        """Without a seed, the documents keep their order in every epoch."""
        self._documents = documents
        self._end_of_text_id = end_of_text_id
        self._shuffle_seed = shuffle_seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def read(self, epoch: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns the tokens at positions [start, stop) of an epoch."""
        tokens = np.full(stop - start, self._end_of_text_id, np.int32)
        self._fill(tokens, self._documents.read, epoch, start)
        return tokens

    def read_weights(self, epoch: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens; 1 for end-of-text."""
        weights = np.ones(stop - start, np.float32)
        self._fill(weights, self._documents.read_weights, epoch, start)
        return weights

    def _fill(
        self,
        array: np.ndarray,
        read: Callable[[int, int, int], np.ndarray],
        epoch: int,
        start: int,
    ) -> None:
        """Overwrites the positions of `array`, from `start` on, that belong to documents."""
        order, ends = self._layout(epoch)
        stop = start + len(array)
        index = int(np.searchsorted(ends, start, side="right"))
        while index < len(order) and (begin := int(ends[index - 1]) if index else 0) < stop:
            first = begin + 1  # after the end-of-text
            left, right = max(start, first), min(stop, int(ends[index]))
            if left < right:
                array[left - start : right - start] = read(
                    int(order[index]), left - first, right - first
                )
            index += 1

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the documents and the end position of each; caches one epoch."""
        current = self._epoch
        if current is None or current[0] != epoch:
            count = len(self._documents.lengths)
            order = (
                np.arange(count)
                if self._shuffle_seed is None
                else np.random.default_rng([self._shuffle_seed, epoch]).permutation(count)
            )
            ends = np.cumsum(self._documents.lengths[order] + 1)
            # A single assignment, because several threads read the stream.
            self._epoch = current = (epoch, order, ends)
        return current[1:]


def _shuffled(window: int, num_windows: int, seed: int, epoch: int) -> int:
    """Returns the position of a window in a permutation drawn from (seed, epoch)."""
    return index_shuffle(
        window, max_index=num_windows - 1, seed=_window_seed(seed, epoch), rounds=_SHUFFLE_ROUNDS
    )


@functools.lru_cache
def _window_seed(seed: int, epoch: int) -> int:
    # Differs from the seed of the documents, so that the two permutations are independent.
    return int(np.random.default_rng([seed, epoch, 1]).integers(2**32))
