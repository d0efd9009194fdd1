"""Runs of the long-context suite: errors, and files that are not results."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from configs import long_context_tiny
from experiments import measurements
from experiments.benchmarks import long_context
from umv2.config.schema import UserError

CELL: dict[str, Any] = {
    "task": "needle",
    "length": 256,
    "fifth": 0,
    "answers": 4,
    "exact": 2,
    "chance": 0.1,
}


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(long_context, "RESULTS", folder)
    return folder


def end_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, status: int = 0, errors: str = "", step: int
) -> list[str]:
    """Makes every mode end with a status, errors and step; returns the list of started modes."""
    started = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append("evaluate" if "--mode=evaluate" in command else "train")
        measurements.write(folder / "metrics.jsonl", [{"step": step}])
        return subprocess.CompletedProcess(command, status, "", errors)

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_a_run_stopped_by_a_signal_is_not_evaluated(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = long_context_tiny.get_config("moe").train.num_steps
    started = end_with(monkeypatch, tmp_path / "run", step=needed - 1)
    with pytest.raises(UserError, match=f"moe, seed 0: stopped after step {needed - 1} of"):
        long_context.run("moe", 0, tmp_path / "run")
    assert started == ["train"]
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("errors", "error", "message"),
    [
        ("some log\nerror: no disk\n", UserError, "moe, seed 0: no disk$"),
        ("interrupted\n", UserError, "moe, seed 0: interrupted$"),
        ("Traceback ...\nKeyError: 'a'\n", RuntimeError, "Traceback"),
    ],
)
def test_an_error_of_a_run_stops_the_suite(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors: str,
    error: type[Exception],
    message: str,
) -> None:
    end_with(monkeypatch, tmp_path / "run", status=1, errors=errors, step=1)
    with pytest.raises(error, match=message):
        long_context.run("moe", 0, tmp_path / "run")
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no answers"),
        ([{"step": 1}], "has no answers"),
        ([{"step": 1}, {"kind": "run"}], "line 2: length=None"),
        ([{"step": 1}, CELL | {"exact": "2"}], "line 2: exact='2'"),
        ([{"step": 1}, CELL | {"answers": 0}], "line 2 holds no answers to a task"),
        ([{"step": 1}, CELL, CELL | {"length": 512}], "not of the same tasks and lengths"),
    ],
)
def test_a_file_with_other_content_is_named(
    results: Path, lines: list[dict[str, Any]], message: str
) -> None:
    (results / "README.md").write_text("committed")
    measurements.write(results / "dense_0.jsonl", [{"step": 1}, CELL])
    path = results / "moe_0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        long_context.report()
    assert (results / "README.md").read_text() == "committed"
