"""The command line: one-line errors, and the path from a tokenizer to shards to a run."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl.testing import flagsaver

from tests import tiny_run
from umv2 import cli, command, modes
from umv2.config import Config, to_dict
from umv2.training import checkpoint

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Completed:
    """The status and output of a command."""

    status: int
    out: str
    err: str


def run(*arguments: str) -> Completed:
    """Runs the command in this process, where JAX is imported."""
    status, message = 0, ""
    out = io.StringIO()
    flags = flagsaver.save_flag_values(cli.FLAGS)
    with contextlib.redirect_stdout(out):
        try:
            with command.one_line_errors():
                cli.main(cli.parse(["umv2", *arguments]))
        except SystemExit as completed:
            status, message = int(bool(completed.code)), str(completed.code or "")
        finally:
            flagsaver.restore_flag_values(flags, cli.FLAGS)
    return Completed(status, out.getvalue(), message)


def start(
    *arguments: str, env: dict[str, str] | None = None, **streams: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a new process."""
    pipe = subprocess.PIPE
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=env or dict(os.environ),
        text=True,
        check=False,
        **{"stdout": pipe, "stderr": pipe} | streams,
    )


def output_of(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = start(*arguments, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


TINY = "--config=configs/tiny.py"
INSPECT, COST = "--mode=inspect", "--mode=cost"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [TINY, INSPECT, "--config.model.memory.topm=3"],
            "model.memory.topm: unknown field (nearest: top_m)",
        ),
        (
            [TINY, INSPECT, "--config.model.memory.top_m=many"],
            "--config.model.memory.top_m='many': must be an integer",
        ),
        (
            [TINY, INSPECT, "--config.model.memory.top_m=65"],
            "model.memory.top_m=65: must be at most shortlist**2 = 64",
        ),
        (["--config.modle.ffn_size=3", TINY, INSPECT], "--config.modle: unknown field"),
        ([TINY, INSPECT, "--config.seed"], "Missing value for flag --config.seed"),
        ([TINY, INSPECT, "--noconfig.seed"], "--noconfig.seed: unknown flag"),
        ([TINY, INSPECT, "--config.=1"], "--config.: unknown field"),
        ([TINY, INSPECT, "--config.model=3"], "--config.model: is a section, not a value"),
        (["--config=configs/tniy.py", INSPECT], "(nearest: configs/tiny.py)"),
        (["--config=", INSPECT], "--config: must not be empty"),
        (["--config", INSPECT], "mode 'train' needs"),
        ([INSPECT], "--config: mode 'inspect' needs one"),
        ([INSPECT, "--config.seed=1"], "--config: mode 'inspect' needs one"),
        ([TINY], "--workdir: mode 'train' needs the folder of the run"),
        ([TINY, "--workdir="], "--workdir: must not be empty"),
        ([TINY, "--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: must be a local path"),
        ([TINY, "--workdir=~nobody-at-all/x"], "--workdir=~nobody-at-all/x: "),
        (["--workdir=/nonexistent"], "--config: mode 'train' needs one"),
        (["--mode=evaluate", "--workdir=/nonexistent"], "/nonexistent/checkpoints does not exist"),
        (
            ["--mode=evaluate", "--workdir=/nonexistent", "--config.evaluation.batch_size=4"],
            "/nonexistent/checkpoints does not exist",
        ),
        (["--mode=generate", "--workdir=/nonexistent", "--prompt=\udcff"], "must be text in UTF-8"),
        ([TINY, "--mode=evaluat"], "evaluat"),
        ([TINY + ":mixture", INSPECT], "family 'mixture': must be one of ultramem_v2, moe"),
        (["--config=configs/paper_430m_5b.py:moe", INSPECT], "takes no argument"),
        (
            [TINY, COST, "--compare=configs/tiny.py:mixture"],
            "--compare=configs/tiny.py:mixture: family 'mixture': must be one of",
        ),
        ([TINY, COST, "--compare=configs/none.py"], "--compare=configs/none.py: no such file"),
        ([TINY, COST, "--compare=configs/tiny.py"], "tiny is given twice"),
        ([TINY, COST, "--compare="], "--compare: must not be empty"),
        ([TINY, COST, "--compare=tiny:moe,,dense"], "--compare='': must not be empty"),
        ([TINY, COST, "--compare=s3://bucket/tiny.py"], "must be a local path"),
        (
            [TINY, COST, "--workdir=gs://bucket/cost"],
            "--workdir=gs://bucket/cost: must be a local path",
        ),
        ([TINY, COST, "--context=0"], "context=0"),
        ([TINY, COST, "--context=1.5"], "context=1.5"),
        ([TINY, COST, f"--context={10**19}"], "context=10000000000000000000"),
        ([TINY, COST, f"--context={'9' * 5000}"], "context=9999"),
        ([TINY, "--workdir=x", f"--process_id={2**31}"], "process_id=2147483648"),
        (["--mode=import", "--workdir=x"], "--folder: mode 'import' needs the folder"),
        (
            ["--mode=import", "--workdir=x", "--folder=y", "--config.seed=1"],
            "--config.seed: mode 'import' needs --config=FILE as well",
        ),
        (
            ["--mode=import", "--workdir=x", "--folder=gs://b"],
            "--folder=gs://b: must be a local path",
        ),
        (["--mode=export", "--folder=x"], "--workdir: mode 'export' needs the folder"),
        (
            ["--mode=export", "--folder=x", "--workdir=y", "--config.seed=1"],
            "--config.seed: mode 'export' needs",
        ),
        ([TINY, "--mode=export"], "--config: is not used by mode 'export'"),
        ([TINY, "--mode=plan"], "--topology: mode 'plan' needs one"),
        (["--mode=plan", "--topology=h200:8"], "--config: mode 'plan' needs one"),
        ([TINY, "--mode=plan", "--topology=h200:8", "--search_limit=3"], "needs --search"),
        (["--mode=prepare", "--workdir=x"], "--config: mode 'prepare' needs one"),
        ([TINY, "--workdir=x", "--limit=3"], "--limit: is not used by mode 'train'"),
        (["--mode=evaluate", "--workdir=x", "--limit=3"], "--limit: needs harness tasks"),
        (["--mode=evaluate", "--workdir=x", "--suite="], "--suite: must not be empty"),
        (
            ["--mode=evaluate", "--workdir=x", "--suite=arc_easy", "--include_path=gs://b"],
            "--include_path=gs://b: must be a local path",
        ),
        ([TINY, INSPECT, "--nojson=3"], "--nojson=3 does not take an argument"),
        ([TINY, INSPECT, "--json=perhaps"], "Non-boolean argument"),
        ([TINY, "--wrkdir=x"], "wrkdir"),
        ([TINY, "--flagfile=/nonexistent"], "/nonexistent"),
        ([TINY, "inspect"], "inspect: unexpected argument"),
        ([TINY, "inspect", "--config.seed=1"], "inspect: unexpected argument"),
    ],
)
def test_a_mistake_is_a_one_line_error(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    completed = run(*arguments)
    assert completed.status == 1
    assert len(completed.err.splitlines()) == 1, completed.err
    assert completed.err.startswith("error: ")
    assert expected in completed.err
    assert completed.out == ""


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--config=tiny", "--mode=inspect", "--config.seed=x"], 1, "config.seed='x'"),
        (["--config=tiny", "--mode=nonsense"], 1, "nonsense"),
        (["--help"], 0, ""),
    ],
)
def test_a_mistake_is_found_before_jax_is_imported(
    tmp_path: Path, arguments: list[str], status: int, expected: str
) -> None:
    (tmp_path / "jax.py").write_text("raise AssertionError('jax is imported')\n")
    result = start(*arguments, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == status, result.stderr
    assert len(result.stderr.splitlines()) == status
    assert expected in result.stderr
    assert bool(result.stdout) == (status == 0)


def test_help_lists_every_mode_and_every_flag_once() -> None:
    completed = run("--help")
    for name in cli._FLAG_MODES:
        assert len(re.findall(rf"^ +--(\[no\])?{name}:", completed.out, re.MULTILINE)) == 1
    unwrapped = re.sub(r"\s", "", completed.out)
    for mode, what in cli._MODES.items():
        assert re.sub(r"\s", "", f"{mode}: {what}") in unwrapped


def test_flags_of_a_mode_are_rejected_by_the_others() -> None:
    values = {"context": "1", "plan_step": "decode", "format": "umv2", "process_id": "0"}
    numbers = ("num_fewshot", "limit", "search_limit", "vocab_size")
    for name, its_modes in cli._FLAG_MODES.items():
        value = values.get(name, "300" if name in numbers else "true")
        for mode in set(cli._MODES) - set(its_modes):
            completed = run(f"--mode={mode}", f"--{name}={value}")
            assert completed.err == f"error: --{name}: is not used by mode {mode!r}"


@pytest.mark.parametrize("mode", ["train", "evaluate", "generate"])
def test_overrides_apply_to_the_stored_configuration_of_a_run(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tiny_run.tiny_config("a/*.txt")
    used: list[Config] = []

    def use(config: Config, *_: object) -> Answer:
        used.append(config)
        return Answer()

    monkeypatch.setattr(checkpoint, "saved_config", lambda _: to_dict(stored))
    monkeypatch.setattr(modes, mode, use)
    (tmp_path / "checkpoints").mkdir()
    command = [f"--workdir={tmp_path}", f"--mode={mode}"]

    assert run(*command).status == 0
    overrides = {"evaluation.batch_size": 4, "generate.temperature": 0.0, "data.paths": ("b",)}
    assert run(*command, *(f"--config.{k}={v}" for k, v in overrides.items())).status == 0
    expected = tiny_run.tiny_config("b", **{k.replace(".", "__"): v for k, v in overrides.items()})
    assert used == [stored, expected]

    refused = run(*command, "--config.generate.temperature=-1")
    assert refused.err == "error: generate.temperature=-1.0: must be >= 0"
    assert len(used) == 2


class Answer:
    """Stub for the text of a model and for the report of an evaluation."""

    def __init__(self) -> None:
        self.pieces = ["prompt", " text"]

    def __next__(self) -> str:
        return self.pieces.pop()

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def table(self) -> str:
        return "table"


def test_the_configuration_of_a_run_is_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = to_dict(tiny_run.tiny_config("a/*.txt"))
    monkeypatch.setattr(checkpoint, "saved_config", lambda _: stored)
    listed = run(f"--workdir={tmp_path}", INSPECT, "--json", "--config.seed=9").out
    assert json.loads(listed)["config"] == stored | {"seed": 9}


def test_a_flag_file_may_hold_overrides(tmp_path: Path) -> None:
    (tmp_path / "flags").write_text(
        "--config=tiny\n--config.seed=3\n--noconfig.train.tensorboard\n"
    )
    config = json.loads(run(INSPECT, "--json", f"--flagfile={tmp_path}/flags").out)["config"]
    assert (config["seed"], config["train"]["tensorboard"]) == (3, False)


def test_the_last_value_of_a_flag_wins_and_tuples_are_appended() -> None:
    config = json.loads(
        run(
            *("--config.seed=1", "--config.data.paths=a", TINY, INSPECT, "--json"),
            *("--config.seed", "2", "--config.data.paths=b", "--config.train.tensorboard"),
        ).out
    )["config"]
    assert (config["seed"], config["data"]["paths"]) == (2, ["a", "b"])
    assert config["train"]["tensorboard"] is True


def test_text_is_printed_after_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def generate(*_: object) -> Iterator[str]:
        yield "prompt"
        events.append("log")
        yield " and"
        yield " text"

    monkeypatch.setattr(modes, "generate", generate)
    monkeypatch.setattr(cli, "_config_of_run", lambda _: None)
    monkeypatch.setattr(command, "write", lambda text, end="\n": events.append(text + end))
    run("--mode=generate", "--workdir=x", "--prompt=prompt")
    assert events == ["log", "prompt and", " text", "\n"]


@pytest.mark.parametrize(
    ("redirection", "status", "expected"),
    [
        ("> /dev/full", 1, "error: standard output: No space left on device"),
        ("< /dev/null 1<&0", 1, "error: standard output: Bad file descriptor"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("2> /dev/full", 0, ""),
        ("| true", 141, ""),
    ],
)
def test_failures_of_standard_output_print_no_traceback(
    redirection: str, status: int, expected: str
) -> None:
    """Uses the command with the most output, in a process without JAX: the help."""
    program = f"set -o pipefail; exec {sys.executable} main.py --help {redirection}"
    program = program.replace("exec", "") if "|" in redirection else program
    result = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == status
    assert result.stderr.strip() == expected


def test_output_in_another_encoding_escapes_what_it_cannot_show(tmp_path: Path) -> None:
    (tmp_path / "ä.py").write_text("raise ValueError('日本')\n")
    result = start(
        *(f"--config={tmp_path}/ä.py", INSPECT), env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert "\\u65e5\\u672c" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_inspect_lists_every_parameter_as_json() -> None:
    listed = json.loads(run(TINY, INSPECT, "--json", "--config.model.memory.top_m=16").out)
    assert listed["config"]["model"]["memory"]["top_m"] == 16
    for parameter in listed["parameters"]:
        assert set(parameter) == {"name", "shape", "dtype", "sharding", "group"}
    by_name = {parameter["name"]: parameter for parameter in listed["parameters"]}
    assert by_name["store/values"] == {
        "name": "store/values",
        "shape": [4, 64 * 64, 48],
        "dtype": "float32",
        "sharding": "replicated",
        "group": "values",
    }
    assert listed["counts"]["embedding"] == 264 * 128


def test_costs_of_several_configurations_are_shown_side_by_side(tmp_path: Path) -> None:
    arguments = [TINY + ":moe", "--mode=cost", f"--workdir={tmp_path}", "--compare=" + TINY[9:]]
    costs = json.loads(run(*arguments, "--json").out)["configs"]
    assert list(costs) == ["tiny:moe", "tiny"]
    totals = [cost["parameters"]["total"] for cost in costs.values()]
    assert totals[0] != totals[1]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    header = run(*arguments).out.splitlines()[0]
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
    shutil.rmtree(tmp_path / "text")  # training needs only the shards

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
