"""The command line: a mistake is one line, and a tokenizer, shards and a run follow each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_run

ROOT = Path(__file__).parents[1]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=env or dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = run(*arguments, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [TINY, "--mode=inspect", "--config.model.memory.topm=3"],
            "model.memory.topm: unknown field (nearest: top_m)",
        ),
        (
            [TINY, "--mode=inspect", "--config.model.memory.top_m=many"],
            "config.model.memory.top_m",
        ),
        (
            [TINY, "--mode=inspect", "--config.model.memory.top_m=65"],
            "model.memory.top_m=65: must be at most shortlist**2 = 64",
        ),
        (["--config=configs/tniy.py", "--mode=inspect"], "configs/tniy.py"),
        (["--mode=inspect"], "--config: mode 'inspect' needs one"),
        ([TINY], "--workdir: mode 'train' needs the folder of the run"),
        (["--mode=evaluate", "--workdir=/nonexistent"], "/nonexistent/checkpoints does not exist"),
        ([TINY, "--mode=evaluat"], "evaluat"),
        (
            [TINY + ":mixture", "--mode=inspect"],
            "--config=configs/tiny.py:mixture: family 'mixture': must be one of ultramem_v2, moe",
        ),
        (["--config=configs/paper_430m_5b.py:moe", "--mode=inspect"], "the file is of one family"),
        (
            [TINY, "--mode=cost", "--compare=configs/tiny.py:mixture"],
            "--compare=configs/tiny.py:mixture: family 'mixture': must be one of",
        ),
        ([TINY, "--mode=cost", "--compare=configs/none.py"], "--compare=configs/none.py: "),
        ([TINY, "--mode=cost", "--compare=configs/tiny.py"], "tiny is there already"),
        ([TINY, "--mode=cost", "--context=0"], "context=0"),
        (["--mode=import", "--workdir=x"], "--folder: mode 'import' needs the folder"),
        (["--mode=export", "--folder=x"], "--workdir: mode 'export' needs the folder"),
        ([TINY, "--wrkdir=x"], "wrkdir"),
        ([TINY, "inspect"], "inspect: unexpected argument"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str) -> None:
    result = run(*arguments)
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert result.stdout == ""


def test_inspect_lists_every_parameter_as_json() -> None:
    listed = json.loads(
        output_of(TINY, "--mode=inspect", "--json", "--config.model.memory.top_m=16")
    )
    assert listed["config"]["model"]["memory"]["top_m"] == 16
    for parameter in listed["parameters"]:
        assert set(parameter) == {"path", "shape", "dtype", "sharding", "group"}
    by_path = {parameter["path"]: parameter for parameter in listed["parameters"]}
    assert by_path["store/values"] == {
        "path": "store/values",
        "shape": [4, 64 * 64, 48],
        "dtype": "float32",
        "sharding": "replicated",
        "group": "values",
    }
    assert listed["counts"]["embedding"] == 264 * 128


def test_costs_of_several_configurations_stand_side_by_side(tmp_path: Path) -> None:
    arguments = [TINY + ":moe", "--mode=cost", f"--workdir={tmp_path}", "--compare=" + TINY[9:]]
    costs = json.loads(output_of(*arguments, "--json"))["configs"]
    assert list(costs) == ["tiny:moe", "tiny"]
    totals = [cost["parameters"]["total"] for cost in costs.values()]
    assert totals[0] != totals[1]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    header = output_of(*arguments).splitlines()[0]
    assert header.split() == ["tiny:moe", "tiny"]


@pytest.mark.slow
def test_a_run_is_exported_and_imported(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    paths = tiny_run.write_text(tmp_path / "text")
    env = tiny_run.environment(tmp_path / "compiled")
    folder, run, copy = (tmp_path / name for name in ("model", "run", "copy"))
    output_of(*tiny_run.flags(paths), f"--workdir={run}", env=env)
    output_of("--mode=export", f"--workdir={run}", f"--folder={folder}")
    assert (folder / "model.safetensors").exists()
    output_of("--mode=import", f"--folder={folder}", f"--workdir={copy}", env=env)
    losses = [
        json.loads(output_of("--mode=evaluate", "--json", f"--workdir={workdir}", env=env))
        for workdir in (run, copy)
    ]
    assert losses[1]["step"] == 0
    assert losses[1]["held_out_loss"] == pytest.approx(losses[0]["held_out_loss"], rel=1e-6)


@pytest.mark.slow
def test_from_text_to_a_tokenizer_to_shards_to_a_model_to_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    paths = tiny_run.write_text(tmp_path / "text")
    env = tiny_run.environment(tmp_path / "compiled")
    text = tiny_run.flags(paths)

    printed = output_of(
        "--mode=train_tokenizer", *text, f"--workdir={tmp_path}", "--vocab_size=300"
    )
    tokenizer = tmp_path / "bpe_300.json"
    assert printed.split() == [str(tokenizer)]

    shards = tmp_path / "shards"
    of_tokenizer = {"data.tokenizer": tokenizer, "model.vocab_size": 304}
    overrides = [f"--config.{name}={value}" for name, value in of_tokenizer.items()]
    output_of("--mode=prepare", *text, *overrides, f"--workdir={shards}")
    assert list(shards.glob("*.array_record"))
    shutil.rmtree(tmp_path / "text")  # the shards are all that training needs

    records = tiny_run.flags(f"{shards}/*.array_record", data__source="array_record")
    workdir = f"--workdir={tmp_path / 'run'}"
    output_of(*records, *overrides, workdir, env=env)
    losses = [
        record["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in (record := json.loads(line))
    ]
    assert losses[-1] < losses[0] - 0.3

    evaluated = json.loads(output_of("--mode=evaluate", "--json", workdir, env=env))
    assert evaluated["step"] == 12
    assert 0 < evaluated["held_out_bits_per_byte"] < 8
    assert set(evaluated["compressors"]) == {"gzip -9", "bzip2 -9", "xz -9"}
    assert (tmp_path / "run" / "loss.png").exists()

    generated = output_of("--mode=generate", "--prompt=Document 1: the", workdir, env=env)
    assert generated.startswith("Document 1: the")
    assert len(generated.strip()) > len("Document 1: the")
