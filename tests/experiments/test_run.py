"""Sweeps: what is run, what is not run again, and what is stored of it."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import app
from ml_collections import ConfigDict

from configs import base
from experiments import records, run
from experiments.ablations import ABLATIONS
from tests import tiny_run
from umv2 import modes
from umv2.config import from_config_dict
from umv2.cost import accounting


def values(paths: str, **changes: Any) -> ConfigDict:
    config = base.get_config()
    config.update_from_flattened_dict(
        tiny_run.TINY
        | {"data.paths": (paths,)}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def sweep(folder: Path, configs: list[ConfigDict], *, seeds: int = 1) -> run.Sweep:
    jobs = {}
    for index, config in enumerate(configs):
        jobs[records.config_hash(config)] = job = run.Job(config)
        job.names.append(f"test/arm_{index}")
    return run.Sweep(jobs, seeds, folder / "results", folder / "work")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny_run.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


def test_a_run_is_stored_whole_and_not_repeated(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values(paths)
    swept = sweep(tmp_path, [config], seeds=2)
    assert len(swept.unfinished()) == 2
    assert swept.progress() == "0/2 runs"
    swept.run()
    assert swept.unfinished() == []
    assert swept.progress() == "2/2 runs, 0 min left for one process"

    stored = records.read_all(tmp_path / "results")
    (by_seed,) = stored.values()
    first, second = by_seed[0], by_seed[1]
    counts = accounting.parameter_counts(from_config_dict(config).model)
    assert first.head["arms"] == ["test/arm_0"]
    assert first.head["config"]["model"]["hidden_size"] == 16
    assert first.head["tokens"] == 12 * 8 * 16 == first.tokens[-1]
    assert first.head["total_parameters"] == counts.total_without_embeddings
    assert first.head["versions"]["jax"] == jax.__version__
    assert len(first.losses) == 6
    assert len(first.held_out_losses) == 2
    assert first.diverged is None
    assert 0 < first.end["health"]["coverage/layer_1"] <= 1
    # A seed is of the parameters and of the data.
    assert first.losses[0] != second.losses[0]
    assert not list((tmp_path / "work").glob("*/seed_*"))  # checkpoints are gone

    def never(*_: object) -> None:
        raise AssertionError("a finished run is run again")

    monkeypatch.setattr(modes, "train", never)
    sweep(tmp_path, [config], seeds=2).run()


def test_a_run_that_was_interrupted_goes_on_from_its_checkpoint(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after training, before its records are written: nothing is trained again."""
    swept = sweep(tmp_path, [values(paths)])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(records, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            swept.run()
    (metrics,) = (tmp_path / "work").glob("*/seed_0/metrics.jsonl")
    before = [json.loads(line)["wall_time"] for line in metrics.read_text().splitlines()]
    assert len(swept.unfinished()) == 1

    monkeypatch.setattr(run.shutil, "rmtree", lambda path: None)
    swept.run()
    after = [json.loads(line)["wall_time"] for line in metrics.read_text().splitlines()]
    assert after == before
    assert not swept.unfinished()


def test_a_run_that_was_told_to_stop_is_not_taken_for_finished(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object, workdir: Path) -> None:
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')

    monkeypatch.setattr(modes, "train", stopped)
    swept = sweep(tmp_path, [values(paths)])
    with pytest.raises(SystemExit, match=r"arm_0, seed 0: stopped after step 4; start again"):
        swept.run()
    assert len(swept.unfinished()) == 1


def test_an_arm_that_another_process_runs_is_left_to_it(paths: str, tmp_path: Path) -> None:
    taken, free = values(paths), values(paths, model__ffn_size=17)
    swept = sweep(tmp_path, [taken, free])
    lock = tmp_path / "work" / records.config_hash(taken) / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        swept.run()
    assert swept.unfinished() == [(records.config_hash(taken), 0)]


def test_a_run_that_diverges_has_a_result(paths: str, tmp_path: Path) -> None:
    sweep(tmp_path, [values(paths, optimizer__learning_rate=1e30)]).run()
    ((found,),) = [list(s.values()) for s in records.read_all(tmp_path / "results").values()]
    assert found.diverged is not None
    assert "loss nan" in found.diverged or "gradient norm nan" in found.diverged
    assert found.end["answers"] is None


def test_bookkeeping_does_not_make_another_configuration(paths: str) -> None:
    config = values(paths)
    assert records.config_hash(config) == records.config_hash(
        values(paths, train__log_interval_steps=3, train__checkpoint_interval_steps=5)
    )
    assert records.config_hash(config) != records.config_hash(values(paths, train__num_steps=13))


def test_arms_of_equal_configuration_are_one_job() -> None:
    jobs = run.arms_to_run(["heads", "families"], [], "smoke")
    names = [job.names for job in jobs.values()]
    assert names[0] == ["heads/one", "families/ultramem_v2"]
    assert sum(map(len, names)) == len(ABLATIONS["heads"].arms) + len(ABLATIONS["families"].arms)
    (only,) = run.arms_to_run(["heads"], ["two"], "smoke").values()
    assert only.names == ["heads/two"]
    everything = run.arms_to_run(["all"], [], "smoke")
    assert sum(len(job.names) for job in everything.values()) == sum(
        len(entry.arms) for entry in ABLATIONS.values()
    )


@pytest.mark.parametrize(
    ("ablations", "arms", "message"),
    [
        (["head"], [], r"--ablation=head: must be among value_processing,"),
        (["heads"], ["three"], r"--arms=three: must be among one, two"),
    ],
)
def test_what_there_is_not_is_refused(ablations: list[str], arms: list[str], message: str) -> None:
    with pytest.raises(app.UsageError, match=message):
        run.arms_to_run(ablations, arms, "cpu")


@pytest.mark.parametrize(
    "text", ["", "not JSON\n", '{"kind": "run"}\n', '{"kind": "run"}\n{"loss": 1}\n']
)
def test_damaged_records_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs" / "0" / "seed_0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: not the records"):
        records.read_all(tmp_path)
