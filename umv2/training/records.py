"""Metric records of a run: metrics.jsonl, TensorBoard and Weights & Biases."""

import contextlib
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from absl import logging

from umv2 import files
from umv2.config import Config, ConfigError, to_dict

METRICS_FILE = "metrics.jsonl"

Record = Mapping[str, int | float]


class MetricWriter:
    """Writes records to metrics.jsonl and, as configured, to TensorBoard and Weights & Biases.

    Only the first process writes. A run that resumes after `first_step` drops the records of later
    steps, so that each curve is continuous. If the disk is full, lines for metrics.jsonl are
    buffered and written later.

    Raises:
      ConfigError: train.wandb_project is set, but wandb is not installed or cannot start.
      FileError: the files cannot be created.
    """

    def __init__(self, workdir: Path, config: Config, *, first_step: int):
        self._sinks: list[Callable[[int, Record], None]] = []
        self._open = contextlib.ExitStack()
        if jax.process_index() != 0:
            return
        files.make_folder(workdir)
        with contextlib.ExitStack() as stack:  # closes open sinks if a later one fails
            stack.callback(self._open.close)
            self._add_json_lines(workdir / METRICS_FILE, first_step)
            if config.train.tensorboard:
                self._add_tensorboard(workdir / "tensorboard", first_step)
            if config.train.wandb_project:
                self._add_wandb(workdir, config)
            stack.pop_all()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, step: int, record: Record) -> None:
        """Writes the metrics after `step` steps."""
        for sink in self._sinks:
            sink(step, record)

    def _add_json_lines(self, path: Path, first_step: int) -> None:
        """Adds a sink that writes one JSON object per line: step, wall_time (Unix), and the record.

        Non-finite numbers become null, since JSON has no NaN or infinity.
        """
        _drop_later_records(path, first_step)
        lines = _Appender(path)
        self._open.callback(lines.close)

        def write(step: int, record: Record) -> None:
            line = {"step": step, "wall_time": time.time(), **files.json_value(record)}
            lines.write(json.dumps(line, allow_nan=False) + "\n")

        self._sinks.append(write)

    def _add_tensorboard(self, folder: Path, first_step: int) -> None:
        # TensorBoard's writer thread dies if the disk is full; a bounded queue would then block
        # training.
        with files.errors(folder):
            writer = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1, max_queue=0)
        self._open.enter_context(_tensorboard_may_fail(folder))
        self._open.callback(writer.close)

        def write(step: int, record: Record) -> None:
            for key, value in record.items():
                writer.add_scalar(key, value, step)

        self._sinks.append(write)

    def _add_wandb(self, workdir: Path, config: Config) -> None:
        project = config.train.wandb_project
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"train.wandb_project={project!r}: needs the extra 'wandb' (pip install -e"
                " '.[wandb]')"
            ) from error
        # Keep the run's id across restarts, so that they extend the same curves.
        id_file = workdir / "wandb_run_id"
        if not id_file.exists():
            files.write_text(id_file, uuid.uuid4().hex)
        try:
            run = wandb.init(
                project=project,
                name=workdir.name,
                id=id_file.read_text(),
                resume="allow",
                dir=str(workdir),
                config=to_dict(config),
            )
        except Exception as error:  # no API key, no network, no access to the project
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"train.wandb_project={project!r}: wandb cannot start: {reason}"
            ) from error
        self._open.callback(run.finish)
        self._sinks.append(lambda step, record: run.log(dict(record), step=step))


class _Appender:
    """Appends lines to a file, buffering those that cannot be written until the next write."""

    def __init__(self, path: Path):
        self._path, self._pending, self._warned = path, b"", False
        with files.errors(path):
            self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                logging.warning(
                    "%s: cannot be written: %s; records are buffered in memory",
                    self._path,
                    files.reason(error),
                )
            self._warned = True
            return
        self._warned = False

    def close(self) -> None:
        if self._pending:
            self.write("")
        if self._pending:
            logging.warning(
                "%s: the last %d records are lost", self._path, self._pending.count(b"\n")
            )
        self._file.close()


@contextlib.contextmanager
def _tensorboard_may_fail(folder: Path) -> Iterator[None]:
    """Turns errors of TensorBoard's writer thread and of closing it into one-line warnings."""

    def warn(error: BaseException | None) -> None:
        why = files.reason(error) if isinstance(error, OSError) else error
        logging.warning("%s: cannot be written: %s; see metrics.jsonl instead", folder, why)

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__.startswith("tensorboardX"):
            warn(args.exc_value)
        else:
            previous(args)

    previous, threading.excepthook = threading.excepthook, hook
    try:
        yield
    except OSError as error:
        warn(error)
    finally:
        threading.excepthook = previous


def _drop_later_records(path: Path, last_step: int) -> None:
    """Drops records after `last_step`, and lines that a killed writer left incomplete."""
    if not path.exists():
        return
    with files.replacing(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(line for line in old if _step(line) <= last_step)


def has_evaluation(workdir: Path, step: int) -> bool:
    """Returns whether a run has recorded its evaluation after `step` steps."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return False
    with files.errors(path, "cannot be read"), path.open("rb") as lines:
        return any(b'"held_out_loss"' in line and _step(line) == step for line in lines)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line of metrics.jsonl, or None if the line is not a record.

    Killed writers and failing disks leave such lines.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _step(line: bytes) -> int | float:
    """Returns the step of a record, or infinity if the line is not a record."""
    step = (parse_record(line) or {}).get("step")
    return step if type(step) is int else math.inf
