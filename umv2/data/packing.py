"""Documents packed into sequences: which tokens stand in which row of which batch.

The documents of an epoch, end-of-text before each, are one stream; a window of it is a row, and its
targets are the tokens one further on. A batch is a function of the step, so that a run that resumes
needs no state of its data.
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
    """Returns how many tokens an epoch predicts: every document and an end-of-text after each."""
    return int(documents.lengths.sum()) + len(documents.lengths)


class PackedBatches:
    """Some rows of every batch, at random: element `n` is the fields of step `n`.

    One pass over the documents in their order; what the last batch has beyond them is padding, of
    weight 0. Fields rather than a `Batch`, so that grain may rebuild them with other leaves on
    their way between processes.
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
        """Without a seed the documents keep their order; `rows` of None are all rows of a batch."""
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
            counted = self._stream.read_weights(epoch, start + 1, start + length + 1)
            weights.append(np.where(start + np.arange(length) < self._num_targets, counted, 0))
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
        """Returns the epoch and the window that row `row`, counted through all batches, shows."""
        return 0, row


class TrainBatches(PackedBatches):
    """Endless and shuffled, after steps of warm-up whose documents keep their order.

    Each epoch has its own order of documents and of windows; the last window, if the documents do
    not fill it, is left out.
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
        """Takes the documents to train on, and those of `data.long_context.warm_up_steps`."""
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
    """One pass spread over the steps of the warm-up: windows are left out, or come twice."""

    def __len__(self) -> int:
        return self._config.long_context.warm_up_steps

    def _window(self, row: int) -> tuple[int, int]:
        return 0, row * self._num_full_windows // (len(self) * self._batch_size)


class _Stream:
    """The documents of each epoch as one stream of tokens.

    Each document has `end_of_text_id` before it; so have all positions after the last document.
    """

    def __init__(self, documents: Documents, end_of_text_id: int, shuffle_seed: int | None) -> None:
        """Without a seed the documents keep their order in every epoch."""
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
        """Returns how much each of these tokens counts in the loss; 1 for end-of-text."""
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
        """Sets what documents hold of the positions from `start` on; the others stay."""
        order, ends = self._layout(epoch)
        stop = start + len(array)
        place = int(np.searchsorted(ends, start, side="right"))
        while place < len(order) and (begin := int(ends[place - 1]) if place else 0) < stop:
            first = begin + 1  # after the end-of-text
            left, right = max(start, first), min(stop, int(ends[place]))
            if left < right:
                array[left - start : right - start] = read(
                    int(order[place]), left - first, right - first
                )
            place += 1

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the documents and the position after each, and keeps the last."""
        current = self._epoch
        if current is None or current[0] != epoch:
            count = len(self._documents.lengths)
            order = (
                np.arange(count)
                if self._shuffle_seed is None
                else np.random.default_rng([self._shuffle_seed, epoch]).permutation(count)
            )
            ends = np.cumsum(self._documents.lengths[order] + 1)
            # One assignment, because threads read the stream.
            self._epoch = current = (epoch, order, ends)
        return current[1:]


def _shuffled(window: int, num_windows: int, seed: int, epoch: int) -> int:
    """Returns the place of a window in a permutation that is drawn from (seed, epoch)."""
    return index_shuffle(
        window, max_index=num_windows - 1, seed=_window_seed(seed, epoch), rounds=_SHUFFLE_ROUNDS
    )


@functools.lru_cache
def _window_seed(seed: int, epoch: int) -> int:
    # Another number than that of the documents, so that the two orders have nothing in common.
    return int(np.random.default_rng([seed, epoch, 1]).integers(2**32))
