"""The documents of a run as token ids, split into those for training and those held out."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2 import distributed, files
from umv2.config import DataConfig
from umv2.data import tasks
from umv2.data.documents import Documents, DocumentSubset, InMemoryDocuments, MemmapDocuments
from umv2.data.packing import PackedStream
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
