import json
import math
import sys
import types as python_types
from pathlib import Path
from typing import Any

import pytest
import tensorboardX

from configs import base
from umv2 import config as config_lib
from umv2.training import records


def run_config(*, tensorboard: bool = False, wandb_project: str = "") -> config_lib.Config:
    config = base.get_config()
    config.train.tensorboard, config.train.wandb_project = tensorboard, wandb_project
    return config_lib.from_config_dict(config)


def written(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / records.METRICS_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_records_contain_step_time_and_values(tmp_path: Path) -> None:
    with records.MetricWriter(tmp_path / "new", run_config(), first_step=0) as writer:
        writer.write(10, {"loss": 2.5, "tokens": 640})
    (record,) = written(tmp_path / "new")
    assert record["wall_time"] > 1e9
    assert record == {"step": 10, "wall_time": record["wall_time"], "loss": 2.5, "tokens": 640}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with records.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert [written(tmp_path)[0][key] for key in "abcd"] == [None, None, None, 0.0]


def test_resuming_drops_later_and_torn_records(tmp_path: Path) -> None:
    with records.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step)})
            writer.write(step, {"held_out_loss": float(step)})
    with (tmp_path / records.METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "lo')
    with records.MetricWriter(tmp_path, run_config(), first_step=20) as writer:
        writer.write(30, {"loss": -1.0})
    assert [record["step"] for record in written(tmp_path)] == [10, 10, 20, 20, 30]
    assert written(tmp_path)[-1]["loss"] == -1.0


def test_every_record_is_written_immediately(tmp_path: Path) -> None:
    with records.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        assert len(written(tmp_path)) == 1


def test_tensorboard_is_written_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float, int]] = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter, "add_scalar", lambda _, *scalar: seen.append(scalar)
    )
    with records.MetricWriter(tmp_path, run_config(), first_step=0) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    with records.MetricWriter(tmp_path, run_config(tensorboard=True), first_step=0) as writer:
        writer.write(2, {"loss": 3.0})
    assert seen == [("loss", 3.0, 2)]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = run_config(wandb_project="memory")
    with pytest.raises(config_lib.ConfigError, match=r"pip install -e '\.\[wandb\]'"):
        records.MetricWriter(tmp_path, config, first_step=0)


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
        with records.MetricWriter(tmp_path, config, first_step=step - 1) as writer:
            writer.write(step, {"loss": 1.0})
    first, logged, finished, second = calls[:4]
    assert (first["project"], first["resume"], logged) == ("memory", "allow", (1, {"loss": 1.0}))
    assert finished == "finished"
    assert first["id"] == second["id"]
    assert first["config"]["train"]["wandb_project"] == "memory"
