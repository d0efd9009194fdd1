"""The records of a run: metrics.jsonl, TensorBoard and Weights & Biases."""

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
    """Writes records to metrics.jsonl, TensorBoard and Weights & Biases, as the config says.

    Only the first process writes. A run that resumes after `first_step` drops what an earlier
    attempt wrote about later steps, so that every curve is one curve. What the disk does not take
    is kept, and written when it does.

    Raises:
      ConfigError: train.wandb_project is set, but wandb is not installed or cannot start.
      FileError: the files cannot be made.
    """

    def __init__(self, workdir: Path, config: Config, *, first_step: int):
        self._sinks: list[Callable[[int, Record], None]] = []
        self._open = contextlib.ExitStack()
        if jax.process_index() != 0:
            return
        files.make_folder(workdir)
        with contextlib.ExitStack() as stack:  # closes what is open when a later one fails
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
        """Adds a record of what was seen after `step` steps."""
        for sink in self._sinks:
            sink(step, record)

    def _add_json_lines(self, path: Path, first_step: int) -> None:
        """One JSON object a line: step, wall_time (seconds since 1970), and the record.

        Numbers that are not finite become null, which JSON can say.
        """
        _drop_later_records(path, first_step)
        lines = _Appender(path)
        self._open.callback(lines.close)

        def write(step: int, record: Record) -> None:
            line = {"step": step, "wall_time": time.time(), **files.json_value(record)}
            lines.write(json.dumps(line, allow_nan=False) + "\n")

        self._sinks.append(write)

    def _add_tensorboard(self, folder: Path, first_step: int) -> None:
        # Its thread ends where the disk is full; a queue with a limit would then block training.
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
        # The run keeps its id across restarts, so that they extend one curve.
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
        except Exception as error:  # no key, no network, a project that is not theirs
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"train.wandb_project={project!r}: wandb cannot start: {said}"
            ) from error
        self._open.callback(run.finish)
        self._sinks.append(lambda step, record: run.log(dict(record), step=step))


class _Appender:
    """Appends lines to a file; a disk that is full makes them wait for the next write."""

    def __init__(self, path: Path):
        self._path, self._waiting, self._warned = path, b"", False
        with files.errors(path):
            self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                logging.warning(
                    "%s: cannot be written: %s; records wait in memory",
                    self._path,
                    files.reason(error),
                )
            self._warned = True
            return
        self._warned = False

    def close(self) -> None:
        if self._waiting:
            self.write("")
        if self._waiting:
            logging.warning(
                "%s: the last %d records are lost", self._path, self._waiting.count(b"\n")
            )
        self._file.close()


@contextlib.contextmanager
def _tensorboard_may_fail(folder: Path) -> Iterator[None]:
    """Says in one line what ends TensorBoard's thread, or its last write."""

    def warn(error: BaseException | None) -> None:
        why = files.reason(error) if isinstance(error, OSError) else error
        logging.warning("%s: cannot be written: %s; metrics.jsonl has it all", folder, why)

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
    """Keeps records up to `last_step`; the last line may be torn, if its writer was killed."""
    if not path.exists():
        return
    with files.replacing(path) as kept, path.open("rb") as old, kept.open("wb") as new:
        new.writelines(line for line in old if _step(line) <= last_step)


def has_evaluation(workdir: Path, step: int) -> bool:
    """Tells whether a run has recorded its evaluation after `step` steps."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return False
    with files.errors(path, "cannot be read"), path.open("rb") as lines:
        return any(b'"held_out_loss"' in line and _step(line) == step for line in lines)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line of metrics.jsonl; None for a line that is none.

    A writer that was killed leaves such a line, a disk that failed others.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _step(line: bytes) -> int | float:
    """Returns the step of a record; infinity for a line that is none."""
    step = (parse_record(line) or {}).get("step")
    return step if type(step) is int else math.inf
