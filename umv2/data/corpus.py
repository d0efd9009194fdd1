"""The documents of a run as token ids, split into training and held-out documents."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from absl import logging
from jaxtyping import Bool, UInt64

from umv2 import distributed
from umv2.config import DataConfig
from umv2.data import sources, tasks, token_cache
from umv2.data.documents import Documents, DocumentSubset
from umv2.data.hashing import content_hashes, hash_of_all
from umv2.data.packing import num_targets
from umv2.data.paths import DataError
from umv2.data.sources import TextSource, TokenSource, Vocabulary
from umv2.data.split import split_texts, split_tokens
from umv2.data.tokenizers import Tokenizer, load_tokenizer

Purpose = Literal["train", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Identity:
    """What identifies a corpus: equal on all machines and independent of its location.

    Attributes:
      tokenizer: fingerprint of the tokenizer that made the tokens; "" if unknown.
      documents: hash of the content of all documents, in order, before the split. Excludes the
        documents of `data.long_context`, which the configuration determines.
      held_out: hash of the content of the held-out documents.
      description: for people: source, numbers of documents and of tokens.
    """

    tokenizer: str
    documents: str
    held_out: str
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token documents of both sides of the split.

    Attributes:
      train: documents to train on, including those of `data.long_context`.
      held_out: documents to evaluate on.
      end_of_text_id: the id that ends a document.
      tokenizer: that made the tokens; None for token files without one.
      held_out_texts: the held-out documents in UTF-8; None if the source holds tokens.
      identity: what identifies the corpus.
      warm_up: documents of the first `data.long_context.warm_up_steps` steps; None without warm-up.
    """

    train: Documents
    held_out: Documents
    end_of_text_id: int
    tokenizer: Tokenizer | None
    held_out_texts: tuple[bytes, ...] | None = dataclasses.field(repr=False)
    identity: Identity
    warm_up: Documents | None = None

    @functools.cached_property
    def held_out_bytes(self) -> int | None:
        """UTF-8 bytes of the held-out text, 0 for end-of-text; None without a tokenizer."""
        if self.held_out_texts is not None:
            return sum(map(len, self.held_out_texts))
        if self.tokenizer is None:
            return None
        sizes = self.tokenizer.token_bytes()
        return sum(int(sizes[tokens].sum()) for tokens in _tokens_of_each(self.held_out))

    def held_out_documents(self) -> tuple[bytes, ...]:
        """Returns the text of the held-out documents, in UTF-8.

        Raises:
          DataError: the source holds tokens and there is no tokenizer.
        """
        if self.held_out_texts is not None:
            return self.held_out_texts
        if self.tokenizer is None:
            raise DataError("data.tokenizer='none': cannot decode tokens without a tokenizer")
        decode = self.tokenizer.decode
        return tuple(decode(tokens).encode() for tokens in _tokens_of_each(self.held_out))

    def held_out_text(self) -> bytes:
        """Returns the concatenated held-out documents, in UTF-8, as input for compressors.

        Raises:
          DataError: the source holds tokens and there is no tokenizer.
        """
        return b"".join(self.held_out_documents())


def _tokens_of_each(documents: Documents) -> Iterator[np.ndarray]:
    for index, length in enumerate(documents.lengths):
        yield documents.read(index, 0, int(length))


def open_corpus(config: DataConfig, vocab_size: int, *, purpose: Purpose = "train") -> Corpus:
    """Loads the configured tokenizer and corpus; an error on one process is raised on all.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the data cannot be trained on.
    """

    def load() -> Corpus:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_text_id)
        return load_corpus(config, tokenizer, vocab_size=vocab_size, purpose=purpose)

    return distributed.on_all_processes(load)


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    cache_dir: Path | None = None,
    purpose: Purpose = "train",
) -> Corpus:
    """Opens, checks and splits the documents of the configured source.

    Text and its tokens are held in memory; use `prepare` if they do not fit. Token files are read
    once to index and check them, and stay on disk.

    Args:
      config: the data section of the configuration.
      tokenizer: of the text, or of the token files; None for token files without one.
      vocab_size: of the model; every token id must be smaller.
      cache_dir: caches the tokens of text by content; None: `~/.cache/umv2`. The byte tokenizer is
        not cached.
      purpose: "evaluate" skips generating the documents of `data.long_context`, which are for
        training: `train` is then just the training side of the source.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the data cannot be trained on.
    """
    source = sources.resolve(config)
    vocabulary = _vocabulary(config, tokenizer, vocab_size)
    match source:
        case TextSource():
            split = _split_text(config, source, tokenizer, cache_dir)
        case TokenSource():
            split = _split_tokens(config, source, vocabulary)
    train: Documents = DocumentSubset(split.documents, np.flatnonzero(~split.is_held_out))
    warm_up: Documents | None = None
    if purpose == "train" and config.long_context.num_documents:
        # `resolve` has checked that tasks are mixed with a text source only.
        assert split.texts is not None
        assert tokenizer is not None
        fillers = [split.texts[i].decode() for i in np.flatnonzero(~split.is_held_out)]
        train = tasks.mixture(config, train, tokenizer, fillers)
        if config.long_context.warm_up_steps:
            warm_up = tasks.warm_up(config, tokenizer)
    corpus = Corpus(
        train=train,
        held_out=DocumentSubset(split.documents, np.flatnonzero(split.is_held_out)),
        end_of_text_id=vocabulary.end_of_text_id,
        tokenizer=tokenizer,
        held_out_texts=split.held_out_texts(),
        identity=split.identity(config.source),
        warm_up=warm_up,
    )
    if num_targets(corpus.train) < config.sequence_length:
        raise DataError(
            f"data.sequence_length={config.sequence_length}: the {len(corpus.train.lengths)}"
            f" training documents have only {num_targets(corpus.train)} tokens, less than one"
            " sequence"
        )
    logging.info(
        "corpus: %d documents (%d tokens) to train, %d (%d tokens) held out",
        len(corpus.train.lengths),
        corpus.train.lengths.sum(),
        len(corpus.held_out.lengths),
        corpus.held_out.lengths.sum(),
    )
    return corpus


@dataclasses.dataclass(frozen=True)
class _Split:
    """The documents of a source, and the side of the split that each is on.

    Attributes:
      documents: of both sides; parts of documents if the split cuts them.
      is_held_out: whether each of `documents` is held out.
      texts: `documents` in UTF-8; None if the source holds tokens.
      content_hashes: of the documents before the split.
      tokenizer: fingerprint of the tokenizer that made the tokens; "" if unknown.
    """

    documents: Documents
    is_held_out: Bool[np.ndarray, "pieces"]
    texts: list[bytes] | None
    content_hashes: UInt64[np.ndarray, "n"]
    tokenizer: str

    def held_out_texts(self) -> tuple[bytes, ...] | None:
        if self.texts is None:
            return None
        return tuple(self.texts[i] for i in np.flatnonzero(self.is_held_out))

    def identity(self, source: str) -> Identity:
        held_out, lengths = self.is_held_out, self.documents.lengths
        return Identity(
            tokenizer=self.tokenizer,
            documents=hash_of_all(self.content_hashes),
            held_out=hash_of_all(self.documents.content_hashes[held_out]),
            description={
                "source": source,
                "documents": len(self.content_hashes),
                "tokens": int(lengths.sum()),
                "held_out_documents": int(held_out.sum()),
                "held_out_tokens": int(lengths[held_out].sum()),
            },
        )


def _vocabulary(config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> Vocabulary:
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer={config.tokenizer!r}: its {tokenizer.vocab_size} ids do not fit"
            f" model.vocab_size={vocab_size}"
        )
    end_of_text_id = config.end_of_text_id if tokenizer is None else tokenizer.end_of_text_id
    if not 0 <= end_of_text_id < vocab_size:
        raise DataError(
            f"data.end_of_text_id={end_of_text_id}: must be in [0, model.vocab_size={vocab_size})"
        )
    return Vocabulary(vocab_size, end_of_text_id, tokenizer.fingerprint if tokenizer else "")


def _split_text(
    config: DataConfig, source: TextSource, tokenizer: Tokenizer | None, cache_dir: Path | None
) -> _Split:
    if source.rule.holds == "stream":
        raise DataError(
            f"data.source={source.name!r} is streamed once: tokenize it with"
            " `python main.py --mode=prepare` first, then train with data.source='array_record'"
        )
    if tokenizer is None:
        raise DataError(f"data.tokenizer='none': source {source.name!r} needs a tokenizer")
    contents = [text.encode() for text in sources.text_documents(config)]
    hashes = content_hashes(contents)
    texts, is_held_out = split_texts(contents, hashes, config.held_out_fraction)
    documents = token_cache.tokenize(texts, tokenizer, cache_dir or token_cache.default_cache_dir())
    return _Split(documents, is_held_out, texts, hashes, tokenizer.fingerprint)


def _split_tokens(config: DataConfig, source: TokenSource, vocabulary: Vocabulary) -> _Split:
    opened = source.open(config, vocabulary)
    documents, is_held_out = split_tokens(opened.documents, config.held_out_fraction)
    hashes = opened.documents.content_hashes
    return _Split(documents, is_held_out, None, hashes, opened.tokenizer)
