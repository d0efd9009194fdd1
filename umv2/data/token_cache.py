"""Tokens of text, kept on disk by the content of the text and the tokenizer that made them."""

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
    """Returns the folder of this user's cache; None for a user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "umv2"
    try:
        return Path.home() / ".cache" / "umv2"
    except RuntimeError:
        return None


def tokenize(
    texts: Sequence[bytes], tokenizer: Tokenizer, cache_dir: Path | None
) -> InMemoryDocuments:
    """Returns texts, in UTF-8, as tokens: those kept in `cache_dir`, or new ones, kept there.

    Bytes are their own tokens and not kept. A cache that is damaged, or cannot be written, costs a
    warning and the time to tokenize.
    """
    hashes = content_hashes(texts)
    if isinstance(tokenizer, ByteTokenizer):
        lengths = np.array([len(text) for text in texts], np.int64)
        return InMemoryDocuments(np.frombuffer(b"".join(texts), np.uint8), lengths, hashes)
    key = np.uint64(content_hash(hashes.tobytes() + tokenizer.fingerprint.encode()))
    path = cache_dir / f"tokens-{key:016x}.npz" if cache_dir else None
    if path and (kept := _read(path, key, len(texts), tokenizer.vocab_size)):
        return InMemoryDocuments(*kept, hashes)
    # Shown on a terminal (None), and not by processes that are to be quiet.
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
        logging.warning("tokens are not kept for the next run: %s", error)


def _read(
    path: Path, key: np.uint64, num_documents: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Reads tokens and lengths of documents; None, and a warning, for a file that is damaged."""
    try:
        with np.load(path) as kept:
            tokens, lengths, its_key = kept["tokens"], kept["lengths"], kept["key"]
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
