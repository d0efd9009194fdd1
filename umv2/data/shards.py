"""Token documents in ArrayRecord shards: the format of the records and of the manifest."""

import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int32, Int64, Integer, UInt64

from umv2 import files
from umv2.config.schema import first_names
from umv2.data.documents import UnitWeights
from umv2.data.hashing import HASH_BYTES, hash_of_all
from umv2.data.paths import DataError
from umv2.data.token_files import little_endian, map_files, unknown_id

MANIFEST_NAME = "tokens.json"

_SCAN_RECORDS = 1 << 10


@dataclasses.dataclass(frozen=True)
class ShardManifest:
    """The manifest `tokens.json` in a folder of ArrayRecord token shards.

    A record is one document: the 8-byte content hash of its UTF-8 text, so that the side of the
    split does not depend on the tokenizer, then its tokens as little-endian `dtype`.
    """

    dtype: str
    vocab_size: int
    end_of_text_id: int
    tokenizer_fingerprint: str
    # The source of the text and the shard size; only a job with the same values may resume.
    origin: dict[str, Any]
    # 0 until all shards are written.
    num_shards: int
    num_documents: int
    # Older versions did not write the fields below.
    num_tokens: int = 0
    # Size and modification time, in ns, of every text file.
    sources: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    # Content hash of the documents of every shard.
    shards: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "ShardManifest":
        """Reads the manifest of a folder of shards.

        Raises:
          DataError: it is missing or damaged.
        """
        path = folder / MANIFEST_NAME
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            for name, hint in typing.get_type_hints(cls).items():
                expected = typing.get_origin(hint) or hint
                if not isinstance(getattr(manifest, name), expected):
                    raise TypeError(f"{name} is not of type {expected.__name__}")
            if manifest.dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype={manifest.dtype!r}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: token shards need this file, which prepare writes: {error}"
            ) from error
        return manifest

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        files.write_text(folder / MANIFEST_NAME, text)

    def shard_names(self) -> list[str]:
        """Returns the names of all shards, in order."""
        return [shard_name(number) for number in range(self.num_shards)]


def shard_name(number: int) -> str:
    """Returns the file name of one shard."""
    return f"shard-{number:05d}.array_record"


def encode_record(tokens: Integer[np.ndarray, "tokens"], text_hash: int, dtype: str) -> bytes:
    """Returns the record of one document (see `ShardManifest`)."""
    return text_hash.to_bytes(HASH_BYTES, "little") + tokens.astype(little_endian(dtype)).tobytes()


class ArrayRecordDocuments(UnitWeights):
    """Documents of ArrayRecord token shards, as `prepare` writes them.

    Opening reads each shard once to check it; the index takes 16 bytes of memory per document. The
    paths may be a subset of the shards of a folder, as long as the folder is complete.

    Raises:
      DataError: a shard is damaged, unfinished, missing from its folder or from another folder; the
        shards were made with different tokenizers or not with the given one; or a token id is >=
        `vocab_size`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        end_of_text_id: int,
        vocab_size: int,
        tokenizer_fingerprint: str | None,
    ) -> None:
        """Indexes and checks the shards; without a fingerprint, accepts any single tokenizer."""
        manifests = {}
        for folder in sorted({path.parent for path in paths}):
            manifests[folder] = ShardManifest.read(folder)
            _require_match(folder, manifests[folder], end_of_text_id, tokenizer_fingerprint)
            names = [path.name for path in paths if path.parent == folder]
            _require_all_shards(folder, manifests[folder], names)
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
            lengths, hashes = scan_shard(path, self._dtype, vocab_size)
            _require_own_documents(path, manifests[path.parent], hashes)
            return lengths, hashes

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


def _require_all_shards(folder: Path, manifest: ShardManifest, named: Sequence[str]) -> None:
    """Checks that `data.paths` names shards of the folder only, and that the folder is complete."""
    path, expected = folder / MANIFEST_NAME, manifest.shard_names()
    if foreign := sorted(set(named) - set(expected)):
        raise DataError(f"{path}: {first_names(foreign)}: not among its {len(expected)} shards")
    if missing := [name for name in expected if not (folder / name).exists()]:
        verb = "is" if len(missing) == 1 else "are"
        raise DataError(f"{path}: of {len(expected)} shards, {first_names(missing)} {verb} missing")
    if len(named) < len(expected):
        logging.info("%s: data.paths names %d of %d shards", folder, len(named), len(expected))


def _require_own_documents(
    path: Path, manifest: ShardManifest, hashes: UInt64[np.ndarray, "n"]
) -> None:
    if manifest.shards and hash_of_all(hashes) != manifest.shards.get(path.name):
        raise DataError(
            f"{path}: its documents are not those that {MANIFEST_NAME} in this folder records: the"
            " shard belongs to another folder; run prepare again"
        )


def scan_shard(
    path: Path, dtype: np.dtype, vocab_size: int
) -> tuple[Int64[np.ndarray, "n"], UInt64[np.ndarray, "n"]]:
    """Returns the length and content hash of each document, and checks its tokens.

    Raises:
      DataError: the shard is damaged or unfinished, or a token id is >= `vocab_size`.
    """
    lengths, hashes = [], []
    try:
        # The library reports a file that cannot be opened like a damaged one, so open it first.
        path.open("rb").close()
        reader = ArrayRecordReader(str(path))
        # For a truncated file, the reader raises no exception but is not ok.
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
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {files.reason(error)}") from error
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return np.array(lengths, np.int64), np.array(hashes, np.uint64)
