"""Content hashes, which identify a corpus and assign each document to a side of the split."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt64

HASH_BYTES = 8


def content_hash(content: bytes) -> int:
    """Returns the 64-bit BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES).digest(), "little")


def content_hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, "n"]:
    """Returns the hash of each document."""
    return np.array([content_hash(content) for content in contents], np.uint64)


def hash_of_all(content_hashes: UInt64[np.ndarray, "n"]) -> str:
    """Returns one hash of the content of many documents, in order."""
    return hashlib.blake2b(content_hashes.astype("<u8").tobytes(), digest_size=16).hexdigest()
