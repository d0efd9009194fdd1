"""Where documents come from: a registry with one entry per value of `data.source`.

To add a source to this package, write a module in this folder, add its entry below, and add a rule
to `umv2.config.data.SOURCE_RULES`, which checks its configuration fields before any data is read.
A program that uses this package adds a source with `register`.
"""

from collections.abc import Iterator
from pathlib import Path

from umv2.config import DataConfig, nearest_name
from umv2.config.schema import reject
from umv2.data.paths import DataError
from umv2.data.sources import hugging_face, local_files, python_files
from umv2.data.sources.entry import OpenedTokens, Source, TextSource, TokenSource, Vocabulary

__all__ = [
    "OpenedTokens",
    "Source",
    "TextSource",
    "TokenSource",
    "Vocabulary",
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
    """Adds a source to the registry, so that `data.source` can select it by name.

    Raises:
      ValueError: a source of this name exists.
    """
    if source.name in _REGISTRY:
        raise ValueError(f"source {source.name!r} is already registered")
    _REGISTRY[source.name] = source


def resolve(config: DataConfig) -> Source:
    """Returns the entry of the configured source, after checking the configuration against it.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
    """
    source = _REGISTRY.get(config.source)
    if source is None:
        names = ", ".join(map(repr, _REGISTRY))
        nearest = nearest_name(config.source, _REGISTRY)
        reject("data.source", config.source, f"must be one of {names}{nearest}")
    source.rule.check(config)
    return source


def text_documents(config: DataConfig) -> Iterator[str]:
    """Returns the non-empty documents of the configured text source, in a fixed order.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the source holds tokens, or a text cannot be read; the iterator too can raise it.
    """
    return (text for text in _text_source(config).documents(config) if text)


def source_files(config: DataConfig) -> dict[str, Path]:
    """Returns the files of the configured text source by name, in order; there may be none.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the source holds tokens, or required files are missing.
    """
    return _text_source(config).files(config)


def _text_source(config: DataConfig) -> TextSource:
    source = resolve(config)
    if not isinstance(source, TextSource):
        raise DataError(f"data.source={config.source!r} holds tokens, not text")
    return source
