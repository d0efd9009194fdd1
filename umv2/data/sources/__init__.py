"""Where documents come from: a registry with one entry for each value of `data.source`.

A source of this package is a module beside this one, its entry below and, so that a mistake in its
fields shows before anything is read, a rule in `umv2.config.data.SOURCE_RULES`. A source of a
program that uses this package is one call of `register`.
"""

from collections.abc import Iterator
from pathlib import Path

from umv2.config import DataConfig, nearest_name
from umv2.config.schema import reject
from umv2.data.hashing import content_hash
from umv2.data.paths import DataError
from umv2.data.sources import hugging_face, local_files, python_files
from umv2.data.sources.entry import OpenedTokens, Source, TextSource, TokenSource, Vocabulary

__all__ = [
    "DataError",
    "OpenedTokens",
    "Source",
    "TextSource",
    "TokenSource",
    "Vocabulary",
    "content_hash",
    "register",
    "resolve",
    "source_files",
    "text_documents",
]

_REGISTRY: dict[str, Source] = {
    source.name: source
    for source in (
        python_files.STANDARD_LIBRARY,
        python_files.SITE_PACKAGES,
        local_files.TEXT,
        local_files.ARRAY_RECORD,
        local_files.MEMMAP,
        hugging_face.HUGGING_FACE,
    )
}


def register(source: Source) -> None:
    """Adds a source, which `data.source` may name from now on.

    Raises:
      ValueError: there is one of this name.
    """
    if source.name in _REGISTRY:
        raise ValueError(f"source {source.name!r} is registered already")
    _REGISTRY[source.name] = source


def resolve(config: DataConfig) -> Source:
    """Returns the entry of the configured source, whose rule the configuration keeps.

    Raises:
      ConfigError: there is no such source, or a field breaks its rule.
    """
    source = _REGISTRY.get(config.source)
    if source is None:
        names = ", ".join(map(repr, _REGISTRY))
        nearest = nearest_name(config.source, _REGISTRY)
        reject("data.source", config.source, f"must be one of {names}{nearest}")
    source.rule.check(config)
    return source


def text_documents(config: DataConfig) -> Iterator[str]:
    """Returns the non-empty documents of the configured source of text, in a fixed order.

    Raises:
      ConfigError: there is no such source, or a field breaks its rule.
      DataError: for text that cannot be read, which may show at any document, or a source of
        tokens.
    """
    return (text for text in _text_source(config).documents(config) if text)


def source_files(config: DataConfig) -> dict[str, Path]:
    """Returns the files of the configured source of text, in order, by name; it may have none.

    Raises:
      ConfigError: there is no such source, or a field breaks its rule.
      DataError: files that must be there are not, or a source of tokens.
    """
    return _text_source(config).files(config)


def _text_source(config: DataConfig) -> TextSource:
    source = resolve(config)
    if not isinstance(source, TextSource):
        raise DataError(f"data.source={config.source!r} holds tokens, not text")
    return source
