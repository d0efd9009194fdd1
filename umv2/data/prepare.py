"""Tokenizes text into ArrayRecord shards, once, in parallel; trains a tokenizer on it."""

import dataclasses
import functools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from pathlib import Path

from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from umv2.config import DataConfig
from umv2.data.paths import DataError
from umv2.data.shards import MANIFEST_NAME, ShardManifest, encode_record
from umv2.data.sources import content_hashes, text_documents
from umv2.data.split import training_texts
from umv2.data.tokenizers import Tokenizer, load_tokenizer, train_bpe

_SHARD_BYTES = 64 << 20


def prepare(
    config: DataConfig, output_dir: Path, *, num_processes: int, shard_bytes: int = _SHARD_BYTES
) -> ShardManifest:
    """Tokenizes a text source into ArrayRecord shards that `data.source="array_record"` reads.

    A shard is the documents that make up `shard_bytes` of text, written under a temporary name and
    renamed, so that a run that was interrupted reads the text again but tokenizes only what is
    missing. Nothing trains on the folder until every shard is there.

    Raises:
      DataError: for text that cannot be read, or a folder that another job has filled.
    """
    tokenizer = _text_tokenizer(config.tokenizer, config.end_of_text_id)
    manifest = ShardManifest(
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        origin={
            "source": config.source,
            "paths": list(config.paths),
            "text_field": config.text_field,
            "hugging_face_name": config.hugging_face_name,
            "hugging_face_config": config.hugging_face_config,
            "hugging_face_split": config.hugging_face_split,
            "shard_bytes": shard_bytes,
        },
        num_shards=0,
        num_documents=0,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    if (output_dir / MANIFEST_NAME).exists():
        existing = ShardManifest.read(output_dir)
        _require_same_job(output_dir, existing, manifest)
        if existing.num_shards:
            logging.info("%s: already holds all %d shards", output_dir, existing.num_shards)
            return existing
    manifest.write(output_dir)
    write = functools.partial(
        _write_shard,
        tokenizer_name=config.tokenizer,
        end_of_text_id=config.end_of_text_id,
        dtype=manifest.dtype,
    )
    running: set[Future[int]] = set()
    num_shards = num_documents = 0
    bar = tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None)
    with bar, _executor(num_processes) as executor:
        for texts in _group(text_documents(config), shard_bytes):
            path = output_dir / f"shard-{num_shards:05d}.array_record"
            num_shards += 1
            num_documents += len(texts)
            if path.exists():
                _require_same_length(path, len(texts))
                bar.update(sum(map(len, texts)))
                continue
            # Two shards a process in flight keep all busy and bound the text in memory.
            if len(running) >= 2 * num_processes:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                bar.update(sum(future.result() for future in done))
            running.add(executor.submit(write, path, texts))
        for future in running:
            bar.update(future.result())
    if not num_shards:
        raise DataError(f"data.source={config.source!r}: holds no text")
    manifest = dataclasses.replace(manifest, num_shards=num_shards, num_documents=num_documents)
    manifest.write(output_dir)
    return manifest


def train_tokenizer(config: DataConfig, output_path: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE on the training side of a text source and writes it.

    Raises:
      DataError: for text that cannot be read, or a vocabulary too small for the bytes.
    """
    texts = training_texts(text_documents(config), config.held_out_fraction)
    train_bpe(texts, vocab_size, output_path)


def _require_same_job(folder: Path, existing: ShardManifest, wanted: ShardManifest) -> None:
    for field in dataclasses.fields(ShardManifest):
        there, here = getattr(existing, field.name), getattr(wanted, field.name)
        if field.name not in ("num_shards", "num_documents") and there != here:
            raise DataError(
                f"{folder / MANIFEST_NAME}: belongs to another job: {field.name} is {there}, not"
                f" {here}; choose another folder or delete this one"
            )


def _require_same_length(path: Path, num_documents: int) -> None:
    num_records = ArrayRecordReader(str(path)).num_records()
    if num_records != num_documents:
        raise DataError(
            f"{path}: holds {num_records} documents, but the text now gives {num_documents}: it"
            " has changed since; delete the folder and start again"
        )


def _executor(num_processes: int) -> Executor:
    if num_processes == 1:
        return ThreadPoolExecutor(1)
    # A fork would copy the locks of JAX's threads.
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"))


def _group(texts: Iterable[str], shard_bytes: int) -> Iterator[list[bytes]]:
    """Yields consecutive documents that together have at least `shard_bytes`, in UTF-8."""
    group: list[bytes] = []
    num_bytes = 0
    for text in texts:
        group.append(text.encode("utf-8"))
        num_bytes += len(group[-1])
        if num_bytes >= shard_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


@functools.cache
def _text_tokenizer(name: str, end_of_text_id: int) -> Tokenizer:
    tokenizer = load_tokenizer(name, end_of_text_id)
    if tokenizer is None:
        raise DataError("data.tokenizer='none': prepare needs a tokenizer")
    return tokenizer


def _write_shard(
    path: Path, texts: list[bytes], *, tokenizer_name: str, end_of_text_id: int, dtype: str
) -> int:
    """Writes one shard and returns its bytes of text; runs in a worker process."""
    tokenizer = _text_tokenizer(tokenizer_name, end_of_text_id)
    temporary = path.with_name(path.name + ".tmp")
    # Records are read one at a time, in any order.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for text, text_hash in zip(texts, content_hashes(texts), strict=True):
        writer.write(encode_record(tokenizer.encode(text.decode("utf-8")), int(text_hash), dtype))
    writer.close()
    temporary.replace(path)
    return sum(map(len, texts))
