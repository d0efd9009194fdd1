"""The entries of the registry: text sources and token sources."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from umv2.config import DataConfig
from umv2.config.data import SourceRule
from umv2.data.documents import Documents


def _no_files(config: DataConfig) -> dict[str, Path]:
    del config
    return {}


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A source of text, which the configured tokenizer encodes.

    The content of the documents identifies a corpus: the same text from another location is the
    same corpus.

    Attributes:
      name: the value of `data.source`.
      documents: yields the text of each document, always in the same order; raises DataError if a
        document cannot be read. Empty documents are skipped.
      files: returns the files that the text is read from, by name, so that `prepare` notices
        changes; omitted by a source without files.
      rule: requirements on the other fields of the configuration.
    """

    name: str
    documents: Callable[[DataConfig], Iterator[str]]
    files: Callable[[DataConfig], dict[str, Path]] = _no_files
    rule: SourceRule = dataclasses.field(default_factory=SourceRule)


class Vocabulary(NamedTuple):
    """The token ids that a run accepts.

    Attributes:
      size: `model.vocab_size`; every id is smaller.
      end_of_text_id: the id that ends a document.
      tokenizer: fingerprint of the configured tokenizer; "" if there is none.
    """

    size: int
    end_of_text_id: int
    tokenizer: str


class OpenedTokens(NamedTuple):
    """Documents of a token source, and the fingerprint of their tokenizer ("" if unknown)."""

    documents: Documents
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A source of tokens, which stay on disk.

    The `content_hashes` of its documents identify a corpus.

    Attributes:
      name: the value of `data.source`.
      open: indexes the documents and checks them against the vocabulary; raises DataError if they
        cannot be trained on.
      rule: requirements on the other fields of the configuration.
    """

    name: str
    open: Callable[[DataConfig, Vocabulary], OpenedTokens]
    rule: SourceRule = dataclasses.field(default_factory=lambda: SourceRule("tokens"))


type Source = TextSource | TokenSource
