"""Tokenizes text into ArrayRecord shards, in parallel; also trains a tokenizer."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt64
from tqdm import tqdm

from umv2 import files
from umv2.config import DataConfig
from umv2.config.schema import UserError, differing_fields, first_names
from umv2.data.hashing import content_hashes, hash_of_all
from umv2.data.paths import DataError
from umv2.data.shards import (
    MANIFEST_NAME,
    ShardManifest,
    encode_record,
    scan_shard,
    shard_name,
)
from umv2.data.sources import resolve, source_files, text_documents
from umv2.data.split import training_texts
from umv2.data.token_files import little_endian
from umv2.data.tokenizers import Tokenizer, load_tokenizer, train_bpe

_SHARD_BYTES = 64 << 20
_LOCK_NAME = ".lock"
# Fields that determine the text, in addition to those that its source requires. Every manifest
# records them, whatever the source, and `prepare` rejects a folder whose manifest differs.
_ORIGIN_FIELDS = (
    "source",
    "paths",
    "text_field",
    "hugging_face_name",
    "hugging_face_config",
    "hugging_face_split",
)

Job = tuple[Path, list[bytes], UInt64[np.ndarray, "n"]]  # a shard to write, its texts, their hashes


@dataclasses.dataclass
class _Progress:
    """The shards written so far, by this run or an earlier one."""

    num_documents: int = 0
    num_tokens: int = 0
    shards: dict[str, str] = dataclasses.field(default_factory=dict)


def prepare(
    config: DataConfig, output_dir: Path, *, num_processes: int, shard_bytes: int = _SHARD_BYTES
) -> ShardManifest:
    """Tokenizes a text source into ArrayRecord shards that `data.source="array_record"` reads.

    A shard holds at least `shard_bytes` of text and is written atomically, so after an interruption
    the same call reads the text again but tokenizes only the missing shards. The folder cannot be
    trained on until all shards are written. A complete folder is left unchanged; if the text files
    have changed since, their documents are compared with those of the shards.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the text cannot be read, or the folder belongs to another job or other text.
      files.FileError: a file cannot be written, or another process uses the folder.
    """
    tokenizer = _text_tokenizer(config.tokenizer, config.end_of_text_id)
    expected = ShardManifest(
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        origin=_origin(config) | {"shard_bytes": shard_bytes},
        num_shards=0,
        num_documents=0,
        sources={
            name: [status.st_size, status.st_mtime_ns]
            for name, status in ((n, path.stat()) for n, path in source_files(config).items())
        },
    )
    with files.locked(output_dir / _LOCK_NAME, "prepare"):
        manifest = _prepare(config, expected, output_dir, num_processes)
    recipe = {
        "data.source": "array_record",
        "data.paths": f"({json.dumps(f'{output_dir}/*.array_record', ensure_ascii=False)},)",
        "data.tokenizer": config.tokenizer,
        "model.vocab_size": str(manifest.vocab_size),
    }
    if config.end_of_text_id >= 0:
        recipe["data.end_of_text_id"] = str(config.end_of_text_id)
    logging.info("to train on it: %s", shlex.join(f"--config.{k}={v}" for k, v in recipe.items()))
    return manifest


def _origin(config: DataConfig) -> dict[str, Any]:
    """Returns the fields that determine the text, with tuples as lists, as in JSON."""
    names = dict.fromkeys((*_ORIGIN_FIELDS, *resolve(config).rule.needs))
    values = {name: getattr(config, name) for name in names}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in values.items()}


def _prepare(
    config: DataConfig, expected: ShardManifest, folder: Path, num_processes: int
) -> ShardManifest:
    existing = ShardManifest.read(folder) if (folder / MANIFEST_NAME).exists() else None
    changes = ""
    if existing:
        _require_same_job(folder, existing, expected)
        changes = _changes(existing.sources, expected.sources)
        has_all = all((folder / name).exists() for name in existing.shard_names())
        if existing.num_shards and has_all and existing.sources == expected.sources:
            logging.info("%s: already holds all %s", folder, _amount(existing))
            return existing
        if existing.num_shards and changes:
            logging.info("%s: written before %s; reading the text again", folder, changes)
    else:
        expected.write(folder)
    for leftover in folder.glob(".unfinished_*"):  # of a process that was killed
        with files.errors(leftover, "cannot be deleted"):
            leftover.unlink()
    progress = _Progress()
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar:

        def on_written(num_bytes: int, num_tokens: int) -> None:
            progress.num_tokens += num_tokens
            bar.update(num_bytes)

        write = functools.partial(
            _write_shard,
            tokenizer_name=config.tokenizer,
            end_of_text_id=config.end_of_text_id,
            dtype=expected.dtype,
        )
        texts = _group(text_documents(config), expected.origin["shard_bytes"])
        finished = existing if existing and existing.num_shards else None
        jobs = _missing_shards(texts, folder, expected, finished, progress, on_written, changes)
        try:
            _run(write, jobs, num_processes, on_written)
        except KeyboardInterrupt:
            logging.info("%s: finished shards are kept; run the same command to resume", folder)
            raise
    if not progress.shards:
        raise DataError(f"data.source={config.source!r}: holds no text")
    extra = {path.name for path in folder.glob("*.array_record")} - progress.shards.keys()
    if extra:
        raise _other_text(folder / min(extra), changes)
    manifest = dataclasses.replace(
        expected,
        num_shards=len(progress.shards),
        num_documents=progress.num_documents,
        num_tokens=progress.num_tokens,
        shards=progress.shards,
    )
    manifest.write(folder)
    logging.info("%s: holds %s", folder, _amount(manifest))
    return manifest


def train_tokenizer(config: DataConfig, output_path: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE on the training side of a text source and writes it to a file.

    Raises:
      ConfigError: there is no such source, or a field violates its rule.
      DataError: the text cannot be read, or the vocabulary is too small or too large.
      files.FileError: the file cannot be written.
    """
    texts = training_texts(text_documents(config), config.held_out_fraction)
    train_bpe(texts, vocab_size, output_path)


def _amount(manifest: ShardManifest) -> str:
    tokens = f", {manifest.num_tokens:,} tokens" if manifest.num_tokens else ""
    return f"{manifest.num_documents:,} documents{tokens} in {manifest.num_shards:,} shards"


def _require_same_job(folder: Path, existing: ShardManifest, expected: ShardManifest) -> None:
    progress = ("num_shards", "num_documents", "num_tokens", "sources", "shards")
    before, now = (
        {
            name: value
            for name, value in dataclasses.asdict(manifest).items()
            if name not in progress
        }
        for manifest in (existing, expected)
    )
    if differences := differing_fields(before, now):
        raise DataError(
            f"{folder / MANIFEST_NAME}: belongs to another job: {'; '.join(differences)}; choose"
            " another folder or delete this one"
        )


def _changes(before: dict[str, list[int]], now: dict[str, list[int]]) -> str:
    """Describes how the files differ from those of an earlier run; "" if it recorded none."""
    if not before:
        return ""
    changes = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and now[name] != before[name]],
    }
    phrases = [
        f"{len(n)} files were {change} ({first_names(n)})" for change, n in changes.items() if n
    ]
    return ", ".join(phrases).replace("1 files were", "1 file was")


def _other_text(path: Path, changes: str) -> DataError:
    return DataError(
        f"{path}: the text now yields other documents"
        f"{': since then ' + changes if changes else ''}; choose another folder or delete this one"
    )


def _missing_shards(
    groups: Iterable[list[bytes]],
    folder: Path,
    expected: ShardManifest,
    finished: ShardManifest | None,
    progress: _Progress,
    on_written: Callable[[int, int], None],
    changes: str,
) -> Iterator[Job]:
    """Yields the shards that do not exist yet; checks the documents of those that do.

    If the folder was `finished`, the text must yield the same shards as before.
    """
    for number, texts in enumerate(groups):
        path, hashes = folder / shard_name(number), content_hashes(texts)
        progress.shards[path.name] = digest = hash_of_all(hashes)
        progress.num_documents += len(texts)
        if finished and (
            number >= finished.num_shards or finished.shards.get(path.name, digest) != digest
        ):
            raise _other_text(path, changes)
        if path.exists():
            lengths, written = scan_shard(path, little_endian(expected.dtype), expected.vocab_size)
            if not np.array_equal(written, hashes):
                raise _other_text(path, changes)
            on_written(sum(map(len, texts)), int(lengths.sum()))
        else:
            yield path, texts, hashes


def _run(
    write: Callable[..., tuple[int, int]],
    jobs: Iterable[Job],
    num_processes: int,
    on_written: Callable[[int, int], None],
) -> None:
    """Calls `write` for every job, in a process pool if `num_processes` > 1.

    After an error, waits for the shards that are being written; Ctrl-C stops at once.
    """
    if num_processes == 1:
        for job in jobs:
            on_written(*write(*job))
        return
    # A fork would copy the locks of JAX's threads.
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, spawn, initializer=_end_with_parent)
    others = multiprocessing.active_children()
    running: set[Future[tuple[int, int]]] = set()
    try:
        for job in jobs:
            # Two shards in flight per process keep all of them busy and bound the memory for text.
            if len(running) >= 2 * num_processes:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    on_written(*future.result())
            with _interrupts_blocked():
                running.add(executor.submit(write, *job))
        for future in running:
            on_written(*future.result())
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, probably because the machine ran out of memory; finished"
            " shards are kept, run the same command to resume"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in this context ignore Ctrl-C, which a terminal sends to all processes."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_parent() -> None:
    """Makes this worker exit as soon as its parent process dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _group(texts: Iterable[str], shard_bytes: int) -> Iterator[list[bytes]]:
    """Yields groups of consecutive documents, in UTF-8, of at least `shard_bytes` but the last."""
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
    path: Path,
    texts: list[bytes],
    hashes: UInt64[np.ndarray, "n"],
    *,
    tokenizer_name: str,
    end_of_text_id: int,
    dtype: str,
) -> tuple[int, int]:
    """Writes one shard, in a worker process; returns its numbers of text bytes and tokens."""
    tokenizer = _text_tokenizer(tokenizer_name, end_of_text_id)
    num_tokens = 0
    with files.replacing(path) as unfinished:
        try:
            # Records are read one at a time, in any order.
            writer = ArrayRecordWriter(str(unfinished), "group_size:1")
            for text, text_hash in zip(texts, hashes, strict=True):
                tokens = tokenizer.encode(text.decode("utf-8"))
                num_tokens += len(tokens)
                writer.write(encode_record(tokens, int(text_hash), dtype))
            writer.close()
        except RuntimeError as error:  # how the library reports errors of the operating system
            reason = str(error).split(";")[0].removeprefix("write() failed: ")
            raise files.FileError(f"{path}: cannot be written: {reason}") from error
    return sum(map(len, texts)), num_tokens
