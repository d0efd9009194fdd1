"""The training loop, and that interruptions do not change its curve."""

import dataclasses
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import meshes, tiny_run
from tests.tiny_run import Run
from umv2 import files, sharding
from umv2.config import Config, ConfigError, to_dict
from umv2.data import corpus, loader
from umv2.training import checkpoint
from umv2.training import held_out as held_out_module
from umv2.training import train as training
from umv2.training.state import TrainState, abstract_state
from umv2.types import Batch

ROOT = Path(__file__).parents[2]


def records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def loss_curve(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(workdir) if "loss" in record}


def reproducible(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records without timings."""
    timed = ("wall_time", "tokens_per_second", "mfu")
    return [{k: v for k, v in record.items() if k not in timed} for record in records(workdir)]


def saved_steps(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


@functools.cache
def abstract(config: Config) -> TrainState:
    return abstract_state(meshes.resolved(config))


def saved_state(config: Config, workdir: Path) -> TrainState:
    """Returns the state of the newest checkpoint."""
    keep = config.train.num_checkpoints_kept
    with checkpoint.Checkpointer(
        workdir / "checkpoints", keep=keep, config=to_dict(config)
    ) as checkpointer:
        return checkpointer.restore(abstract(config))


def assert_same_bits(left: TrainState, right: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def interrupted(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run, cut off after its checkpoint of step 9."""
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "12")
    return workdir


def damage(folder: Path) -> None:
    largest = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


# The loop, start to end.


def test_a_run_records_its_steps_evaluations_and_checkpoints(finished: Run) -> None:
    assert list(loss_curve(finished.workdir)) == [2, 4, 6, 8, 10, 12]
    held_out = [r for r in records(finished.workdir) if "held_out_loss" in r]
    assert [r["step"] for r in held_out] == [6, 12]
    assert held_out[1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert saved_steps(finished.workdir) == [3, 6, 9, 12]
    assert records(finished.workdir)[0]["tokens"] == 2 * 8 * 16
    assert records(finished.workdir)[0]["learning_rate"] == pytest.approx(0.005)


def test_the_loss_starts_at_chance_and_falls(finished: Run) -> None:
    curve = loss_curve(finished.workdir)
    assert curve[2] == pytest.approx(math.log(264), abs=0.4)
    assert curve[12] < curve[2] - 0.3


def test_each_step_compiles_once_in_a_run_that_logs_evaluates_and_saves(finished: Run) -> None:
    counts = Counter(finished.compiled)
    names = ("train_step", "evaluation_step", "arrays")
    assert {name: counts[name] for name in names} == dict.fromkeys(names, 1)
    assert counts["_checksums"] <= 1  # shared by the runs of a process


def test_usage_and_coverage(finished: Run, interrupted: Path) -> None:
    hits_per_step = 8 * 16 * 4  # sequences, tokens, values
    # Step 9 is the first after the log at step 8; step 12 itself was logged.
    since_8 = saved_state(finished.config, interrupted).usage["memory"]
    np.testing.assert_array_equal(np.asarray(since_8).sum(axis=1), [hits_per_step] * 2)
    since_12 = saved_state(finished.config, finished.workdir).usage["memory"]
    np.testing.assert_array_equal(np.asarray(since_12).sum(axis=1), [0, 0])
    for record in records(finished.workdir):
        if "loss" in record:
            coverage = [record[f"coverage/layer_{layer}"] for layer in (1, 2)]
            assert all(0 < each <= 1 for each in coverage)
            assert record["lambda_1/layer_1"] > record["lambda_2/layer_1"] > 0


# Interruptions.


def test_a_damaged_checkpoint_is_skipped_and_the_curve_stays_the_same(
    finished: Run, interrupted: Path
) -> None:
    damage(interrupted / "checkpoints" / "9" / "state")
    with tiny_run.logged() as messages, tiny_run.compilations() as compiled:
        training.train(finished.config, interrupted)
    (warning,) = [m for m in messages if "damaged" in m]
    assert str(interrupted / "checkpoints" / "9") in warning
    assert "continuing after step 6" in messages
    assert Counter(compiled)["train_step"] == 1
    assert reproducible(interrupted) == reproducible(finished.workdir)
    assert saved_steps(interrupted) == [3, 6, 9, 12]
    assert_same_bits(
        saved_state(finished.config, interrupted), saved_state(finished.config, finished.workdir)
    )


# Starts main.py and sends itself a signal when it records step 8.
INTERRUPTED_PROGRAM = """
import os, runpy, signal, sys
from umv2.training import records

write, signal_name = records.MetricWriter.write, sys.argv.pop()

def write_and_signal(self, step, record):
    write(self, step, record)
    if step == 8:
        os.kill(os.getpid(), getattr(signal, signal_name))

records.MetricWriter.write = write_and_signal
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "code", "saved"),
    [
        ("SIGKILL", -signal.SIGKILL, ([3], [3, 6])),
        pytest.param("SIGTERM", 0, ([3, 6, 9],), marks=pytest.mark.slow),
        pytest.param("SIGINT", 0, ([3, 6, 9],), marks=pytest.mark.slow),
    ],
)
def test_the_curve_after_a_signal_matches_the_uninterrupted_one(
    finished: Run, tmp_path: Path, name: str, code: int, saved: tuple[list[int], ...]
) -> None:
    workdir = tmp_path / "run"
    arguments = [*tiny_run.flags(finished.paths), f"--workdir={workdir}"]
    completed = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_PROGRAM, *arguments, name],
        cwd=ROOT,
        env=tiny_run.environment(finished.cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == code, completed.stderr
    assert saved_steps(workdir) in saved  # the process may die before step 6 is on disk
    assert max(loss_curve(workdir)) == 8  # SIGTERM writes no record of its own
    assert ("; the state is saved" in completed.stderr) == (name != "SIGKILL")
    assert "Traceback" not in completed.stderr
    training.train(finished.config, workdir)
    expected = loss_curve(finished.workdir)
    assert loss_curve(workdir) == expected
    resumed, uninterrupted = (
        saved_state(finished.config, folder) for folder in (workdir, finished.workdir)
    )
    assert_same_bits(resumed, uninterrupted)


def without_the_last_evaluation(workdir: Path) -> None:
    """Turns a finished run into one that was killed during its last evaluation."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "held_out_loss" in lines[-1]
    path.write_text("".join(lines[:-1]))


def test_an_interrupted_evaluation_is_repeated_when_the_run_resumes(
    finished: Run, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    without_the_last_evaluation(workdir)
    with tiny_run.compilations() as compiled:
        assert training.train(finished.config, workdir)
    assert reproducible(workdir) == reproducible(finished.workdir)
    assert "train_step" not in compiled


def test_ctrl_c_during_the_last_evaluation_loses_no_step(
    finished: Run, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = held_out_module.evaluate

    def interrupt(step: Any, batches: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return evaluate(step, batches, **kwargs)

    with monkeypatch.context() as patched, tiny_run.logged() as messages:
        patched.setattr(held_out_module, "evaluate", interrupt)
        assert not training.train(finished.config, interrupted)
    assert messages[-1] == "stopped by Ctrl-C after step 12; the state is saved"
    assert saved_steps(interrupted) == [3, 6, 9, 12]
    assert "held_out_loss" not in records(interrupted)[-1]
    assert training.train(finished.config, interrupted)
    assert reproducible(interrupted) == reproducible(finished.workdir)


def test_two_jobs_cannot_train_in_one_folder(finished: Run, interrupted: Path) -> None:
    before = records(interrupted)
    with (
        files.locked(interrupted / "lock", "another run"),
        pytest.raises(files.InUse, match=r"is in use by process \d+ on .* \(another run\)"),
    ):
        training.train(finished.config, interrupted)
    assert records(interrupted) == before
    assert saved_steps(interrupted) == [3, 6, 9]


def test_a_changed_corpus_is_rejected(finished: Run, interrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    paths = tiny_run.write_text(tmp_path / "text")
    same = tiny_run.tiny_config(paths, data__paths=(paths,))
    assert same.data.paths != finished.config.data.paths
    # The same text in another place is another configuration, but the same corpus.
    identities = [corpus.open_corpus(c.data, 264).identity for c in (same, finished.config)]
    assert identities[0] == identities[1]
    Path(finished.paths).with_name("new.txt").write_text("A document that was not there. " * 3)
    try:
        with pytest.raises(ConfigError, match="the documents are not those that the run"):
            training.train(finished.config, interrupted)
    finally:
        Path(finished.paths).with_name("new.txt").unlink()
    assert saved_steps(interrupted) == [3, 6, 9]


def test_another_learning_rate_is_rejected(finished: Run, interrupted: Path) -> None:
    other = tiny_run.tiny_config(finished.paths, optimizer__learning_rate=0.02)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.02"):
        training.train(other, interrupted)
    assert reproducible(interrupted) == reproducible(finished.workdir)


def test_a_finished_run_logs_that(finished: Run) -> None:
    before = records(finished.workdir)
    with tiny_run.logged() as messages:
        training.train(finished.config, finished.workdir)
    assert f"{finished.workdir} has already taken its 12 steps" in messages
    assert records(finished.workdir) == before


def test_a_non_finite_loss_stops_training_before_saving(
    finished: Run, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 9 is not logged, so that only the check before its checkpoint can detect it."""
    shutil.rmtree(interrupted / "checkpoints" / "9")
    start = loader.train_batches

    class Spoilt:
        def __init__(self, *args: Any, start_step: int, **kwargs: Any):
            self._batches = start(*args, start_step=start_step, **kwargs)
            self._step = start_step

        def __iter__(self) -> Iterator[Batch]:
            return self

        def __next__(self) -> Batch:
            self._step += 1
            batch = next(self._batches)
            if self._step < 9:
                return batch
            return dataclasses.replace(batch, weights=np.full_like(batch.weights, np.nan))

        def close(self) -> None:
            self._batches.close()

    monkeypatch.setattr(loader, "train_batches", Spoilt)
    with pytest.raises(training.TrainingDiverged) as caught:
        training.train(finished.config, interrupted)
    message = str(caught.value)
    assert message.startswith("step 9: loss nan, gradient norm nan; ")
    assert re.search(r"ffn_variance: [\d.e-]+, [\d.e-]+; .*top_score: [\d.e-]+, [\d.e-]+", message)
    assert str(interrupted / "checkpoints") in message
    assert saved_steps(interrupted) == [3, 6]
    assert max(loss_curve(interrupted)) == 8
    for leaf in jax.tree.leaves(saved_state(finished.config, interrupted).params):
        assert np.isfinite(leaf).all()


# Devices and families.


@pytest.mark.slow
def test_eight_devices_train_like_one(finished: Run, tmp_path: Path) -> None:
    assert jax.device_count() == 8
    config = tiny_run.tiny_config(finished.paths, mesh__replica=8)
    assert config.mesh != finished.config.mesh
    training.train(config, tmp_path)
    one, eight = loss_curve(finished.workdir), loss_curve(tmp_path)
    assert eight == pytest.approx(one, rel=1e-5)
    held_out = [
        [r["held_out_loss"] for r in records(workdir) if "held_out_loss" in r]
        for workdir in (finished.workdir, tmp_path)
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


@pytest.mark.slow
def test_a_dense_model_trains_without_memory(finished: Run, tmp_path: Path) -> None:
    config = tiny_run.tiny_config(finished.paths, model__memory__layer="none")
    training.train(config, tmp_path)
    curve = loss_curve(tmp_path)
    assert curve[12] < curve[2] - 0.3
    assert not [key for record in records(tmp_path) for key in record if "layer_" in key]
    state = saved_state(config, tmp_path)
    assert state.store is None and state.usage == {}


@pytest.mark.slow
def test_a_memory_with_experts_trains_and_resumes(finished: Run, tmp_path: Path) -> None:
    config = tiny_run.tiny_config(
        finished.paths,
        model__ffn="moe",
        model__ffn_size=0,
        model__moe__num_experts=4,
        model__moe__top_k=2,
        model__moe__expert_size=8,
        loss__balance_loss=0.001,
        loss__load_balance=0.01,
        loss__router_z_loss=0.001,
    )
    uninterrupted = tmp_path / "whole"
    training.train(config, uninterrupted)
    curve = loss_curve(uninterrupted)
    assert curve[12] < curve[2] - 0.3
    for record in records(uninterrupted):
        if "loss" in record:
            names = ("coverage", "expert_coverage")
            coverage = [record[f"{name}/layer_{layer}"] for name in names for layer in (1, 2)]
            assert all(0 < each <= 1 for each in coverage)

    interrupted = Path(shutil.copytree(uninterrupted, tmp_path / "interrupted"))
    shutil.rmtree(interrupted / "checkpoints" / "12")
    # Step 9 is the first after the log at step 8: 8 sequences of 16 tokens, 4 rows and 2 experts.
    usage = saved_state(config, interrupted).usage
    sums = {name: np.asarray(counts).sum(axis=1).tolist() for name, counts in usage.items()}
    assert sums == {"memory": [8 * 16 * 4] * 2, "router": [8 * 16 * 2] * 2}
    training.train(config, interrupted)
    assert reproducible(interrupted) == reproducible(uninterrupted)
    assert_same_bits(saved_state(config, interrupted), saved_state(config, uninterrupted))


# Single steps, compiled as in a run.


@pytest.fixture(scope="module")
def state(finished: Run) -> TrainState:
    """The state after 12 steps; tables, keys and cores have changed."""
    with jax.set_mesh(sharding.create_mesh(finished.config.mesh, 8)):
        return saved_state(finished.config, finished.workdir)


def batch_of(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 200, (8, 17)).astype(np.int32)
    segments = np.zeros((8, 16), np.int32)
    # Rows have different weights, so that a mean of microbatch means would differ.
    weights = (np.arange(16) < np.arange(9, 17)[:, None]).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, weights)


@functools.cache
def compiled_step(config: Config) -> Any:
    return jax.jit(training.make_train_step(config), donate_argnums=0)


def take_steps(
    config: Config, state: TrainState, batch: Batch, number: int = 1
) -> tuple[TrainState, list[training.StepMetrics]]:
    mesh = sharding.create_mesh(config.mesh, 8)
    state = jax.tree.map(jnp.copy, state)  # to donate
    seen = []
    with jax.set_mesh(mesh):
        for _ in range(number):
            global_batch = sharding.local_to_global(mesh, batch)
            state, step_metrics = compiled_step(config)(state, global_batch)
            seen.append(step_metrics)
    return state, seen


def test_a_batch_is_memorised(finished: Run, state: TrainState) -> None:
    after, seen = take_steps(finished.config, state, batch_of(0), number=40)
    assert float(seen[-1].loss) < 0.5 * float(seen[0].loss)
    assert int(after.step) == 52


def test_core_vectors_match_the_updated_cores(finished: Run, state: TrainState) -> None:
    after, _ = take_steps(finished.config, state, batch_of(0))
    cores = np.asarray(after.params["memory"]["cores"])
    assert not np.array_equal(cores, state.params["memory"]["cores"])
    left, _, right = np.linalg.svd(cores.sum(axis=1))  # [layer, core, head, r, r] over cores
    expected_u, expected_v = left[..., :, 0], right[..., 0, :]
    u, v = (np.asarray(after.buffers["memory"][name]) for name in ("core_u", "core_v"))
    assert not np.array_equal(u, state.buffers["memory"]["core_u"])
    sign = np.sign(np.sum(u * expected_u, axis=-1, keepdims=True))
    np.testing.assert_allclose(u, sign * expected_u, atol=1e-5)
    np.testing.assert_allclose(v, sign * expected_v, atol=1e-5)
    # The sign is that of the previous pair.
    assert np.all(np.sum(u * np.asarray(state.buffers["memory"]["core_u"]), axis=-1) > 0)


def test_accumulated_gradients_match_one_batch(finished: Run, state: TrainState) -> None:
    accumulated = tiny_run.tiny_config(finished.paths, train__gradient_accumulation=4)
    assert (
        accumulated.train.gradient_accumulation != finished.config.train.gradient_accumulation == 1
    )
    full, (full_metrics,) = take_steps(finished.config, state, batch_of(1))
    parts, (parts_metrics,) = take_steps(accumulated, state, batch_of(1))
    assert float(parts_metrics.loss) == pytest.approx(float(full_metrics.loss), rel=1e-6)
    assert float(parts_metrics.gradient_norm) == pytest.approx(
        float(full_metrics.gradient_norm), rel=1e-5
    )
    np.testing.assert_array_equal(parts.usage["memory"], full.usage["memory"])
    assert np.asarray(full.usage["memory"]).sum() > 0
    for a, b in zip(
        jax.tree.leaves((parts.params, parts.store, parts.optimizer)),
        jax.tree.leaves((full.params, full.store, full.optimizer)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        pytest.param("z_loss", "embedding", marks=pytest.mark.slow),
        pytest.param("tucker_penalty", "cores", marks=pytest.mark.slow),
        ("balance_loss", "keys"),
    ],
)
def test_an_auxiliary_loss_changes_the_gradient(
    finished: Run, state: TrainState, name: str, parameter: str
) -> None:
    changes = {f"loss__{name}": 0.5, "loss__tucker_margin": 0.0}
    config = tiny_run.tiny_config(finished.paths, **changes)
    assert getattr(finished.config.loss, name) == 0
    without, (plain,) = take_steps(finished.config, state, batch_of(1))
    with_it, (penalised,) = take_steps(config, state, batch_of(1))
    # The reported loss is only the cross entropy.
    assert float(penalised.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    assert float(penalised.gradient_norm) != pytest.approx(float(plain.gradient_norm), rel=1e-4)
    before, after = (result.weights.named() for result in (without, with_it))
    (path,) = (path for path in before if path.endswith(parameter))
    assert jnp.abs(before[path] - after[path]).max() > 1e-4
