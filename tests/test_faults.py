"""Invalid inputs and machine failures in all modes: a one-line error, and nothing is lost.

Every case is a command that must fail. It must print one line that names the user's input, no
traceback and no result, and must not change the run that it was given.
"""

import dataclasses
import gzip
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_run
from tests.commands import ROOT, TRACE, Commands, Completed
from tests.tiny_run import Run


@pytest.fixture(scope="module")
def commands(finished: Run) -> Iterator[Commands]:
    started = Commands("umv2.modes", environment=tiny_run.environment(finished.cache))
    yield started
    started.close()


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The environment of a case: an empty folder, a copy of a finished run, and its text."""

    tmp: Path
    run: Path
    text: str

    @property
    def flags(self) -> list[str]:
        """Returns the configuration of the run as flags."""
        return tiny_run.flags(self.text)

    def file(self, name: str, content: str | bytes) -> Path:
        """Writes a file in the folder of the case."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, source: str) -> str:
        """Writes a configuration file, and returns the flag for it."""
        return f"--config={self.file('mine.py', source)}"


@pytest.fixture
def workspace(finished: Run, tmp_path: Path) -> Workspace:
    run = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    return Workspace(tmp_path, run, finished.paths)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns all files of a run except its lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_one_line(completed: Completed, expected: str) -> None:
    assert completed.status != 0, completed
    assert TRACE not in completed.errors, completed.errors
    lines = completed.errors.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, completed.errors
    assert lines[-1].startswith("error: "), completed.errors
    assert expected in lines[-1], completed.errors
    assert completed.output == ""


type Arguments = Callable[[Workspace], list[str]]


def of_run(*flags: str) -> Arguments:
    return lambda workspace: [f"--workdir={workspace.run}", *flags]


def training(*flags: str, workdir: str = "new") -> Arguments:
    return lambda workspace: [*workspace.flags, f"--workdir={workspace.tmp / workdir}", *flags]


def on_text(name: str, content: str | bytes, *flags: str, mode: str = "train") -> Arguments:
    def arguments(workspace: Workspace) -> list[str]:
        path = workspace.file(f"input/{name}", content)
        return [
            *tiny_run.flags(str(path)),
            f"--workdir={workspace.tmp / 'new'}",
            f"--mode={mode}",
            *flags,
        ]

    return arguments


def written_config(source: str, *flags: str) -> Arguments:
    return lambda workspace: [workspace.config(source), "--mode=inspect", *flags]


def file_as_workdir(*flags: str) -> Arguments:
    return lambda workspace: [*workspace.flags, f"--workdir={workspace.file('file', 'x')}", *flags]


HEAD = "from configs import base\ndef get_config():\n    config = base.get_config()\n"

CASES: dict[str, tuple[Arguments, str]] = {
    # Flags.
    "unknown flag": (of_run("--wrkdir=x"), "wrkdir"),
    "unknown mode": (of_run("--mode=evaluat"), "evaluat"),
    "an argument": (of_run("evaluate"), "evaluate: unexpected argument"),
    "no workdir": (lambda workspace: workspace.flags, "--workdir"),
    "empty workdir": (lambda workspace: [*workspace.flags, "--workdir="], "--workdir"),
    "no config": (lambda workspace: ["--mode=inspect"], "--config"),
    "empty config": (lambda workspace: ["--config=", "--mode=inspect"], "--config"),
    "context of zero": (
        lambda workspace: ["--config=tiny", "--mode=cost", "--context=0"],
        "context=0",
    ),
    "context of text": (
        lambda workspace: ["--config=tiny", "--mode=cost", "--context=x"],
        "context=x",
    ),
    "limit of zero": (of_run("--mode=evaluate", "--suite=arc_easy", "--limit=0"), "limit=0"),
    "limit without a suite": (of_run("--mode=evaluate", "--limit=1"), "--limit"),
    "two suites": (of_run("--mode=evaluate", "--suite=long_context,arc_easy"), "long_context"),
    "a flag of another mode": (of_run("--mode=evaluate", "--topology=v5e:2x2"), "--topology"),
    "prompt for training": (training("--prompt=x"), "--prompt"),
    "unknown format": (of_run("--mode=export", "--folder=x", "--format=gguf"), "gguf"),
    "no folder": (of_run("--mode=export"), "--folder"),
    "vocabulary too small": (
        training("--mode=train_tokenizer", "--vocab_size=10"),
        "vocab_size",
    ),
    "process_id alone": (training("--process_id=1"), "--process_id=1"),
    "process beyond the number": (
        training("--process_id=2", "--num_processes=2", "--coordinator_address=localhost:1"),
        "--process_id=2",
    ),
    "address without a port": (
        training("--process_id=0", "--num_processes=2", "--coordinator_address=localhost"),
        "--coordinator_address=localhost",
    ),
    "prepare in several processes": (training("--mode=prepare", "--num_processes=2"), "prepare"),
    # Paths.
    "bucket to train in": (
        lambda workspace: [*workspace.flags, "--workdir=gs://bucket/x"],
        "gs://bucket/x",
    ),
    "bucket to prepare in": (
        lambda workspace: [*workspace.flags, "--mode=prepare", "--workdir=s3://bucket/x"],
        "s3://bucket/x",
    ),
    "bucket to export to": (of_run("--mode=export", "--folder=gs://bucket/x"), "gs://bucket/x"),
    "bucket to import from": (
        lambda workspace: [
            "--mode=import",
            f"--workdir={workspace.tmp / 'n'}",
            "--folder=hf://x/y",
        ],
        "hf://x/y",
    ),
    "bucket for costs": (
        lambda workspace: ["--config=tiny", "--mode=cost", "--workdir=gs://b/x"],
        "gs://b/x",
    ),
    "bucket of text": (
        lambda workspace: [*tiny_run.flags("gs://b/*.txt"), f"--workdir={workspace.tmp / 'new'}"],
        "gs://b/*.txt",
    ),
    "brackets in a name": (training(workdir="a[b]"), "must not contain [ ]"),
    "star in a name": (training(workdir="a*"), "must not contain *"),
    "question mark in a name": (training(workdir="a?"), "must not contain ?"),
    "backslash in a name": (training(workdir="a\\b"), "must not contain \\"),
    "brackets in a parent folder": (training(workdir="a[b]/c/d"), "must not contain [ ]"),
    "name too long": (training(workdir="n" * 300), "File name too long"),
    "null byte": (
        lambda workspace: [*workspace.flags, "--workdir=a\0b"],
        "null bytes",
    ),
    "home of an unknown user": (
        lambda workspace: [*workspace.flags, "--workdir=~no_such_user/x"],
        "~no_such_user",
    ),
    "file to train in": (file_as_workdir(), "file: "),
    "file to prepare in": (file_as_workdir("--mode=prepare"), "file: "),
    "file for a tokenizer": (file_as_workdir("--mode=train_tokenizer", "--vocab_size=300"), "file"),
    "file to import into": (
        lambda workspace: [
            "--mode=import",
            f"--folder={workspace.tmp}",
            f"--workdir={workspace.file('file', 'x')}",
            "--config=tiny",
        ],
        "",
    ),
    "file to evaluate": (
        lambda workspace: ["--mode=evaluate", f"--workdir={workspace.file('file', 'x')}"],
        "file/checkpoints does not exist",
    ),
    "run that does not exist": (
        lambda workspace: ["--mode=evaluate", f"--workdir={workspace.tmp / 'none'}"],
        "none/checkpoints does not exist",
    ),
    "folder of exports in use": (
        lambda workspace: [
            f"--workdir={workspace.run}",
            "--mode=export",
            f"--folder={workspace.run}",
        ],
        "run",
    ),
    "file as folder of exports": (
        lambda workspace: [
            f"--workdir={workspace.run}",
            "--mode=export",
            f"--folder={workspace.file('file', 'x')}",
        ],
        "file",
    ),
    "import of nothing": (
        lambda workspace: [
            "--mode=import",
            f"--folder={workspace.tmp}",
            f"--workdir={workspace.tmp / 'n'}",
        ],
        "config.json",
    ),
    "import over a run": (
        lambda workspace: [
            "--mode=import",
            f"--folder={workspace.tmp}",
            f"--workdir={workspace.run}",
        ],
        "",
    ),
    # Configuration files.
    "no such file": (lambda workspace: ["--config=configs/tniy.py", "--mode=inspect"], "tniy"),
    "no such name": (lambda workspace: ["--config=tniy", "--mode=inspect"], "tniy"),
    "a folder": (lambda workspace: ["--config=configs", "--mode=inspect"], "configs"),
    "empty file": (written_config(""), "get_config"),
    "no get_config": (written_config("x = 1\n"), "get_config"),
    "syntax error": (written_config("def get_config(:\n    pass\n"), "mine.py"),
    "unfinished string": (written_config('x = "\n'), "mine.py"),
    "bad indentation": (written_config("def get_config():\nreturn 1\n"), "mine.py"),
    "not UTF-8": (
        lambda workspace: [
            f"--config={workspace.file('mine.py', b'x = ' + bytes([255]))}",
            "--mode=inspect",
        ],
        "mine.py",
    ),
    "binary file": (
        lambda workspace: [
            f"--config={workspace.file('mine.py', bytes(range(256)))}",
            "--mode=inspect",
        ],
        "mine.py",
    ),
    "missing module": (written_config("import no_such_module\n"), "no_such_module"),
    "missing name": (written_config("from configs import no_such\n"), "no_such"),
    "get_config raises": (written_config("def get_config():\n    1 / 0\n"), "division by zero"),
    "get_config returns nothing": (written_config("def get_config():\n    pass\n"), "mine.py"),
    "get_config returns a list": (written_config("def get_config():\n    return []\n"), "mine.py"),
    "get_config is not a function": (written_config("get_config = 3\n"), "get_config"),
    "get_config with two arguments": (
        written_config("def get_config(a, b):\n    pass\n"),
        "mine.py",
    ),
    "misspelt section": (
        written_config(HEAD + "    config.modl.hidden_size = 8\n    return config\n"),
        "modl",
    ),
    "misspelt field": (
        written_config(HEAD + "    config.model.hidden_sise = 8\n    return config\n"),
        "hidden_sise",
    ),
    "wrong type": (
        written_config(HEAD + "    config.model.hidden_size = '8'\n    return config\n"),
        "hidden_size",
    ),
    "section as a number": (
        written_config(HEAD + "    config.model = 8\n    return config\n"),
        "model",
    ),
    "deleted field": (
        written_config(HEAD + "    del config.model.hidden_size\n    return config\n"),
        "hidden_size",
    ),
    "new field": (
        written_config(HEAD + "    config.model.colour = 'red'\n    return config\n"),
        "colour",
    ),
    "unknown family": (lambda workspace: ["--config=tiny:mixture", "--mode=inspect"], "mixture"),
    "family of a file without families": (
        lambda workspace: ["--config=paper_430m_5b:moe", "--mode=inspect"],
        "leave out the colon",
    ),
    "two colons": (lambda workspace: ["--config=tiny:moe:dense", "--mode=inspect"], "moe:dense"),
    "comparison with no file": (
        lambda workspace: ["--config=tiny", "--mode=cost", "--compare=none"],
        "--compare=none",
    ),
    "comparison with itself": (
        lambda workspace: ["--config=tiny", "--mode=cost", "--compare=tiny"],
        "tiny is given twice",
    ),
    "comparison with a broken file": (
        lambda workspace: [
            "--config=tiny",
            "--mode=cost",
            f"--compare={workspace.file('other.py', 'def get_config(:')}",
        ],
        "other.py",
    ),
    # Overrides.
    "unknown field": (training("--config.model.memory.topm=3"), "topm"),
    "unknown section": (training("--config.modl.x=3"), "modl"),
    "field of a field": (training("--config.seed.x=3"), "seed"),
    "section as a value": (training("--config.model=3"), "model"),
    "text for a number": (training("--config.train.num_steps=many"), "num_steps"),
    "fraction for a number": (training("--config.train.num_steps=1.5"), "num_steps"),
    "text for a switch": (training("--config.train.tensorboard=perhaps"), "tensorboard"),
    "no tuple": (training("--config.data.paths=[("), "paths"),
    "text for a tuple": (training("--config.evaluation.long_context.lengths=long"), "lengths"),
    "unknown choice": (training("--config.model.remat=some"), "remat"),
    "seed below zero": (training("--config.seed=-1"), "seed=-1"),
    "seed of 32 bits": (training(f"--config.seed={2**31}"), "seed"),
    "seed of 64 bits": (training(f"--config.seed={2**63}"), "seed"),
    "seed of 100 digits": (training(f"--config.data.seed={10**99}"), "data.seed"),
    "seed of samples": (
        of_run("--mode=generate", f"--config.generate.seed={2**40}"),
        "generate.seed",
    ),
    "rate of infinity": (training("--config.optimizer.learning_rate=inf"), "learning_rate"),
    "rate of NaN": (training("--config.optimizer.learning_rate=nan"), "learning_rate"),
    "temperature of NaN": (
        of_run("--mode=generate", "--config.generate.temperature=nan"),
        "temperature",
    ),
    "top_p of zero": (of_run("--mode=generate", "--config.generate.top_p=0"), "top_p"),
    "top_m too large": (training("--config.model.memory.top_m=100"), "top_m=100"),
    "warm-up as long as training": (training("--config.optimizer.warmup_steps=12"), "warmup_steps"),
    "batch of zero": (training("--config.train.batch_size=0"), "batch_size=0"),
    "accumulation that does not divide": (
        training("--config.train.gradient_accumulation=3"),
        "gradient_accumulation=3",
    ),
    "mesh of more devices than there are": (training("--config.mesh.fsdp=64"), "mesh"),
    "override of a run with another model": (
        of_run("--mode=evaluate", "--config.model.hidden_size=32"),
        "hidden_size",
    ),
    "unknown override of a run": (
        of_run("--mode=evaluate", "--config.evaluation.batch=3"),
        "evaluation.batch",
    ),
    # Another run in the folder.
    "another learning rate": (
        lambda workspace: [
            *workspace.flags,
            f"--workdir={workspace.run}",
            "--config.optimizer.learning_rate=0.5",
            "--config.train.num_steps=20",
        ],
        "optimizer.learning_rate",
    ),
    "another model": (
        lambda workspace: [
            *workspace.flags,
            f"--workdir={workspace.run}",
            "--config.model.num_layers=1",
        ],
        "model.num_layers",
    ),
    # Text.
    "no such text": (
        lambda workspace: [
            *tiny_run.flags(f"{workspace.tmp}/*.none"),
            f"--workdir={workspace.tmp / 'new'}",
        ],
        "*.none",
    ),
    "empty text": (on_text("a.txt", ""), "a.txt"),
    "text that is not UTF-8": (on_text("a.txt", b"abc\xff\xfe" * 20), "a.txt"),
    "invalid JSON lines": (on_text("a.jsonl", "{broken\n"), "a.jsonl"),
    "invalid JSON lines, upper case": (on_text("a.JSONL", "{broken\n"), "a.JSONL"),
    "invalid ndjson": (on_text("a.ndjson", "{broken\n"), "a.ndjson"),
    "JSON without the field": (on_text("a.jsonl", '{"body": "x"}\n'), "text"),
    "JSON nested too deep": (on_text("a.jsonl", "[" * 100_000 + "\n"), "a.jsonl"),
    "invalid Parquet": (on_text("a.parquet", "PAR1 and no more"), "a.parquet"),
    "damaged gzip": (
        on_text("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20]),
        "a.txt.gz",
    ),
    "invalid gzip": (on_text("a.gz", "text"), "a.gz"),
    "invalid bzip2": (on_text("a.txt.bz2", "text"), "a.txt.bz2"),
    "invalid xz": (on_text("a.jsonl.xz", "text"), "a.jsonl.xz"),
    "invalid zstandard": (on_text("a.txt.zst", "text"), "a.txt.zst"),
    "text too short": (on_text("a.txt", "short"), ""),
    "prepare: invalid JSON lines": (
        on_text("a.jsonl", "{broken\n", mode="prepare"),
        "a.jsonl",
    ),
    "train_tokenizer: text that is not UTF-8": (
        on_text("a.txt", b"\xff" * 99, "--vocab_size=300", mode="train_tokenizer"),
        "a.txt",
    ),
    "tokenizer that does not exist": (
        training("--config.data.tokenizer=/none/bpe.json"),
        "/none/bpe.json",
    ),
    "tokenizer of unknown kind": (training("--config.data.tokenizer=gpt2"), "gpt2"),
    "tokenizer that is other JSON": (
        lambda workspace: [
            *workspace.flags,
            f"--workdir={workspace.tmp / 'new'}",
            f"--config.data.tokenizer={workspace.file('t.json', '{}')}",
        ],
        "t.json",
    ),
    "tokenizer that is damaged": (
        lambda workspace: [
            *workspace.flags,
            f"--workdir={workspace.tmp / 'new'}",
            f"--config.data.tokenizer={workspace.file('t.model', 'x' * 99)}",
        ],
        "t.model",
    ),
    "evaluation with another tokenizer": (
        lambda workspace: [
            f"--workdir={workspace.run}",
            "--mode=evaluate",
            f"--config.data.tokenizer={ROOT / 'experiments' / 'bpe_2048.json'}",
        ],
        "tokenizer",
    ),
    "token files of odd size": (
        on_text("a.bin", bytes(101), "--config.data.source=memmap"),
        "a.bin",
    ),
    "token ids beyond the vocabulary": (
        on_text(
            "a.bin",
            np.full(500, 60_000, "<u2").tobytes(),
            "--config.data.source=memmap",
        ),
        "a.bin",
    ),
    "invalid shards": (
        on_text("a.array_record", "x" * 500, "--config.data.source=array_record"),
        "",
    ),
    "data set without its package": (
        training(
            "--mode=prepare",
            "--config.data.source=hugging_face",
            "--config.data.hugging_face_name=x/y",
        ),
        "hugging_face",
    ),
    "training from a stream": (
        training(
            "--config.data.source=hugging_face",
            "--config.data.hugging_face_name=x/y",
        ),
        "hugging_face",
    ),
    # Suites, plans, prompts.
    "suite without the harness": (of_run("--mode=evaluate", "--suite=arc_easy"), "eval"),
    "unknown topology": (
        lambda workspace: ["--config=tiny", "--mode=plan", "--topology=v9:2"],
        "v9:2",
    ),
    "topology without a shape": (
        lambda workspace: ["--config=tiny", "--mode=plan", "--topology=v5e"],
        "v5e",
    ),
    "search for decoding": (
        lambda workspace: [
            "--config=tiny",
            "--mode=plan",
            "--topology=v5e:2x2",
            "--plan_step=decode",
            "--search",
        ],
        "plan_step",
    ),
    "prompt that is not UTF-8": (
        of_run("--mode=generate", "--prompt=\udcff"),
        "UTF-8",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_input_is_a_one_line_error(
    commands: Commands, workspace: Workspace, case: str
) -> None:
    arguments, expected = CASES[case]
    before = contents(workspace.run)
    check_one_line(
        commands.run("main", *arguments(workspace), missing=("datasets", "lm_eval")), expected
    )
    assert contents(workspace.run) == before
    assert not (workspace.tmp / "new" / "checkpoints").exists() or not list(
        (workspace.tmp / "new" / "checkpoints").iterdir()
    )


def damage(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:-1])


def damage_all(workspace: Workspace) -> None:
    for path in (workspace.run / "checkpoints").rglob("*"):
        if path.is_file():
            damage(path)


def rename_newest(workspace: Workspace) -> None:
    for path in (workspace.run / "checkpoints").iterdir():
        if path.name != "12":
            shutil.rmtree(path)
    (workspace.run / "checkpoints" / "12").rename(workspace.run / "checkpoints" / "40")


@pytest.mark.parametrize("mode", ["evaluate", "generate", "export"])
@pytest.mark.parametrize("spoil", [damage_all, rename_newest])
def test_a_damaged_run_is_a_one_line_error(
    commands: Commands, workspace: Workspace, mode: str, spoil: Callable[[Workspace], None]
) -> None:
    spoil(workspace)
    before = contents(workspace.run)
    folder = [f"--folder={workspace.tmp / 'out'}"] if mode == "export" else []
    completed = commands.run("main", f"--workdir={workspace.run}", f"--mode={mode}", *folder)
    check_one_line(completed, "no checkpoint can be read")
    assert contents(workspace.run) == before


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "ENOSPC"])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(lambda workspace, out: [*workspace.flags, f"--workdir={out}"], id="train"),
        pytest.param(
            lambda workspace, out: [*workspace.flags, "--mode=prepare", f"--workdir={out}"],
            id="prepare",
        ),
        pytest.param(
            lambda workspace, out: [
                *workspace.flags,
                "--mode=train_tokenizer",
                "--vocab_size=300",
                f"--workdir={out}",
            ],
            id="train_tokenizer",
        ),
        pytest.param(
            lambda workspace, out: [
                f"--workdir={workspace.run}",
                "--mode=export",
                f"--folder={out}",
            ],
            id="export",
        ),
        pytest.param(
            lambda workspace, out: ["--config=tiny", "--mode=cost", f"--workdir={out}"], id="cost"
        ),
    ],
)
def test_a_folder_that_cannot_be_written_is_a_one_line_error(
    commands: Commands, workspace: Workspace, number: str, arguments: Any
) -> None:
    before = contents(workspace.run)
    disk = workspace.tmp / "disk"
    completed = commands.run(
        "main", *arguments(workspace, disk / "out"), refused={str(disk): number}
    )
    check_one_line(completed, str(disk))
    assert contents(workspace.run) == before


def test_evaluation_results_that_cannot_be_written_are_a_one_line_error(
    commands: Commands, workspace: Workspace
) -> None:
    before = contents(workspace.run)
    arguments = [f"--workdir={workspace.run}", "--mode=evaluate"]
    check_one_line(
        commands.run("main", *arguments, refused={str(workspace.run): "ENOSPC"}), "No space left"
    )
    assert contents(workspace.run) == before


@pytest.mark.slow
def test_a_token_cache_that_cannot_be_written_only_warns(
    commands: Commands, workspace: Workspace
) -> None:
    cache = workspace.tmp / "cache"
    completed = commands.run(
        "main",
        *workspace.flags,
        f"--config.data.tokenizer={ROOT / 'experiments' / 'bpe_2048.json'}",
        "--config.model.vocab_size=2048",
        "--config.train.num_steps=3",
        f"--workdir={workspace.tmp / 'new'}",
        environment={"XDG_CACHE_HOME": str(cache)},
        refused={str(cache): "EROFS"},
    )
    assert completed.status == 0, completed.errors
    assert str(cache) in completed.errors
    assert (workspace.tmp / "new" / "checkpoints" / "3").exists()
