"""What a run tells about itself: its records, its progress, and the health of its memory layers."""

import collections
import contextlib
import functools
import json
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from jaxtyping import Array, Float, Int

from umv2 import files
from umv2.config import Config, ConfigError, to_dict
from umv2.model.transformer import ModelStats
from umv2.training.progress import logging_above_bars

METRICS_FILE = "metrics.jsonl"

Record = Mapping[str, int | float]

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first name found in
# `device_kind` counts. A TPU7x chip is two devices.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself so
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)


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


class Progress:
    """Shows how far training is: a bar on a terminal, a log line at each log interval elsewhere.

    Rates are those of the last `log_interval_steps` steps, without pauses and without the first
    step, which compiles. Model FLOPs utilisation (MFU) is against the peak of the mesh's devices.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        first_step: int,
        tokens_per_step: int,
        flops_per_token: float,
        log_interval_steps: int,
    ):
        self._num_steps, self._first_step = num_steps, first_step
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        self._log_interval_steps = log_interval_steps
        self._peak_flops = _mesh_peak_flops()
        self._times: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=log_interval_steps + 1
        )
        self._paused_seconds = 0.0
        self._shown = jax.process_index() == 0
        self._bar: tqdm.tqdm | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=self._num_steps,
                initial=self._first_step,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
                miniters=1,
                dynamic_ncols=True,
            )
            self._open.callback(self._bar.close)
            self._open.enter_context(logging_above_bars())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def update(self, step: int, loss: float) -> None:
        """Notes that a step is finished."""
        self._times.append((step, self._clock()))
        if self._bar is not None:
            self._bar.set_postfix_str(self._line(step, loss), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown and (step % self._log_interval_steps == 0 or step == self._num_steps):
            logging.info("step %d/%d: %s", step, self._num_steps, self._line(step, loss))

    def rates(self) -> dict[str, float]:
        """Returns tokens_per_second and mfu (a fraction), each where it is known."""
        seconds = self._seconds_per_step()
        if seconds is None:
            return {}
        rates = {"tokens_per_second": self._tokens_per_step / seconds}
        if self._peak_flops is not None:
            flops = rates["tokens_per_second"] * self._flops_per_token
            rates["mfu"] = flops / self._peak_flops
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time within out of the rates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - start

    def _clock(self) -> float:
        return time.perf_counter() - self._paused_seconds

    def _seconds_per_step(self) -> float | None:
        if len(self._times) < 2:
            return None
        (first_step, start), (last_step, end) = self._times[0], self._times[-1]
        return (end - start) / (last_step - first_step)

    def _line(self, step: int, loss: float) -> str:
        parts, rates = [f"loss {loss:.4f}"], self.rates()
        if "tokens_per_second" in rates:
            parts.append(f"{tqdm.tqdm.format_sizeof(rates['tokens_per_second'])} tokens/s")
        if "mfu" in rates:
            parts.append(f"MFU {100 * rates['mfu']:.1f} %")
        seconds = self._seconds_per_step()
        if seconds is not None:
            left = seconds * (self._num_steps - step)
            parts.append(f"{tqdm.tqdm.format_interval(left)} left")
        return ", ".join(parts)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the FLOP/s that a device can reach, or None where that is unknown.

    Dense bfloat16 from a table for TPUs and GPUs. For a CPU, what a float32 matrix product of
    numpy reaches on all its cores, measured once: devices that share them share this number.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops()
    return _tabulated_flops(device.device_kind)


def _tabulated_flops(device_kind: str) -> float | None:
    return next((flops for kind, flops in PEAK_FLOPS if kind in device_kind), None)


@functools.cache
def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    matrix = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _mesh_peak_flops() -> float | None:
    mesh = jax.sharding.get_mesh()
    devices = jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)
    if devices[0].platform == "cpu":  # one of each process: the others share its cores
        devices = list({device.process_index: device for device in devices}.values())
    peaks = [peak_flops(device) for device in devices]
    return None if None in peaks else sum(filter(None, peaks))


def health_arrays(
    stats: ModelStats,
    usage: Int[Array, "l choices"] | None,
    params: dict[str, Any],
    *,
    write_blocks: Sequence[int],
) -> dict[str, Float[Array, " l"]]:
    """Returns what to watch of every sparse layer; light, and small enough to send to the host.

    Args:
      stats: of a step; its hits are not read.
      usage: hits of each visible row, or expert, since the last log; None for a dense model.
      params: of the model.
      write_blocks: block, from 0, beside whose FFN each sparse layer's output is added.

    Returns:
      For each sparse layer, nothing for a dense model: coverage, share of rows or experts hit;
      uniform_kl, nats from the uniform distribution to that of the hits; output_std and, where
      blocks have an FFN, output_to_ffn_std; top_score and last_score, means of the first and last
      selected score; for memory layers with Tucker scoring lambda_1 and lambda_2, singular values
      of the summed cores, averaged over heads; for experts balance_loss and router_z_loss.
    """
    sparse = stats.sparse
    if sparse is None or usage is None:
        return {}
    hits = usage.astype(jnp.float32)
    share = hits / jnp.maximum(hits.sum(axis=-1, keepdims=True), 1.0)
    health = {
        "coverage": jnp.mean(usage > 0, axis=-1),
        "uniform_kl": jax.scipy.special.rel_entr(share, 1 / usage.shape[-1]).sum(axis=-1),
        "output_std": jnp.sqrt(sparse.output_variance),
        "top_score": sparse.top_score,
        "last_score": sparse.last_score,
    }
    if "ffn" in params["blocks"]:
        ffn_variance = stats.ffn_variance[jnp.asarray(write_blocks)]
        health["output_to_ffn_std"] = jnp.sqrt(sparse.output_variance / ffn_variance)
    if "router" in params["sparse"]:
        health |= {"balance_loss": sparse.balance_loss, "router_z_loss": sparse.router_z_loss}
    if "cores" in params["sparse"]:
        core = params["sparse"]["cores"].sum(axis=1)  # [l, c, h, r, r] over cores
        singular = jnp.linalg.svd(core, compute_uv=False).mean(axis=1)
        for i in range(min(2, singular.shape[-1])):
            health[f"lambda_{i + 1}"] = singular[:, i]
    return health


def fetched_health(health: Mapping[str, Array]) -> dict[str, float]:
    """Fetches health arrays as a flat record: 'coverage/layer_1' is the first sparse layer's."""
    return {
        f"{name}/layer_{index}": float(value)
        for name, values in jax.device_get(dict(health)).items()
        for index, value in enumerate(values, start=1)
    }


def describe_stats(stats: ModelStats) -> str:
    """Says every statistic of every block and sparse layer, from the first on, in one line."""
    return "; ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}:"
        f" {', '.join(f'{value:.3g}' for value in np.asarray(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim == 1
    )
