"""What an entry of the registry says of its source."""

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
    """A source of text, which the configured tokenizer turns into tokens.

    The content of the documents identifies it: the same text from another place is the same corpus.

    Attributes:
      name: the value of `data.source`.
      documents: yields the text of each document, always in the same order, and raises DataError
        for what cannot be read; empty documents are skipped.
      files: returns the files that the text is read from, by name, so that `prepare` notices when
        one changes; a source that reads none leaves it out.
      rule: what the source asks of the other fields of the configuration.
    """

    name: str
    documents: Callable[[DataConfig], Iterator[str]]
    files: Callable[[DataConfig], dict[str, Path]] = _no_files
    rule: SourceRule = dataclasses.field(default_factory=SourceRule)


class Vocabulary(NamedTuple):
    """The token ids that a run can take.

    Attributes:
      size: `model.vocab_size`; every id lies below.
      end_of_text_id: the id that ends a document.
      tokenizer: fingerprint of the configured tokenizer; "" where there is none.
    """

    size: int
    end_of_text_id: int
    tokenizer: str


class OpenedTokens(NamedTuple):
    """Documents of a token source, and the fingerprint of the tokenizer that made them or ""."""

    documents: Documents
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A source of tokens, which stay on disk.

    The `content_hashes` of its documents identify it.

    Attributes:
      name: the value of `data.source`.
      open: indexes the documents and checks them against the vocabulary; raises DataError for what
        cannot be trained on.
      rule: what the source asks of the other fields of the configuration.
    """

    name: str
    open: Callable[[DataConfig, Vocabulary], OpenedTokens]
    rule: SourceRule = dataclasses.field(default_factory=lambda: SourceRule("tokens"))


type Source = TextSource | TokenSource
