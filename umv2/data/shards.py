"""Token documents in ArrayRecord shards: what a record and the manifest beside the shards hold."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int32, Integer

from umv2.data.documents import EvenlyWeighted, little_endian, map_files, unknown_id
from umv2.data.paths import DataError
from umv2.data.sources import HASH_BYTES

MANIFEST_NAME = "tokens.json"

_SCAN_RECORDS = 1 << 10


@dataclasses.dataclass(frozen=True)
class ShardManifest:
    """What the file `tokens.json` beside ArrayRecord token shards says of them.

    A record is one document: 8 bytes, the content hash of its UTF-8 text, so that a text stays on
    its side of the split however it is tokenized; then its tokens, little-endian, `dtype` each.
    """

    dtype: str
    vocab_size: int
    end_of_text_id: int
    tokenizer_fingerprint: str
    # Where the text came from and how it was cut into shards, so that only the same job resumes.
    origin: dict[str, Any]
    # 0 until every shard is written.
    num_shards: int
    num_documents: int

    @classmethod
    def read(cls, folder: Path) -> "ShardManifest":
        """Reads the manifest of a folder of shards.

        Raises:
          DataError: when it is missing or damaged.
        """
        path = folder / MANIFEST_NAME
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: token shards need this file, which prepare writes: {error}"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes the manifest in one move, so that it is never seen half-written."""
        temporary = folder / f"{MANIFEST_NAME}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        temporary.replace(folder / MANIFEST_NAME)


def encode_record(tokens: Integer[np.ndarray, "tokens"], text_hash: int, dtype: str) -> bytes:
    """Returns the record of one document (see `ShardManifest`)."""
    return text_hash.to_bytes(HASH_BYTES, "little") + tokens.astype(little_endian(dtype)).tobytes()


class ArrayRecordDocuments(EvenlyWeighted):
    """Documents of ArrayRecord token shards, as `prepare` writes them.

    Opening reads each shard once to check it; in memory stay 16 bytes a document.

    Raises:
      DataError: for a damaged or unfinished shard, shards of several tokenizers or of another one,
        or a token id that is not below `vocab_size`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        end_of_text_id: int,
        vocab_size: int,
        tokenizer_fingerprint: str | None,
    ) -> None:
        """Indexes and checks the shards; without a fingerprint any one tokenizer is accepted."""
        manifests = {}
        for folder in sorted({path.parent for path in paths}):
            manifests[folder] = ShardManifest.read(folder)
            _require_match(folder, manifests[folder], end_of_text_id, tokenizer_fingerprint)
        (first, manifest), *others = manifests.items()
        for folder, other in others:
            if other.tokenizer_fingerprint != manifest.tokenizer_fingerprint:
                raise DataError(
                    f"data.paths: the shards of {first} and {folder} were made with different"
                    " tokenizers"
                )
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self._dtype = little_endian(manifest.dtype)

        def scan(path: Path) -> tuple[np.ndarray, np.ndarray]:
            return _scan_shard(path, self._dtype, vocab_size)

        scans = map_files(scan, paths)
        self.lengths = np.concatenate([lengths for lengths, _ in scans])
        self.content_hashes = np.concatenate([hashes for _, hashes in scans])
        self._records = ArrayRecordDataSource([str(path) for path in paths])

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one document."""
        record = self._records[index]
        return np.frombuffer(record, self._dtype, offset=HASH_BYTES)[start:stop].astype(np.int32)


def _require_match(
    folder: Path, manifest: ShardManifest, end_of_text_id: int, fingerprint: str | None
) -> None:
    path = folder / MANIFEST_NAME
    if not manifest.num_shards:
        raise DataError(f"{path}: prepare has not finished these shards; run it again to resume")
    if manifest.end_of_text_id != end_of_text_id:
        raise DataError(
            f"{path}: end_of_text_id={manifest.end_of_text_id}, but the configuration has"
            f" {end_of_text_id}"
        )
    if fingerprint not in (None, manifest.tokenizer_fingerprint):
        raise DataError(f"{path}: the shards were made with another tokenizer than data.tokenizer")


def _scan_shard(path: Path, dtype: np.dtype, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns length and hash of each record."""
    lengths, hashes = [], []
    try:
        reader = ArrayRecordReader(str(path))
        # A file cut short is not reported by an exception but by a reader that is not ok.
        if not reader.ok() or not reader.num_records():
            raise DataError(f"{path}: truncated, empty or not an ArrayRecord file")
        for first in range(0, reader.num_records(), _SCAN_RECORDS):
            last = min(first + _SCAN_RECORDS, reader.num_records())
            for number, record in enumerate(reader.read(first, last), start=first):
                num_bytes = len(record) - HASH_BYTES
                if num_bytes < 0 or num_bytes % dtype.itemsize:
                    raise DataError(f"{path}: record {number}: truncated at byte {len(record)}")
                tokens = np.frombuffer(record, dtype, offset=HASH_BYTES)
                if (position := unknown_id(tokens, vocab_size)) is not None:
                    raise DataError(
                        f"{path}: record {number}, token {position}: token id {tokens[position]}"
                        f" is not below vocab_size={vocab_size}"
                    )
                lengths.append(tokens.size)
                hashes.append(int.from_bytes(record[:HASH_BYTES], "little"))
        reader.close()
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return np.array(lengths, np.int64), np.array(hashes, np.uint64)
