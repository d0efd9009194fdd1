"""Progress reports: bars on a terminal, log lines elsewhere."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import tqdm
import tqdm.contrib
from absl import logging

from umv2.hardware import mesh_peak_flops

_TICK_SECONDS = 1.0  # update interval on a terminal
_LOG_SECONDS = 30.0  # log interval elsewhere


@contextlib.contextmanager
def show_progress(
    what: str, total: int | None = None, unit: str = ""
) -> Iterator[Callable[[], None]]:
    """Shows the elapsed time of work in progress and, given a `total`, how much is done.

    On a terminal this is a line that disappears at the end; elsewhere it is a log line at the start
    and one every 30 seconds. Processes other than the first show nothing.

    Args:
      what: description of the work, such as "compiling the training step".
      total: number of units of work; None if unknown.
      unit: name of the units.

    Yields:
      A function to call after each unit.
    """
    if jax.process_index() != 0:
        yield lambda: None
        return
    start, done = time.monotonic(), 0
    terminal = sys.stderr.isatty()
    bar: tqdm.tqdm | None = None
    if terminal:
        parts = "{desc}: {n_fmt}/{total_fmt}{unit}, {elapsed}, {remaining} left"
        bar = tqdm.tqdm(
            desc=what,
            total=total,
            unit=f" {unit}",
            leave=False,
            dynamic_ncols=True,
            bar_format=parts if total else "{desc}: {elapsed}",
        )
    else:
        logging.info("%s", what)

    def show() -> None:
        if bar is not None:
            bar.refresh()
            return
        progress = f", {done} of {total} {unit}" if total else ""
        logging.info("%s: %.0f s%s", what, time.monotonic() - start, progress)

    def advance() -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.update()

    finished = threading.Event()

    def tick() -> None:
        while not finished.wait(_TICK_SECONDS if terminal else _LOG_SECONDS):
            show()

    ticker = threading.Thread(target=tick, name="progress", daemon=True)
    ticker.start()
    try:
        with logging_above_bars() if terminal else contextlib.nullcontext():
            yield advance
    finally:
        finished.set()
        ticker.join()
        if bar is not None:
            bar.close()


class ShowsCompilation[**P, T]:
    """A jitted function whose first call shows that it compiles."""

    def __init__(self, function: Callable[P, T], what: str):
        """Wraps a jitted function, described by `what`."""
        self._function, self._what = function, what
        self._called = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls the function."""
        if self._called:
            return self._function(*args, **kwargs)
        with show_progress(f"compiling {self._what}"):
            result = self._function(*args, **kwargs)
        self._called = True
        return result


@contextlib.contextmanager
def logging_above_bars() -> Iterator[None]:
    """Writes log lines above the progress bars of a terminal."""
    handler = logging.get_absl_handler().python_handler
    previous = handler.setStream(tqdm.contrib.DummyTqdmFile(sys.stderr))
    try:
        yield
    finally:
        handler.setStream(previous)


class Progress:
    """Shows training progress: a bar on a terminal, a log line per log interval elsewhere.

    Rates are averages over the last `log_interval_steps` steps, excluding pauses and the first
    step, which compiles. Model FLOPs utilisation (MFU) is relative to the peak FLOP/s of the mesh.
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
        self._peak_flops = mesh_peak_flops()
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
        """Records that a step is finished."""
        self._times.append((step, self._clock()))
        if self._bar is not None:
            self._bar.set_postfix_str(self._line(step, loss), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown and (step % self._log_interval_steps == 0 or step == self._num_steps):
            logging.info("step %d/%d: %s", step, self._num_steps, self._line(step, loss))

    def rates(self) -> dict[str, float]:
        """Returns tokens_per_second and mfu (a fraction), as far as they are known."""
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
        """Excludes the time in this context from the rates."""
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
            remaining = seconds * (self._num_steps - step)
            parts.append(f"{tqdm.tqdm.format_interval(remaining)} left")
        return ", ".join(parts)
