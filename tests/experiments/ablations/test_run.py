"""Sweeps: what is run, what is not repeated, and what is stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import base
from experiments import measurements
from experiments.ablations import records, run
from experiments.ablations.catalogue import ABLATIONS
from tests import tiny_run
from umv2 import files, modes
from umv2.config import from_config_dict
from umv2.config.schema import ConfigError
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
    jobs = [run.Job(config) for config in configs]
    for index, job in enumerate(jobs):
        job.names.append(f"test/arm_{index}")
    return run.Sweep(jobs, seeds, folder / "results", folder / "work")


def stored(folder: Path) -> records.Stored:
    return records.Stored(folder / "results")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny_run.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.mark.slow
def test_a_complete_run_is_stored_and_not_repeated(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values(paths)
    swept = sweep(tmp_path, [config], seeds=2)
    assert len(swept.unfinished()) == 2
    assert swept.progress() == "0/2 runs"
    swept.run()
    assert swept.unfinished() == []
    assert swept.progress() == "2/2 runs, 0 min left for one process"

    first, second = stored(tmp_path).find(config).values()
    assert (tmp_path / "results" / "test" / "arm_0" / "seed_1.jsonl").exists()
    assert [first.seed, second.seed] == [0, 1]
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
    # The seed is that of the parameters and of the data.
    assert first.losses[0] != second.losses[0]
    assert not list((tmp_path / "work").glob("*/*/seed_*"))  # checkpoints are gone

    def never(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(modes, "train", never)
    sweep(tmp_path, [config], seeds=2).run()


@pytest.mark.slow
def test_an_interrupted_run_resumes_from_its_checkpoint(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after training, before its records are written: training is not repeated."""
    swept = sweep(tmp_path, [values(paths)])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measurements, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            swept.run()
    (metrics,) = (tmp_path / "work").glob("*/*/seed_0/metrics.jsonl")
    before = [json.loads(line)["wall_time"] for line in metrics.read_text().splitlines()]
    assert len(swept.unfinished()) == 1

    monkeypatch.setattr(run.shutil, "rmtree", lambda path: None)
    swept.run()
    after = [json.loads(line)["wall_time"] for line in metrics.read_text().splitlines()]
    assert after == before
    assert not swept.unfinished()


def test_a_run_stopped_by_a_signal_is_not_finished(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "train", lambda config, workdir: False)
    swept = sweep(tmp_path, [values(paths)], seeds=2)
    with pytest.raises(KeyboardInterrupt):
        swept.run()
    assert len(swept.unfinished()) == 2


def test_ctrl_c_prints_how_to_resume(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Sweep, "run", stop)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with flagsaver.flagsaver(
        ablation=["heads"],
        scale="smoke",
        results=str(tmp_path / "results"),
        workdir=str(tmp_path / "work"),
    ):
        flags.FLAGS.mark_as_parsed()
        with pytest.raises(KeyboardInterrupt):
            run.main([])
    assert capsys.readouterr().out == "0/6 runs; run the same command again to resume\n"


@pytest.mark.slow
def test_an_arm_locked_by_another_process_is_skipped(
    paths: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked, free = values(paths), values(paths, model__ffn_size=17)
    swept = sweep(tmp_path, [locked, free])
    with files.locked(tmp_path / "work" / "test" / "arm_0" / "lock", "another sweep"):
        swept.run()
    assert swept.unfinished() == [(swept.jobs[0], 0)]
    assert "test/arm_0: " in capsys.readouterr().out


def test_a_sweep_fails_before_training_if_results_cannot_be_written(
    paths: str, tmp_path: Path
) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(files.FileError, match=f"{tmp_path / 'results'}: cannot be created"):
        sweep(tmp_path, [values(paths)])


@pytest.mark.slow
def test_a_full_disk_loses_no_training(
    paths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values(paths)
    swept = sweep(tmp_path, [config])

    def full(*_: object) -> None:
        raise files.FileError("seed_0.jsonl: cannot be written: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_text", full)
        with pytest.raises(files.FileError, match="No space left"):
            swept.run()
    (metrics,) = (tmp_path / "work").glob("*/*/seed_0/metrics.jsonl")
    trained = metrics.read_text()
    monkeypatch.setattr(run.shutil, "rmtree", lambda path: None)
    swept.run()
    assert metrics.read_text() == trained
    assert not swept.unfinished()


@pytest.mark.slow
def test_a_diverged_run_has_a_result(paths: str, tmp_path: Path) -> None:
    sweep(tmp_path, [values(paths, optimizer__learning_rate=1e30)]).run()
    (result,) = stored(tmp_path).runs.values()
    assert result.diverged is not None
    assert "loss nan" in result.diverged or "gradient norm nan" in result.diverged
    assert result.end["answers"] is None


def test_bookkeeping_fields_do_not_change_the_identity(paths: str) -> None:
    config = values(paths)
    assert records.identity(config) == records.identity(
        values(paths, train__log_interval_steps=3, train__checkpoint_interval_steps=5)
    )
    assert records.identity(config) != records.identity(values(paths, train__num_steps=13))


def test_arms_with_equal_configurations_share_a_job() -> None:
    jobs = run.arms_to_run(["families", "heads"], [], "smoke")
    assert "families/ultramem_v2" in jobs[0].names
    assert "heads/one" in jobs[0].names
    # The first arm in the catalogue, for any ablation: two sweeps use the same file.
    assert jobs[0].names[0] == run.arms_to_run(["heads"], ["one"], "smoke")[0].names[0]
    assert len(jobs) == len(ABLATIONS["heads"].arms) + len(ABLATIONS["families"].arms) - 1
    (only,) = run.arms_to_run(["heads"], ["two"], "smoke")
    assert only.names == ["heads/two"]
    all_jobs = run.arms_to_run(["heads", "all"], [], "smoke")
    assert sum(len(job.names) for job in all_jobs) == sum(
        len(entry.arms) for entry in ABLATIONS.values()
    )


def test_a_job_answers_questions_if_any_of_its_arms_does() -> None:
    jobs = run.jobs_of("smoke")
    assert jobs["multi_hop/moe"].answers
    assert not jobs["heads/two"].answers


@pytest.mark.parametrize(
    ("ablations", "arms", "message"),
    [
        ([], [], r"--ablation: must name one of value_processing,"),
        (["head"], [], r"--ablation=head: must be one of value_processing,.*\(nearest: heads\)"),
        (["heads"], ["tow"], r"--arms=tow: must be one of one, two \(nearest: two\)"),
    ],
)
def test_unknown_names_are_rejected(ablations: list[str], arms: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.arms_to_run(ablations, arms, "cpu")
