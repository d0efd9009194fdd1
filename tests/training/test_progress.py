import io
import sys
from typing import Any

import pytest
from absl import logging

from umv2.training import progress as progress_module


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "perf_counter", clock)
    monkeypatch.setattr(progress_module, "mesh_peak_flops", lambda: 4000.0)
    return clock


def make_progress(**changes: Any) -> progress_module.Progress:
    defaults: dict[str, Any] = {
        "num_steps": 6,
        "first_step": 0,
        "tokens_per_step": 100,
        "flops_per_token": 20.0,
        "log_interval_steps": 3,
    }
    return progress_module.Progress(**(defaults | changes))


def test_rates_exclude_the_first_step_and_pauses(clock: Clock) -> None:
    progress = make_progress()
    clock.now += 50  # compilation
    progress.update(1, 3.0)
    assert progress.rates() == {}
    clock.now += 2
    progress.update(2, 3.0)
    with progress.paused():
        clock.now += 1000
    clock.now += 4
    progress.update(3, 3.0)
    # 200 tokens in 6 s, with 20 FLOPs each, at a peak of 4000 FLOP/s.
    assert progress.rates() == pytest.approx({"tokens_per_second": 200 / 6, "mfu": 1 / 6})


def test_rates_cover_the_last_log_interval(clock: Clock) -> None:
    progress = make_progress()
    for step, seconds in enumerate((9, 9, 1, 1, 1), start=1):
        clock.now += seconds
        progress.update(step, 3.0)
    assert progress.rates()["tokens_per_second"] == pytest.approx(100)


def test_unknown_hardware_has_no_mfu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "mesh_peak_flops", lambda: None)
    progress = make_progress()
    for step in (1, 2):
        clock.now += 1
        progress.update(step, 3.0)
    assert progress.rates().keys() == {"tokens_per_second"}


def test_without_a_terminal_each_log_interval_is_one_line(clock: Clock, log: io.StringIO) -> None:
    assert not sys.stderr.isatty()
    with make_progress(num_steps=7) as progress:
        for step in range(1, 8):
            clock.now += 2
            progress.update(step, 3.0)
    assert log.getvalue().splitlines() == [
        "step 3/7: loss 3.0000, 50.0 tokens/s, MFU 25.0 %, 00:08 left",
        "step 6/7: loss 3.0000, 50.0 tokens/s, MFU 25.0 %, 00:02 left",
        "step 7/7: loss 3.0000, 50.0 tokens/s, MFU 25.0 %, 00:00 left",
    ]


def test_a_terminal_has_a_bar_and_log_lines_above_it(
    clock: Clock, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.get_absl_handler().python_handler
    before = handler.stream
    with make_progress(first_step=2) as progress:
        for step in (3, 4, 5, 6):
            clock.now += 2
            progress.update(step, 3.25)
        handler.stream.write("a message\n")
    assert handler.stream is before
    assert "2/6 steps" in terminal.getvalue()
    assert "loss 3.2500, 50.0 tokens/s, MFU 25.0 %, 00:00 left" in terminal.getvalue()
    assert "\ra message\n" in terminal.getvalue() or "\na message\n" in terminal.getvalue()
    assert log.getvalue() == ""
