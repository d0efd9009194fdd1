"""Sources that read the files of `data.paths`: text or tokens."""

from collections.abc import Iterator
from pathlib import Path

from umv2.config import DataConfig
from umv2.config.data import SOURCE_RULES
from umv2.data.paths import matching_files
from umv2.data.shards import ArrayRecordDocuments
from umv2.data.sources.entry import OpenedTokens, TextSource, TokenSource, Vocabulary
from umv2.data.text_files import file_documents
from umv2.data.token_files import MemmapDocuments


def _text_files(config: DataConfig) -> dict[str, Path]:
    return {str(path): path for path in matching_files(config.paths)}


def _text_documents(config: DataConfig) -> Iterator[str]:
    for path in matching_files(config.paths):
        yield from file_documents(path, config.text_field)


def _array_record(config: DataConfig, vocabulary: Vocabulary) -> OpenedTokens:
    """Opens shards written by `prepare`; without a configured tokenizer, accepts any tokenizer."""
    shards = ArrayRecordDocuments(
        matching_files(config.paths),
        end_of_text_id=vocabulary.end_of_text_id,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.tokenizer or None,
    )
    return OpenedTokens(shards, shards.tokenizer_fingerprint)


def _memmap(config: DataConfig, vocabulary: Vocabulary) -> OpenedTokens:
    """Opens raw token files, which are assumed to come from the configured tokenizer."""
    documents = MemmapDocuments(
        matching_files(config.paths),
        config.memmap_dtype,
        vocabulary.end_of_text_id,
        vocabulary.size,
    )
    return OpenedTokens(documents, vocabulary.tokenizer)


TEXT = TextSource("text", documents=_text_documents, files=_text_files, rule=SOURCE_RULES["text"])
ARRAY_RECORD = TokenSource("array_record", open=_array_record, rule=SOURCE_RULES["array_record"])
MEMMAP = TokenSource("memmap", open=_memmap, rule=SOURCE_RULES["memmap"])
