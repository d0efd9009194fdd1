"""Hashes of content: they identify a corpus, and put a document on its side of the split."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt64

HASH_BYTES = 8


def content_hash(content: bytes) -> int:
    """Returns the first 64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES).digest(), "little")


def content_hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, "n"]:
    """Returns the hash of each document, which decides the side of the split."""
    return np.array([content_hash(content) for content in contents], np.uint64)


def hash_of_all(content_hashes: UInt64[np.ndarray, "n"]) -> str:
    """Returns one hash of the content of many documents, in their order."""
    return hashlib.blake2b(content_hashes.astype("<u8").tobytes(), digest_size=16).hexdigest()
