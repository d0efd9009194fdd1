"""Says what goes on while a person waits: the creation of a state, a compilation, an evaluation."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import tqdm
import tqdm.contrib
from absl import logging

_TICK_SECONDS = 1.0  # on a terminal
_LOG_SECONDS = 30.0  # elsewhere


@contextlib.contextmanager
def working(what: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
    """Shows work while it lasts: time elapsed, and, given a `total`, how much of it is done.

    On a terminal that is a line which goes when the work ends; elsewhere a log line at the start,
    and one every half minute. Processes other than the first are silent.

    Args:
      what: goes on, such as "compiling the training step".
      total: units of work; None where it has no parts.
      unit: what they are.

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


class Announced[**P, T]:
    """A compiled function whose first call, which compiles, is said to do so."""

    def __init__(self, function: Callable[P, T], what: str):
        """Takes the function and what is compiled."""
        self._function, self._what = function, what
        self._called = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls the function."""
        if self._called:
            return self._function(*args, **kwargs)
        with working(f"compiling {self._what}"):
            result = self._function(*args, **kwargs)
        self._called = True
        return result


@contextlib.contextmanager
def logging_above_bars() -> Iterator[None]:
    """Writes log lines above the bars of a terminal, not through them."""
    handler = logging.get_absl_handler().python_handler
    previous = handler.setStream(tqdm.contrib.DummyTqdmFile(sys.stderr))
    try:
        yield
    finally:
        handler.setStream(previous)
