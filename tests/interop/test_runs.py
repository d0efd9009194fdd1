import json
import shutil
from pathlib import Path

import pytest

from tests import tiny_run
from tests.interop.comparison import assert_same_bits
from tests.tiny_run import Run, logged
from umv2 import files, modes
from umv2.config import Config, ConfigError, to_dict
from umv2.data.tokenizers import load_tokenizer, train_bpe
from umv2.interop import model_files, olmoe, runs
from umv2.interop.tensor_files import InteropError
from umv2.training import checkpoint
from umv2.training.train import train

GOLDEN = Path(__file__).parents[1] / "golden"


def restored(workdir: Path, config: Config) -> checkpoint.Restored:
    return checkpoint.restore_for_inference(workdir / "checkpoints", config)


def assert_same_model(left: checkpoint.Restored, right: checkpoint.Restored) -> None:
    assert_same_bits(left.weights, right.weights)


def test_an_exported_run_is_its_newest_checkpoint(finished: Run, tmp_path: Path) -> None:
    with logged() as messages:
        runs.export_run(finished.workdir, tmp_path / "out")
    assert messages[-1] == f"wrote the model of step 12 to {tmp_path / 'out'}"
    config, model = model_files.load_model(tmp_path / "out")
    assert (config, model.step) == (finished.config, 12)
    assert_same_model(model, restored(finished.workdir, finished.config))


def test_an_imported_run_evaluates_like_the_exported_one(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out", max_shard_bytes=4000)
    runs.import_model(tmp_path / "out", tmp_path / "run", None)
    report = modes.evaluate(None, tmp_path / "run")
    last = json.loads((finished.workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert report.step == 0
    assert report.held_out.loss_nats_per_token == pytest.approx(last["held_out_loss"], rel=1e-6)


def test_an_imported_run_continues_training(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    runs.import_model(tmp_path / "out", tmp_path / "run", None)
    train(finished.config, tmp_path / "run")
    assert restored(tmp_path / "run", finished.config).step == 12
    first, continued = (
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
        for workdir in (finished.workdir, tmp_path / "run")
    )
    assert first["step"] == continued["step"] == 2
    assert continued["loss"] < 0.95 * first["loss"]  # training progress is not lost


def test_an_imported_run_may_have_its_own_configuration(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    config = tiny_run.tiny_config(finished.paths, train__num_steps=4, model__remat="full")
    runs.import_model(tmp_path / "out", tmp_path / "run", config)
    assert checkpoint.saved_config(tmp_path / "run" / "checkpoints") == to_dict(config)
    imported = restored(tmp_path / "run", config)
    assert imported.step == 0
    assert_same_model(imported, restored(finished.workdir, finished.config))


def test_a_model_other_than_that_of_the_folder_is_rejected(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    other = tiny_run.tiny_config(finished.paths, model__ffn_size=32)
    with pytest.raises(ConfigError, match=r"model\.ffn_size: 16 -> 32"):
        runs.import_model(tmp_path / "out", tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    shutil.copytree(finished.workdir, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_json", pytest.fail)  # before anything is read
        with pytest.raises(InteropError, match="already has checkpoints"):
            runs.import_model(tmp_path / "out", tmp_path / "run", None)
    assert restored(tmp_path / "run", finished.config).step == 12


def test_an_existing_folder_is_not_overwritten(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "saved_config", pytest.fail)  # before anything is read
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InteropError, match="already exists; name a new or empty folder"):
        runs.export_run(finished.workdir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run[1]", "the path of a run must not contain"),
        ("file", "file: cannot be created"),
        ("file/run", "cannot be created: Not a directory"),
        ("busy", r"is in use by .* \(training\)"),
    ],
)
def test_an_invalid_run_folder_is_named(
    finished: Run, tmp_path: Path, name: str, message: str
) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with (
        files.locked(tmp_path / "busy" / "lock", "training"),
        pytest.raises(files.FileError, match=message),
    ):
        runs.import_model(tmp_path / "out", tmp_path / name, None)
    assert not (tmp_path / name / "checkpoints").exists()


def test_a_damaged_model_leaves_no_checkpoint(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InteropError, match=r"model\.safetensors: damaged"):
        runs.import_model(tmp_path / "out", tmp_path / "run", None)
    assert not (tmp_path / "run" / "checkpoints").exists()
    path.write_bytes(content)
    runs.import_model(tmp_path / "out", tmp_path / "run", None)
    assert restored(tmp_path / "run", finished.config).step == 0


def test_the_tokenizer_is_exported_and_imported(finished: Run, tmp_path: Path) -> None:
    runs.export_run(finished.workdir, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    runs.import_model(tmp_path / "out", tmp_path / "same", None)
    assert saved_tokenizer(tmp_path / "same") == "bytes"

    # As if the run had been trained with another tokenizer, whose file is not on this machine.
    train_bpe(["a text", "of few words"], 257, tmp_path / "out" / "tokenizer.json")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["config"]["data"]["tokenizer"] = "/elsewhere/bpe.json"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with logged() as messages:
        runs.import_model(tmp_path / "out", tmp_path / "run", None)
    copy = tmp_path / "run" / "tokenizer.json"
    assert (
        f"using the tokenizer of {tmp_path / 'out'}:"
        f" data.tokenizer: '/elsewhere/bpe.json' -> '{copy}'"
    ) in messages
    shutil.rmtree(tmp_path / "out")
    assert saved_tokenizer(tmp_path / "run") == str(copy)
    assert load_tokenizer(str(copy)) is not None


def saved_tokenizer(workdir: Path) -> str:
    config = checkpoint.saved_config(workdir / "checkpoints")
    tokenizer = config["data"]["tokenizer"]
    assert isinstance(tokenizer, str)
    return tokenizer


def test_a_run_without_experts_cannot_be_exported_as_olmoe(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"model\.ffn='dense': must be 'moe'"):
        runs.export_run(finished.workdir, tmp_path / "out", "olmoe")
    assert not (tmp_path / "out").exists()


def test_olmoe_is_imported_as_a_run_and_exported_again(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(GOLDEN / "olmoe_lm_config.json", folder / "config.json")
    shutil.copy(GOLDEN / "olmoe_lm_params_hub.safetensors", folder / "model.safetensors")
    with pytest.raises(ConfigError, match="--config: required"):
        runs.import_model(folder, tmp_path / "run", None)
    config = tiny_run.tiny_config("*.txt")
    with logged() as messages:
        runs.import_model(folder, tmp_path / "run", config)
    assert f"{folder / 'config.json'} says model.ffn: 'dense' -> 'moe'" in messages
    memory = "model.memory.layer: 'product_key' -> 'none'"
    assert f"{folder / 'config.json'} says {memory}" in messages
    assert f"{folder} has no tokenizer; keeping data.tokenizer='bytes'" in messages
    runs.export_run(tmp_path / "run", tmp_path / "out", "olmoe")
    theirs, ours = (olmoe.load_olmoe(path, config.model) for path in (folder, tmp_path / "out"))
    assert theirs[0] == ours[0]
    assert_same_bits(theirs[1], ours[1])


def test_losses_that_do_not_fit_the_imported_model_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(GOLDEN / "olmoe_lm_config.json", folder / "config.json")
    shutil.copy(GOLDEN / "olmoe_lm_params_hub.safetensors", folder / "model.safetensors")
    config = tiny_run.tiny_config("*.txt", loss__balance_loss=0.1)
    with pytest.raises(ConfigError, match=r"loss\.balance_loss=0\.1: needs memory layers"):
        runs.import_model(folder, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
