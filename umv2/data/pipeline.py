"""From documents to batches: split, shuffle, pack, and a grain pipeline that prefetches.

An epoch is one stream of tokens: every document once, in an order drawn from (seed, epoch), each
with the end-of-text id before it; one more ends the stream. Cut into windows that share one token,
it gives every token of every document, and the end-of-text after it, as a target exactly once, and
a document sees nothing but an end-of-text before its first token. What does not fill a window at
the end of an epoch is dropped. The windows are shuffled too, because a batch of neighbours would be
a batch of one document. Row `i` of the endless sequence of windows depends on the seed alone, and
row `j` of step `n` is row `n b + j` of them, whichever process loads it: to resume, on any number
of processes, is to start at a step.
"""

import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import logging
from grain.experimental import index_shuffle
from jaxtyping import Float32, Int32
from tqdm import tqdm

from umv2 import distributed, files
from umv2.config import DataConfig
from umv2.data import tasks
from umv2.data.documents import Documents, DocumentSubset, InMemoryDocuments, MemmapDocuments
from umv2.data.paths import DataError, matching_files
from umv2.data.shards import ArrayRecordDocuments
from umv2.data.sources import (
    content_hash,
    content_hashes,
    hash_of_all,
    text_documents,
)
from umv2.data.split import split_texts, split_tokens
from umv2.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from umv2.types import Batch

_ENDLESS = 1 << 62
_SHUFFLE_ROUNDS = 4  # of the block cipher behind index_shuffle; what grain itself uses


@dataclasses.dataclass(frozen=True)
class Identity:
    """What tells a corpus from another one, equal on all machines; never where it lies.

    Attributes:
      tokenizer: fingerprint of the tokenizer that made the tokens; "" where none is known.
      documents: hash of the content of all documents, in order, as they are before the split;
        documents of `data.long_context`, which the configuration determines, do not count.
      held_out: the same of the held-out documents.
      description: what a person knows a corpus by: source, numbers of documents and tokens.
    """

    tokenizer: str
    documents: str
    held_out: str
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token documents of both sides of the split."""

    train: Documents
    held_out: Documents
    end_of_text_id: int
    tokenizer: Tokenizer | None
    # UTF-8; None where the source holds tokens.
    held_out_texts: tuple[bytes, ...] | None = dataclasses.field(repr=False)
    identity: Identity
    warm_up: Documents | None = None  # of the first `data.long_context.warm_up_steps`

    @functools.cached_property
    def held_out_bytes(self) -> int | None:
        """UTF-8 bytes of the held-out text, end-of-text counting none; None without tokenizer."""
        if self.held_out_texts is not None:
            return sum(map(len, self.held_out_texts))
        if self.tokenizer is None:
            return None
        sizes = self.tokenizer.token_bytes()
        return sum(int(sizes[tokens].sum()) for tokens in _whole_documents(self.held_out))

    def held_out_documents(self) -> tuple[bytes, ...]:
        """Returns the text of the held-out documents, in UTF-8.

        Raises:
          DataError: for a source of tokens without a tokenizer.
        """
        if self.held_out_texts is not None:
            return self.held_out_texts
        if self.tokenizer is None:
            raise DataError("data.tokenizer='none': tokens without a tokenizer have no text")
        decode = self.tokenizer.decode
        return tuple(decode(tokens).encode() for tokens in _whole_documents(self.held_out))

    def held_out_text(self) -> bytes:
        """Returns the held-out documents joined, in UTF-8, to compare with compressors.

        Raises:
          DataError: for a source of tokens without a tokenizer.
        """
        return b"".join(self.held_out_documents())


def _whole_documents(documents: Documents) -> Iterator[np.ndarray]:
    for index, length in enumerate(documents.lengths):
        yield documents.read(index, 0, int(length))


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    cache_dir: Path | None = None,
) -> Corpus:
    """Opens, checks and splits the documents of the configured source.

    Text is held in memory, and its tokens too (`prepare` is for more than that); token files are
    read once to index and check them, and stay on disk.

    Args:
      config: the data section of the configuration.
      tokenizer: of the text, or of the token files; None for token files without one.
      vocab_size: of the model; every token id must lie below.
      cache_dir: keeps the tokens of text by content; `~/.cache/umv2` without. Bytes are not kept.

    Raises:
      DataError: for input that cannot be trained on.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer={config.tokenizer!r}: its {tokenizer.vocab_size} ids do not fit"
            f" model.vocab_size={vocab_size}"
        )
    end_of_text_id = config.end_of_text_id if tokenizer is None else tokenizer.end_of_text_id
    if not 0 <= end_of_text_id < vocab_size:
        raise DataError(
            f"data.end_of_text_id={end_of_text_id}: must lie in [0, model.vocab_size={vocab_size})"
        )
    documents: Documents
    texts: list[bytes] | None = None
    fingerprint = tokenizer.fingerprint if tokenizer else ""
    match config.source:
        case "standard_library" | "site_packages" | "text":
            if tokenizer is None:
                raise DataError(
                    f"data.tokenizer='none': source {config.source!r} needs a tokenizer"
                )
            whole = [text.encode() for text in text_documents(config)]
            hashes = content_hashes(whole)
            texts, held_out = split_texts(whole, hashes, config.held_out_fraction)
            documents = _tokenize(texts, tokenizer, cache_dir or _default_cache_dir())
        case "memmap":
            paths = matching_files(config.paths)
            found = MemmapDocuments(paths, config.memmap_dtype, end_of_text_id, vocab_size)
            hashes = found.content_hashes
            documents, held_out = split_tokens(found, config.held_out_fraction)
        case "array_record":
            shards = ArrayRecordDocuments(
                matching_files(config.paths),
                end_of_text_id=end_of_text_id,
                vocab_size=vocab_size,
                tokenizer_fingerprint=fingerprint or None,
            )
            fingerprint, hashes = shards.tokenizer_fingerprint, shards.content_hashes
            documents, held_out = split_tokens(shards, config.held_out_fraction)
        case "hugging_face":
            raise DataError(
                "data.source='hugging_face' is streamed once: tokenize it with"
                " `python main.py --mode=prepare`, then train with data.source='array_record'"
            )
    train: Documents = DocumentSubset(documents, np.flatnonzero(~held_out))
    warm_up: Documents | None = None
    if config.long_context.num_documents:
        assert texts is not None  # the configuration is checked
        assert tokenizer is not None
        told = [texts[i].decode() for i in np.flatnonzero(~held_out)]
        train = tasks.mixture(config, train, tokenizer, told)
        if config.long_context.warm_up_steps:
            warm_up = tasks.warm_up(config, tokenizer)
    corpus = Corpus(
        train=train,
        held_out=DocumentSubset(documents, np.flatnonzero(held_out)),
        end_of_text_id=end_of_text_id,
        tokenizer=tokenizer,
        held_out_texts=None if texts is None else tuple(texts[i] for i in np.flatnonzero(held_out)),
        identity=Identity(
            tokenizer=fingerprint,
            documents=hash_of_all(hashes),
            held_out=hash_of_all(documents.content_hashes[held_out]),
            description={
                "source": config.source,
                "documents": len(hashes),
                "tokens": int(documents.lengths.sum()),
                "held_out_documents": int(held_out.sum()),
                "held_out_tokens": int(documents.lengths[held_out].sum()),
            },
        ),
        warm_up=warm_up,
    )
    stream = PackedStream(corpus.train, end_of_text_id, shuffle_seed=None)
    if stream.num_targets < config.sequence_length:
        raise DataError(
            f"data.sequence_length={config.sequence_length}: the {len(corpus.train.lengths)}"
            f" training documents hold only {stream.num_targets} tokens, less than one sequence"
        )
    logging.info(
        "corpus: %d documents (%d tokens) to train, %d (%d tokens) held out",
        len(corpus.train.lengths),
        corpus.train.lengths.sum(),
        len(corpus.held_out.lengths),
        corpus.held_out.lengths.sum(),
    )
    return corpus


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """Loads the configured tokenizer and corpus; what one process cannot read ends all.

    Raises:
      DataError: for input that cannot be trained on.
    """

    def load() -> Corpus:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_text_id)
        return load_corpus(config, tokenizer, vocab_size=vocab_size)

    return distributed.everywhere(load)


def _default_cache_dir() -> Path | None:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "umv2"
    try:
        return Path.home() / ".cache" / "umv2"
    except RuntimeError:  # a user without a home
        return None


def _tokenize(
    texts: Sequence[bytes], tokenizer: Tokenizer, cache_dir: Path | None
) -> InMemoryDocuments:
    hashes = content_hashes(texts)
    if isinstance(tokenizer, ByteTokenizer):
        lengths = np.array([len(text) for text in texts], np.int64)
        return InMemoryDocuments(np.frombuffer(b"".join(texts), np.uint8), lengths, hashes)
    key = np.uint64(content_hash(hashes.tobytes() + tokenizer.fingerprint.encode()))
    path = cache_dir / f"tokens-{key:016x}.npz" if cache_dir else None
    cached = _cached_tokens(path, key, len(texts), tokenizer.vocab_size) if path else None
    if cached:
        return InMemoryDocuments(*cached, hashes)
    # Shown on a terminal (None), and not by processes that are to be quiet.
    disable = None if logging.level_info() else True
    bar = tqdm(texts, "tokenizing", unit=" documents", disable=disable)
    encoded = [tokenizer.encode(text.decode()) for text in bar]
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    tokens = np.concatenate(encoded)
    if path:
        try:
            with files.replacing(path) as unfinished:
                np.savez(unfinished, key=key, tokens=tokens, lengths=lengths)
        except files.FileError as error:
            logging.warning("tokens are not kept for the next run: %s", error)
    return InMemoryDocuments(tokens, lengths, hashes)


def _cached_tokens(
    path: Path, key: np.uint64, num_documents: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads tokens and lengths of documents; None, and a warning, where the file does not do."""
    try:
        with np.load(path) as cached:
            tokens, lengths, its_key = cached["tokens"], cached["lengths"], cached["key"]
    except FileNotFoundError:
        return None
    except Exception as error:  # of zip, of zlib, of the header's parser: any for a damaged file
        logging.warning("%s: the text is tokenized again: %s", path, error)
        return None
    if not (
        its_key == key
        and (tokens.dtype, lengths.dtype) == (np.int32, np.int64)
        and tokens.ndim == 1
        and lengths.shape == (num_documents,)
        and lengths.min() >= 0
        and lengths.sum() == len(tokens)
        and (not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size))
    ):
        logging.warning("%s: the text is tokenized again: not its tokens", path)
        return None
    return tokens, lengths


class PackedStream:
    """The documents of one epoch as one stream of tokens.

    Each document has `end_of_text_id` before it; so have all positions after the last document.
    """

    def __init__(self, documents: Documents, end_of_text_id: int, shuffle_seed: int | None) -> None:
        """Without a seed the documents keep their order in every epoch."""
        self.num_targets = int(documents.lengths.sum()) + len(documents.lengths)
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
        """Reads what documents say of the positions from `start` on; the others stay."""
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
        """Order of the documents and the position after each; kept for the current epoch."""
        current = self._epoch
        if current is None or current[0] != epoch:
            count = len(self._documents.lengths)
            order = (
                np.arange(count)
                if self._shuffle_seed is None
                else np.random.default_rng([self._shuffle_seed, epoch]).permutation(count)
            )
            ends = np.cumsum(self._documents.lengths[order] + 1)
            # One assignment, because threads share the stream.
            self._epoch = current = (epoch, order, ends)
        return current[1:]


class PackedBatches:
    """Random access to some rows of every batch: element `n` is the fields of step `n`.

    Here one pass over the documents in their order, the rest of the last batch without weight.
    Fields rather than a `Batch`, so that grain may rebuild them with other leaves on their way
    between processes.
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
        self._stream = PackedStream(documents, end_of_text_id, shuffle_seed)
        self._config = config
        self._end_of_text_id = end_of_text_id
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows

    def __len__(self) -> int:
        rows = math.ceil(self._stream.num_targets / self._config.sequence_length)
        return math.ceil(rows / self._batch_size)

    @property
    def _num_whole_windows(self) -> int:
        return self._stream.num_targets // self._config.sequence_length

    def _window(self, row: int) -> tuple[int, int]:
        """Returns the epoch and the window that row `row`, counted through all batches, shows."""
        return 0, row

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        length = self._config.sequence_length
        num_targets = self._stream.num_targets
        windows, weights = [], []
        for row_of_batch in self._rows:
            epoch, window = self._window(int(step) * self._batch_size + row_of_batch)
            start = window * length
            windows.append(self._stream.read(epoch, start, start + length + 1))
            counted = self._stream.read_weights(epoch, start + 1, start + length + 1)
            weights.append(np.where(start + np.arange(length) < num_targets, counted, 0))
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


class TrainBatches(PackedBatches):
    """Endless and shuffled, after steps of warm-up whose documents keep their order."""

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        *,
        batch_size: int,
        rows: Sequence[int] | None,
    ) -> None:
        super().__init__(
            corpus.train,
            corpus.end_of_text_id,
            config,
            batch_size=batch_size,
            rows=rows,
            shuffle_seed=config.seed,
        )
        self._warm_up = None
        if corpus.warm_up is not None:
            self._warm_up = WarmUpBatches(
                corpus.warm_up, corpus.end_of_text_id, config, batch_size=batch_size, rows=rows
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
        epoch, window = divmod(row, self._num_whole_windows)
        return epoch, _shuffled(window, self._num_whole_windows, self._config.seed, epoch)


class WarmUpBatches(PackedBatches):
    """One pass spread over the steps of the warm-up: windows are left out, or come twice."""

    def __len__(self) -> int:
        return self._config.long_context.warm_up_steps

    def _window(self, row: int) -> tuple[int, int]:
        return 0, row * self._num_whole_windows // (len(self) * self._batch_size)


class BatchIterator(Iterator[Batch]):
    """Batches in numpy arrays, built ahead of need; `close()` ends the threads or processes."""

    def __init__(self, batches: PackedBatches, config: DataConfig, start_step: int) -> None:
        self.num_batches = len(batches) - start_step
        # One thread: it keeps batches in order of need and off the training loop, and packing holds
        # the interpreter lock for most of its time. num_workers adds processes.
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
    """Leaves Ctrl-C, which a terminal sends to all processes, to the one that trains."""
    del worker, num_workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shuffled(window: int, num_windows: int, seed: int, epoch: int) -> int:
    """Returns the place of a window in a permutation that is drawn from (seed, epoch)."""
    return index_shuffle(
        window, max_index=num_windows - 1, seed=_window_seed(seed, epoch), rounds=_SHUFFLE_ROUNDS
    )


@functools.lru_cache
def _window_seed(seed: int, epoch: int) -> int:
    # Another number than PackedStream's, so that the two orders have nothing in common.
    return int(np.random.default_rng([seed, epoch, 1]).integers(2**32))


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> BatchIterator:
    """Yields `rows`, by default all, of every batch from `start_step` on, without end.

    Processes that divide a batch each take their `parallel.local_rows`. Worker processes
    (`config.num_workers`) need absl's flags to be parsed.
    """
    batches = TrainBatches(corpus, config, batch_size=batch_size, rows=rows)
    return BatchIterator(batches, config, start_step)


def held_out_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> BatchIterator:
    """Yields `rows`, by default all, of one pass over the held-out documents, in a fixed order.

    Every token, and the end-of-text after each document, is a target of weight 1 exactly once; the
    rest of the last batch has weight 0.
    """
    batches = PackedBatches(
        corpus.held_out,
        corpus.end_of_text_id,
        config,
        batch_size=batch_size,
        rows=rows,
    )
    return BatchIterator(batches, config, 0)
