"""The smallest scale, as a user runs it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.ablations import run
from umv2 import sharding
from umv2.config import from_config_dict
from umv2.cost import exchange
from umv2.training import train as training
from umv2.training.state import abstract_state
from umv2.types import Batch

ROOT = Path(__file__).parents[3]


def command(module: str, *flags: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def interrupt(folder: Path, *flags: str) -> None:
    """Starts a sweep, and stops it with Ctrl-C in its first run."""
    started = subprocess.Popen(
        [sys.executable, "-m", "experiments.ablations.run", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(folder.glob("work/smoke/*/*/seed_0/metrics.jsonl")):
        assert started.poll() is None, started.communicate()
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate()
    assert started.returncode == 130
    assert output.splitlines()[-1] == "0/4 runs; run the same command again to resume"
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors


@pytest.mark.slow(minutes=4)
def test_an_ablation_runs_from_the_command_line(tmp_path: Path) -> None:
    results = f"--results={tmp_path / 'results'}"
    work = f"--workdir={tmp_path / 'work'}"
    flags = ("--ablation=heads", "--scale=smoke", "--seeds=2", results, work)
    interrupt(tmp_path, *flags)
    assert "4/4 runs" in command("experiments.ablations.run", *flags)
    page = tmp_path / "results" / "smoke" / "heads.md"
    assert "[heads](smoke/heads.md)" in command("experiments.ablations.report", results)
    assert "| two | 2     |" in page.read_text()
    before = [path.stat().st_mtime_ns for path in page.parent.glob("*/*/seed_*.jsonl")]
    assert command("experiments.ablations.run", *flags).startswith("4/4 runs")
    assert [path.stat().st_mtime_ns for path in page.parent.glob("*/*/seed_*.jsonl")] == before


@pytest.mark.slow(minutes=4)
def test_the_training_step_of_every_arm_traces() -> None:
    for job in run.arms_to_run(["all"], [], "smoke"):
        config = from_config_dict(job.values)
        mesh = sharding.create_mesh(config.mesh, config.train.batch_size, devices=jax.devices()[:1])
        config = exchange.resolve_mesh(config, mesh.shape, 1)
        with jax.set_mesh(mesh):
            state = abstract_state(config)
            shape = (config.train.batch_size, config.data.sequence_length)
            ids, ones = np.zeros(shape, np.int32), np.ones(shape, np.float32)
            batch = sharding.local_to_global(mesh, Batch(ids, ids, ids, ones))
            step = training.make_train_step(config)
            _, metrics = jax.eval_shape(step, state, batch)
        assert metrics.loss.shape == (), job.names
