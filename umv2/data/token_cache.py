"""A cache of tokenized text on disk, keyed by the content of the text and the tokenizer."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2 import files
from umv2.data.documents import InMemoryDocuments
from umv2.data.hashing import content_hash, content_hashes
from umv2.data.tokenizers import ByteTokenizer, Tokenizer


def default_cache_dir() -> Path | None:
    """Returns this user's cache folder; None for a user without a home folder."""
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "umv2"
    try:
        return Path.home() / ".cache" / "umv2"
    except RuntimeError:
        return None


def tokenize(
    texts: Sequence[bytes], tokenizer: Tokenizer, cache_dir: Path | None
) -> InMemoryDocuments:
    """Tokenizes texts (UTF-8), or reads their tokens from `cache_dir` if they are cached there.

    The byte tokenizer is not cached: bytes are their own tokens. If the cache is damaged or cannot
    be written, logs a warning and tokenizes.
    """
    hashes = content_hashes(texts)
    if isinstance(tokenizer, ByteTokenizer):
        lengths = np.array([len(text) for text in texts], np.int64)
        return InMemoryDocuments(np.frombuffer(b"".join(texts), np.uint8), lengths, hashes)
    key = np.uint64(content_hash(hashes.tobytes() + tokenizer.fingerprint.encode()))
    path = cache_dir / f"tokens-{key:016x}.npz" if cache_dir else None
    if path and (cached := _read(path, key, len(texts), tokenizer.vocab_size)):
        return InMemoryDocuments(*cached, hashes)
    # None shows the bar on a terminal only; True hides it where logging is quiet.
    disable = None if logging.level_info() else True
    bar = tqdm(texts, "tokenizing", unit=" documents", disable=disable)
    encoded = [tokenizer.encode(text.decode()) for text in bar]
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    tokens = np.concatenate(encoded)
    if path:
        _write(path, key, tokens, lengths)
    return InMemoryDocuments(tokens, lengths, hashes)


def _write(path: Path, key: np.uint64, tokens: np.ndarray, lengths: np.ndarray) -> None:
    try:
        with files.replacing(path) as unfinished:
            np.savez(unfinished, key=key, tokens=tokens, lengths=lengths)
    except files.FileError as error:
        logging.warning("tokens are not cached for the next run: %s", error)


def _read(
    path: Path, key: np.uint64, num_documents: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads the tokens and lengths of documents; returns None, with a warning, if damaged."""
    try:
        with np.load(path) as archive:
            tokens, lengths, stored_key = archive["tokens"], archive["lengths"], archive["key"]
    except FileNotFoundError:
        return None
    except Exception as error:  # zip, zlib and the header parser raise anything on a damaged file
        logging.warning("%s: the text is tokenized again: %s", path, error)
        return None
    if not (
        stored_key == key
        and (tokens.dtype, lengths.dtype) == (np.int32, np.int64)
        and tokens.ndim == 1
        and lengths.shape == (num_documents,)
        and lengths.min() >= 0
        and lengths.sum() == len(tokens)
        and (not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size))
    ):
        logging.warning("%s: the text is tokenized again: contents do not match it", path)
        return None
    return tokens, lengths
