"""Token documents in ArrayRecord shards: what a record and the manifest beside the shards hold."""

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
from umv2.data.documents import EvenlyWeighted
from umv2.data.hashing import HASH_BYTES, hash_of_all
from umv2.data.paths import DataError
from umv2.data.token_files import little_endian, map_files, unknown_id

MANIFEST_NAME = "tokens.json"

_SCAN_RECORDS = 1 << 10
_NAMES_SHOWN = 3


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
    # What is below is missing where an older version wrote the file.
    num_tokens: int = 0
    # Size and time of the last change, in ns, of every file of text.
    sources: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    # One hash of the content of the documents of every shard.
    shards: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "ShardManifest":
        """Reads the manifest of a folder of shards.

        Raises:
          DataError: when it is missing or damaged.
        """
        path = folder / MANIFEST_NAME
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            for name, hint in typing.get_type_hints(cls).items():
                expected = typing.get_origin(hint) or hint
                if not isinstance(getattr(manifest, name), expected):
                    raise TypeError(f"{name} is no {expected.__name__}")
            if manifest.dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype={manifest.dtype!r}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: token shards need this file, which prepare writes: {error}"
            ) from error
        return manifest

    def write(self, folder: Path) -> None:
        """Writes the manifest at once, so that nobody reads half of it."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        files.write_text(folder / MANIFEST_NAME, text)

    def shard_names(self) -> list[str]:
        """Returns the names of all shards, in order."""
        return [shard_name(number) for number in range(self.num_shards)]


def shard_name(number: int) -> str:
    """Returns the name of the file of one shard."""
    return f"shard-{number:05d}.array_record"


def some(names: Sequence[str]) -> str:
    """Writes the first few of many names."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def encode_record(tokens: Integer[np.ndarray, "tokens"], text_hash: int, dtype: str) -> bytes:
    """Returns the record of one document (see `ShardManifest`)."""
    return text_hash.to_bytes(HASH_BYTES, "little") + tokens.astype(little_endian(dtype)).tobytes()


class ArrayRecordDocuments(EvenlyWeighted):
    """Documents of ArrayRecord token shards, as `prepare` writes them.

    Opening reads each shard once to check it; in memory stay 16 bytes a document.

    Raises:
      DataError: for a damaged or unfinished shard, one that is missing from its folder or does not
        belong there, shards of several tokenizers or of another one, or a token id that is not
        below `vocab_size`. Some shards of a folder, if the others are there, are a smaller corpus.
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
    """Checks that the shards that `data.paths` names are the folder's, and the others are there."""
    path, expected = folder / MANIFEST_NAME, manifest.shard_names()
    if foreign := sorted(set(named) - set(expected)):
        raise DataError(f"{path}: {some(foreign)}: not among its {len(expected)} shards")
    if missing := [name for name in expected if not (folder / name).exists()]:
        verb = "is" if len(missing) == 1 else "are"
        raise DataError(f"{path}: of {len(expected)} shards, {some(missing)} {verb} missing")
    if len(named) < len(expected):
        logging.info("%s: data.paths names %d of %d shards", folder, len(named), len(expected))


def _require_own_documents(
    path: Path, manifest: ShardManifest, hashes: UInt64[np.ndarray, "n"]
) -> None:
    if manifest.shards and hash_of_all(hashes) != manifest.shards.get(path.name):
        raise DataError(
            f"{path}: holds other documents than {MANIFEST_NAME} beside it says: it is of another"
            " folder; run prepare again"
        )


def scan_shard(
    path: Path, dtype: np.dtype, vocab_size: int
) -> tuple[Int64[np.ndarray, "n"], UInt64[np.ndarray, "n"]]:
    """Returns length and content hash of each document, and checks their tokens.

    Raises:
      DataError: for a damaged or unfinished shard, or a token id that is not below `vocab_size`.
    """
    lengths, hashes = [], []
    try:
        # The library says of a file that cannot be opened what it says of a damaged one.
        path.open("rb").close()
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
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {files.reason(error)}") from error
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return np.array(lengths, np.int64), np.array(hashes, np.uint64)
