"""Memory-mapped raw files of token ids.

Opening a file reads it once to index its documents (length and content hash of each) and to check
every token id before training starts.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer
from tqdm import tqdm

from umv2.data.documents import UnitWeights
from umv2.data.hashing import content_hashes
from umv2.data.paths import DataError, format_of

_SCAN_TOKENS = 1 << 22
_FEWEST_FOR_ENTROPY = 1 << 12
_NPY = b"\x93NUMPY"
# Types of raw token files, widest first: bytes are less likely to fit a wider type by chance.
_TYPE_NAMES = {
    "<u8": "uint64",
    ">u8": "big-endian uint64",
    "<u4": "uint32",
    ">u4": "big-endian uint32",
    "<u2": "uint16",
    ">u2": "big-endian uint16",
}


def little_endian(dtype: str) -> np.dtype:
    """Returns a dtype in little-endian byte order, as token files store it."""
    return np.dtype(dtype).newbyteorder("<")


def unknown_id(tokens: Integer[np.ndarray, "tokens"], vocab_size: int) -> int | None:
    """Returns the position of the first token id >= `vocab_size`; None if there is none."""
    if tokens.size and tokens.max() >= vocab_size:
        return int(np.argmax(tokens >= vocab_size))
    return None


def map_files[T](scan: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Returns `scan(path)` of each file, in order; scans in threads, with a progress bar."""
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(scan, paths), "checking token files", len(paths), disable=None))


class MemmapDocuments(UnitWeights):
    """Documents of raw token files (OLMo, dolma), each terminated by `end_of_text_id`.

    The files are memory-mapped little-endian integers, with or without a .npy header. Opening reads
    each file once to find the documents, hash them (as uint32 tokens) and check the ids; the index
    takes 28 bytes of memory per document.

    Raises:
      DataError: a file is empty, unreadable, not of `dtype` by its header or its values, not a
        multiple of its item size, or without any end-of-text; or a token id is >= `vocab_size`.
    """

    def __init__(
        self, paths: Sequence[Path], dtype: str, end_of_text_id: int, vocab_size: int
    ) -> None:
        """Indexes and checks the files, in parallel."""
        self._paths = paths
        self._dtype = dtype

        def scan(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return _scan_token_file(path, dtype, end_of_text_id, vocab_size)

        scans = map_files(scan, paths)
        self._file = np.repeat(np.arange(len(paths), dtype=np.int32), [len(s[0]) for s in scans])
        self._starts = np.concatenate([starts for starts, _, _ in scans])
        self.lengths = np.concatenate([lengths for _, lengths, _ in scans])
        self.content_hashes = np.concatenate([hashes for _, _, hashes in scans])
        self._open: dict[int, np.ndarray] = {}

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one document."""
        file = int(self._file[index])
        if file not in self._open:
            self._open[file] = _open_token_file(self._paths[file], self._dtype)
        first = self._starts[index]
        return self._open[file][first + start : first + stop].astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the file; each worker process maps it again.
        return self.__dict__ | {"_open": {}}


def _open_token_file(path: Path, dtype: str) -> np.ndarray:
    expected = little_endian(dtype)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        has_header = head.startswith(_NPY)
        mapped = np.memmap(path, np.uint8, "r") if not has_header else _mapped_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not has_header:
        # Magic bytes of two bytes may well be a token.
        if name := format_of(head, min_bytes=3):
            raise DataError(f"{path}: starts like {name}; token files are raw or .npy")
        if mapped.nbytes % expected.itemsize:
            raise DataError(
                f"{path}: truncated at byte offset {mapped.nbytes}: the size is not a multiple of"
                f" the {expected.itemsize} bytes of data.memmap_dtype={dtype!r}"
            )
        return mapped.view(expected)
    if mapped.dtype != expected or mapped.ndim != 1 or not mapped.size:
        raise DataError(
            f"{path}: holds {_TYPE_NAMES.get(mapped.dtype.str, mapped.dtype)} of shape"
            f" {mapped.shape}, not a non-empty 1-D array of data.memmap_dtype={dtype!r}"
        )
    return mapped


def _mapped_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # the header parser raises anything on a damaged file
        raise ValueError(str(error)) from error


def _other_type(tokens: np.ndarray, end_of_text_id: int, vocab_size: int) -> np.dtype | None:
    """Returns another type in which the bytes are valid token ids that include end-of-text."""
    content = tokens[: _SCAN_TOKENS - _SCAN_TOKENS % 8].view(np.uint8)
    for dtype in map(np.dtype, _TYPE_NAMES):
        if dtype != tokens.dtype and tokens.nbytes % dtype.itemsize == 0:
            others = content.view(dtype)
            if unknown_id(others, vocab_size) is None and (others == end_of_text_id).any():
                return dtype
    return None


def _require_type(path: Path, tokens: np.ndarray, end_of_text_id: int, vocab_size: int) -> None:
    """Raises DataError for a raw file whose tokens are almost certainly of another type.

    Two statistics detect that: in real tokens, even and odd positions have the same distribution,
    and low bytes have a higher entropy than high bytes.
    """
    other = _other_type(tokens, end_of_text_id, vocab_size)
    if other is None:
        return
    width = tokens.dtype.itemsize
    if other.itemsize > width:
        # High parts never exceed this. If the tokens really were of the narrow type, high and low
        # parts would be distributed alike, and most low parts would not exceed it either.
        highest = (vocab_size - 1) >> (8 * width)
        rows = tokens[:_SCAN_TOKENS].reshape(-1, other.itemsize // width)
        low = rows[:, 0 if other.byteorder != ">" else -1]
        is_other = len(rows) >= 64 and bool(np.mean(low <= highest) < 0.5)
    else:
        low, high = (tokens[:_SCAN_TOKENS].view(np.uint8)[byte::width] for byte in (0, width - 1))
        is_other = (
            other.itemsize == width
            and len(low) >= _FEWEST_FOR_ENTROPY
            and _entropy(high) > _entropy(low) + 1
        )
    if is_other:
        name = _TYPE_NAMES[other.str]
        raise DataError(
            f"{path}: by its values, the file holds {name} tokens, not data.memmap_dtype="
            f"{_TYPE_NAMES[tokens.dtype.str]!r}"
        )


def _entropy(values: np.ndarray) -> float:
    """Returns the entropy of bytes, in bits."""
    fractions = np.bincount(values) / len(values)
    fractions = fractions[fractions > 0]
    return float(-(fractions * np.log2(fractions)).sum())


def _scan_token_file(
    path: Path, dtype: str, end_of_text_id: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the start, length and hash of each non-empty document."""
    tokens = _open_token_file(path, dtype)
    header_bytes = path.stat().st_size - tokens.nbytes
    if not header_bytes:
        _require_type(path, tokens, end_of_text_id, vocab_size)

    def hint() -> str:
        other = None if header_bytes else _other_type(tokens, end_of_text_id, vocab_size)
        return f"; as {_TYPE_NAMES[other.str]} the ids would fit" if other else ""

    ends = []
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        if (position := unknown_id(chunk, vocab_size)) is not None:
            offset = header_bytes + (start + position) * tokens.itemsize
            raise DataError(
                f"{path}: byte offset {offset} (token {start + position}): token id"
                f" {chunk[position]} is not below vocab_size={vocab_size}{hint()}"
            )
        ends.append(np.flatnonzero(chunk == end_of_text_id) + start)
    boundaries = np.concatenate(ends)
    if not boundaries.size:
        raise DataError(
            f"{path}: no token is end_of_text_id={end_of_text_id}, so its documents cannot be"
            f" separated (data.end_of_text_id){hint()}"
        )
    starts = np.concatenate([[0], boundaries + 1])
    lengths = np.concatenate([boundaries, [len(tokens)]]) - starts
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    hashes = content_hashes(
        tokens[start : start + length].astype("<u4").tobytes()
        for start, length in zip(starts, lengths, strict=True)
    )
    return starts, lengths, hashes
