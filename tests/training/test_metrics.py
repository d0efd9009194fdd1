import functools
import io
import json
import math
import sys
import types as python_types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
from absl import logging
from jax.sharding import AxisType

from configs import base
from umv2 import config as config_lib
from umv2 import types
from umv2.model import transformer
from umv2.training import metrics


def run_config(*, tensorboard: bool = False, wandb_project: str = "") -> config_lib.Config:
    config = base.get_config()
    config.train.tensorboard, config.train.wandb_project = tensorboard, wandb_project
    return config_lib.from_config_dict(config)


def records(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def layer_stats(**values: list[float]) -> types.LayerStats:
    zeros = jnp.zeros(2)
    given = {name: jnp.asarray(value) for name, value in values.items()}
    names = ("balance_loss", "router_z_loss", "output_variance", "top_score", "last_score")
    fields = dict.fromkeys(names, zeros) | {"router_probability": jnp.zeros((2, 0))}
    return types.LayerStats(**(fields | given), hits=jnp.zeros((2, 0), jnp.int32))


class Clock:
    """A clock that the test moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    monkeypatch.setattr(metrics, "_mesh_peak_flops", lambda: 4000.0)
    return clock


def make_progress(**changes: Any) -> metrics.Progress:
    defaults: dict[str, Any] = {
        "num_steps": 6,
        "first_step": 0,
        "tokens_per_step": 100,
        "flops_per_token": 20.0,
        "log_interval_steps": 3,
    }
    return metrics.Progress(**(defaults | changes))


def test_records_hold_step_time_and_values(tmp_path: Path) -> None:
    with metrics.MetricWriter(tmp_path / "new", run_config(), first_step=0) as writer:
        writer.write(10, {"loss": 2.5, "tokens": 640})
    (record,) = records(tmp_path / "new")
    assert record["wall_time"] > 1e9
    assert record == {"step": 10, "wall_time": record["wall_time"], "loss": 2.5, "tokens": 640}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with metrics.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert [records(tmp_path)[0][key] for key in "abcd"] == [None, None, None, 0.0]


def test_resuming_drops_later_and_torn_records(tmp_path: Path) -> None:
    with metrics.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step)})
            writer.write(step, {"held_out_loss": float(step)})
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "lo')
    with metrics.MetricWriter(tmp_path, run_config(), first_step=20) as writer:
        writer.write(30, {"loss": -1.0})
    assert [record["step"] for record in records(tmp_path)] == [10, 10, 20, 20, 30]
    assert records(tmp_path)[-1]["loss"] == -1.0


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with metrics.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        assert len(records(tmp_path)) == 1


def test_tensorboard_is_written_on_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float, int]] = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter, "add_scalar", lambda _, *scalar: seen.append(scalar)
    )
    with metrics.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    with metrics.MetricWriter(tmp_path, run_config(tensorboard=True), first_step=0) as writer:
        writer.write(2, {"loss": 3.0})
    assert seen == [("loss", 3.0, 2)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = run_config(wandb_project="memory")
    with pytest.raises(config_lib.ConfigError, match=r"pip install -e '\.\[wandb\]'"):
        metrics.MetricWriter(tmp_path, config, first_step=0)


def test_wandb_keeps_its_run_across_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append((step, record))

        def finish(self) -> None:
            calls.append("finished")

    def init(**arguments: Any) -> Run:
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", python_types.SimpleNamespace(init=init))
    for step in (1, 2):
        config = run_config(wandb_project="memory")
        with metrics.MetricWriter(tmp_path, config, first_step=step - 1) as writer:
            writer.write(step, {"loss": 1.0})
    first, logged, finished, second = calls[:4]
    assert (first["project"], first["resume"], logged) == ("memory", "allow", (1, {"loss": 1.0}))
    assert finished == "finished"
    assert first["id"] == second["id"]
    assert first["config"]["train"]["wandb_project"] == "memory"


def test_rates_leave_out_the_first_step_and_pauses(clock: Clock) -> None:
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
    # 200 tokens in 6 s, of 20 FLOPs each, on 4000 FLOP/s.
    assert progress.rates() == pytest.approx({"tokens_per_second": 200 / 6, "mfu": 1 / 6})


def test_rates_are_of_the_last_log_interval(clock: Clock) -> None:
    progress = make_progress()
    for step, seconds in enumerate((9, 9, 1, 1, 1), start=1):
        clock.now += seconds
        progress.update(step, 3.0)
    assert progress.rates()["tokens_per_second"] == pytest.approx(100)


def test_unknown_hardware_has_no_mfu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_mesh_peak_flops", lambda: None)
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


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_of_known_devices(kind: str, expected: float | None) -> None:
    assert metrics._tabulated_flops(kind) == expected


def test_devices_of_one_cpu_share_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_measured_cpu_flops", lambda: 7.0)
    cpu = jax.devices("cpu")[0]
    assert metrics.peak_flops(cpu) == 7.0
    mesh = jax.make_mesh((8,), ("replica",), (AxisType.Explicit,), devices=jax.devices("cpu"))
    with jax.set_mesh(mesh):
        assert metrics._mesh_peak_flops() == 7.0


def test_a_cpu_is_measured() -> None:
    assert 1e8 < metrics._measured_cpu_flops(size=64, repeats=2) < 1e15


def test_health_by_hand() -> None:
    stats = transformer.ModelStats(
        ffn_variance=jnp.asarray([9.0, 16.0, 4.0]),
        sparse=layer_stats(
            output_variance=[4.0, 1.0], top_score=[2.0, 3.0], last_score=[0.5, 0.25]
        ),
    )
    usage = jnp.asarray([[2, 2, 2, 2], [6, 2, 0, 0]], jnp.int32)
    cores = jnp.zeros((2, 2, 1, 2, 2)).at[0, 0, 0].set(jnp.diag(jnp.asarray([1.0, 0.5])))
    cores = cores.at[0, 1, 0].set(jnp.diag(jnp.asarray([2.0, 0.0])))
    cores = cores.at[1, :, 0].set(jnp.asarray([[0.0, 2.0], [1.0, 0.0]]))
    params = {"sparse": {"cores": cores}, "blocks": {"ffn": {}}}
    compute = jax.jit(functools.partial(metrics.health_arrays, write_blocks=(1, 2)))
    health = metrics.fetched_health(compute(stats, usage, params))
    kl = 0.75 * math.log(0.75 * 4) + 0.25 * math.log(0.25 * 4)
    expected = {
        "coverage": [1.0, 0.5],
        "uniform_kl": [0.0, kl],
        "output_std": [2.0, 1.0],
        "output_to_ffn_std": [2 / 4, 1 / 2],
        "top_score": [2.0, 3.0],
        "last_score": [0.5, 0.25],
        "lambda_1": [3.0, 4.0],
        "lambda_2": [0.5, 2.0],
    }
    flat = {f"{k}/layer_{i + 1}": v for k, pair in expected.items() for i, v in enumerate(pair)}
    assert health == pytest.approx(flat, abs=1e-6)


def test_health_without_hits_or_cores_is_finite() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    usage = jnp.zeros((2, 4), jnp.int32)
    params: dict[str, Any] = {"sparse": {}, "blocks": {}}
    health = metrics.health_arrays(stats, usage, params, write_blocks=(0, 1))
    assert "lambda_1" not in health
    assert all(np.isfinite(values).all() for values in health.values())


def test_rank_one_cores_have_one_singular_value() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    params = {"sparse": {"cores": jnp.ones((2, 1, 1, 1, 1))}, "blocks": {}}
    usage = jnp.zeros((2, 4), jnp.int32)
    health = metrics.health_arrays(stats, usage, params, write_blocks=(0, 1))
    assert "lambda_1" in health
    assert "lambda_2" not in health


def test_a_dense_model_has_no_health() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=None)
    assert metrics.fetched_health(metrics.health_arrays(stats, None, {}, write_blocks=())) == {}


def test_health_runs_under_an_explicit_mesh() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    params = {"sparse": {"cores": jnp.ones((2, 1, 1, 2, 2))}, "blocks": {}}
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((stats, jnp.ones((2, 4), jnp.int32), params), jax.P())
        compute = jax.jit(functools.partial(metrics.health_arrays, write_blocks=(0, 1)))
        health = metrics.fetched_health(compute(*inputs))
    assert health["coverage/layer_2"] == 1.0


def test_statistics_are_described_layer_by_layer() -> None:
    memory = layer_stats(output_variance=[0.5, math.nan], top_score=[math.inf, 2.0])
    stats = transformer.ModelStats(ffn_variance=jnp.asarray([0.25, 1.0]), sparse=memory)
    text = metrics.describe_stats(stats)
    assert text.startswith("ffn_variance: 0.25, 1; sparse.balance_loss: 0, 0; ")
    assert "sparse.output_variance: 0.5, nan" in text
    assert "sparse.top_score: inf, 2" in text
    assert "hits" not in text
