"""Bad inputs and faults of the machine, over all modes: each ends in one line, and nothing is lost.

Every case is a command that cannot do its work. It must say so in one line that names what the user
gave, write no trace, print no result, and leave the run that it was pointed at as it was.
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
from tests.commands import ROOT, TRACE, Commands, Ended
from tests.tiny_run import Run


@pytest.fixture(scope="module")
def commands(finished: Run) -> Iterator[Commands]:
    started = Commands("umv2.modes", environment=tiny_run.environment(finished.cache))
    yield started
    started.close()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case happens: a folder of its own, a copy of a finished run, and its text."""

    tmp: Path
    run: Path
    text: str

    @property
    def flags(self) -> list[str]:
        """The configuration of the run, as flags."""
        return tiny_run.flags(self.text)

    def file(self, name: str, content: str | bytes) -> Path:
        """Writes a file of the case's folder."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, source: str) -> str:
        """Writes a file of configuration, and returns the flag that names it."""
        return f"--config={self.file('mine.py', source)}"


@pytest.fixture
def place(finished: Run, tmp_path: Path) -> Place:
    run = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    return Place(tmp_path, run, finished.paths)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but its lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_one_line(ended: Ended, expected: str) -> None:
    assert ended.status != 0, ended
    assert TRACE not in ended.errors, ended.errors
    lines = ended.errors.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, ended.errors
    assert lines[-1].startswith("error: "), ended.errors
    assert expected in lines[-1], ended.errors
    assert ended.output == ""


type Arguments = Callable[[Place], list[str]]


def of_run(*flags: str) -> Arguments:
    return lambda place: [f"--workdir={place.run}", *flags]


def training(*flags: str, workdir: str = "new") -> Arguments:
    return lambda place: [*place.flags, f"--workdir={place.tmp / workdir}", *flags]


def on_text(name: str, content: str | bytes, *flags: str, mode: str = "train") -> Arguments:
    def arguments(place: Place) -> list[str]:
        path = place.file(f"input/{name}", content)
        return [
            *tiny_run.flags(str(path)),
            f"--workdir={place.tmp / 'new'}",
            f"--mode={mode}",
            *flags,
        ]

    return arguments


def written_config(source: str, *flags: str) -> Arguments:
    return lambda place: [place.config(source), "--mode=inspect", *flags]


def file_as_workdir(*flags: str) -> Arguments:
    return lambda place: [*place.flags, f"--workdir={place.file('file', 'x')}", *flags]


HEAD = "from configs import base\ndef get_config():\n    config = base.get_config()\n"

CASES: dict[str, tuple[Arguments, str]] = {
    # Flags.
    "unknown flag": (of_run("--wrkdir=x"), "wrkdir"),
    "unknown mode": (of_run("--mode=evaluat"), "evaluat"),
    "an argument": (of_run("evaluate"), "evaluate: unexpected argument"),
    "no workdir": (lambda place: place.flags, "--workdir"),
    "empty workdir": (lambda place: [*place.flags, "--workdir="], "--workdir"),
    "no config": (lambda place: ["--mode=inspect"], "--config"),
    "empty config": (lambda place: ["--config=", "--mode=inspect"], "--config"),
    "context of zero": (lambda place: ["--config=tiny", "--mode=cost", "--context=0"], "context=0"),
    "context of text": (lambda place: ["--config=tiny", "--mode=cost", "--context=x"], "context=x"),
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
    "process without the others": (training("--process_id=1"), "--process_id=1"),
    "process beyond the number": (
        training("--process_id=2", "--num_processes=2", "--coordinator_address=localhost:1"),
        "--process_id=2",
    ),
    "address without a port": (
        training("--process_id=0", "--num_processes=2", "--coordinator_address=localhost"),
        "--coordinator_address=localhost",
    ),
    "several processes that prepare": (training("--mode=prepare", "--num_processes=2"), "prepare"),
    # Paths.
    "bucket to train in": (
        lambda place: [*place.flags, "--workdir=gs://bucket/x"],
        "gs://bucket/x",
    ),
    "bucket to prepare in": (
        lambda place: [*place.flags, "--mode=prepare", "--workdir=s3://bucket/x"],
        "s3://bucket/x",
    ),
    "bucket to export to": (of_run("--mode=export", "--folder=gs://bucket/x"), "gs://bucket/x"),
    "bucket to import from": (
        lambda place: ["--mode=import", f"--workdir={place.tmp / 'n'}", "--folder=hf://x/y"],
        "hf://x/y",
    ),
    "bucket for costs": (
        lambda place: ["--config=tiny", "--mode=cost", "--workdir=gs://b/x"],
        "gs://b/x",
    ),
    "bucket of text": (
        lambda place: [*tiny_run.flags("gs://b/*.txt"), f"--workdir={place.tmp / 'new'}"],
        "gs://b/*.txt",
    ),
    "brackets in a name": (training(workdir="a[b]"), "may not hold [ ]"),
    "star in a name": (training(workdir="a*"), "may not hold *"),
    "question mark in a name": (training(workdir="a?"), "may not hold ?"),
    "backslash in a name": (training(workdir="a\\b"), "may not hold \\"),
    "brackets above": (training(workdir="a[b]/c/d"), "may not hold [ ]"),
    "name too long": (training(workdir="n" * 300), "File name too long"),
    "null byte": (
        lambda place: [*place.flags, "--workdir=a\0b"],
        "null bytes",
    ),
    "home of nobody": (lambda place: [*place.flags, "--workdir=~no_such_user/x"], "~no_such_user"),
    "file to train in": (file_as_workdir(), "file: "),
    "file to prepare in": (file_as_workdir("--mode=prepare"), "file: "),
    "file for a tokenizer": (file_as_workdir("--mode=train_tokenizer", "--vocab_size=300"), "file"),
    "file to import into": (
        lambda place: [
            "--mode=import",
            f"--folder={place.tmp}",
            f"--workdir={place.file('file', 'x')}",
            "--config=tiny",
        ],
        "",
    ),
    "file to evaluate": (
        lambda place: ["--mode=evaluate", f"--workdir={place.file('file', 'x')}"],
        "file/checkpoints does not exist",
    ),
    "run that is not there": (
        lambda place: ["--mode=evaluate", f"--workdir={place.tmp / 'none'}"],
        "none/checkpoints does not exist",
    ),
    "folder of exports in use": (
        lambda place: [f"--workdir={place.run}", "--mode=export", f"--folder={place.run}"],
        "run",
    ),
    "file as folder of exports": (
        lambda place: [
            f"--workdir={place.run}",
            "--mode=export",
            f"--folder={place.file('file', 'x')}",
        ],
        "file",
    ),
    "import of nothing": (
        lambda place: ["--mode=import", f"--folder={place.tmp}", f"--workdir={place.tmp / 'n'}"],
        "config.json",
    ),
    "import over a run": (
        lambda place: ["--mode=import", f"--folder={place.tmp}", f"--workdir={place.run}"],
        "",
    ),
    # Files of configuration.
    "no such file": (lambda place: ["--config=configs/tniy.py", "--mode=inspect"], "tniy"),
    "no such name": (lambda place: ["--config=tniy", "--mode=inspect"], "tniy"),
    "a folder": (lambda place: ["--config=configs", "--mode=inspect"], "configs"),
    "empty file": (written_config(""), "get_config"),
    "no get_config": (written_config("x = 1\n"), "get_config"),
    "syntax error": (written_config("def get_config(:\n    pass\n"), "mine.py"),
    "unfinished string": (written_config('x = "\n'), "mine.py"),
    "bad indentation": (written_config("def get_config():\nreturn 1\n"), "mine.py"),
    "not UTF-8": (
        lambda place: [
            f"--config={place.file('mine.py', b'x = ' + bytes([255]))}",
            "--mode=inspect",
        ],
        "mine.py",
    ),
    "binary file": (
        lambda place: [f"--config={place.file('mine.py', bytes(range(256)))}", "--mode=inspect"],
        "mine.py",
    ),
    "missing module": (written_config("import no_such_module\n"), "no_such_module"),
    "missing name": (written_config("from configs import no_such\n"), "no_such"),
    "get_config raises": (written_config("def get_config():\n    1 / 0\n"), "division by zero"),
    "get_config returns nothing": (written_config("def get_config():\n    pass\n"), "mine.py"),
    "get_config returns a list": (written_config("def get_config():\n    return []\n"), "mine.py"),
    "get_config is no function": (written_config("get_config = 3\n"), "get_config"),
    "get_config wants two": (written_config("def get_config(a, b):\n    pass\n"), "mine.py"),
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
    "unknown family": (lambda place: ["--config=tiny:mixture", "--mode=inspect"], "mixture"),
    "family of one that has none": (
        lambda place: ["--config=paper_430m_5b:moe", "--mode=inspect"],
        "leave out the colon",
    ),
    "two colons": (lambda place: ["--config=tiny:moe:dense", "--mode=inspect"], "moe:dense"),
    "comparison with no file": (
        lambda place: ["--config=tiny", "--mode=cost", "--compare=none"],
        "--compare=none",
    ),
    "comparison with itself": (
        lambda place: ["--config=tiny", "--mode=cost", "--compare=tiny"],
        "there already",
    ),
    "comparison with a broken file": (
        lambda place: [
            "--config=tiny",
            "--mode=cost",
            f"--compare={place.file('other.py', 'def get_config(:')}",
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
    "override of a run that is unknown": (
        of_run("--mode=evaluate", "--config.evaluation.batch=3"),
        "evaluation.batch",
    ),
    # Another run in the folder.
    "another learning rate": (
        lambda place: [
            *place.flags,
            f"--workdir={place.run}",
            "--config.optimizer.learning_rate=0.5",
            "--config.train.num_steps=20",
        ],
        "optimizer.learning_rate",
    ),
    "another model": (
        lambda place: [*place.flags, f"--workdir={place.run}", "--config.model.num_layers=1"],
        "model.num_layers",
    ),
    # Text.
    "no such text": (
        lambda place: [*tiny_run.flags(f"{place.tmp}/*.none"), f"--workdir={place.tmp / 'new'}"],
        "*.none",
    ),
    "empty text": (on_text("a.txt", ""), "a.txt"),
    "text that is not UTF-8": (on_text("a.txt", b"abc\xff\xfe" * 20), "a.txt"),
    "JSON lines that are none": (on_text("a.jsonl", "{broken\n"), "a.jsonl"),
    "JSON lines in capitals": (on_text("a.JSONL", "{broken\n"), "a.JSONL"),
    "ndjson that is none": (on_text("a.ndjson", "{broken\n"), "a.ndjson"),
    "JSON without the field": (on_text("a.jsonl", '{"body": "x"}\n'), "text"),
    "JSON too deep": (on_text("a.jsonl", "[" * 100_000 + "\n"), "a.jsonl"),
    "Parquet that is none": (on_text("a.parquet", "PAR1 and no more"), "a.parquet"),
    "damaged gzip": (
        on_text("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20]),
        "a.txt.gz",
    ),
    "gzip that is none": (on_text("a.gz", "text"), "a.gz"),
    "bzip2 that is none": (on_text("a.txt.bz2", "text"), "a.txt.bz2"),
    "xz that is none": (on_text("a.jsonl.xz", "text"), "a.jsonl.xz"),
    "zstandard that is none": (on_text("a.txt.zst", "text"), "a.txt.zst"),
    "text too short": (on_text("a.txt", "short"), ""),
    "prepare: JSON lines that are none": (
        on_text("a.jsonl", "{broken\n", mode="prepare"),
        "a.jsonl",
    ),
    "train_tokenizer: text that is not UTF-8": (
        on_text("a.txt", b"\xff" * 99, "--vocab_size=300", mode="train_tokenizer"),
        "a.txt",
    ),
    "tokenizer that is not there": (
        training("--config.data.tokenizer=/none/bpe.json"),
        "/none/bpe.json",
    ),
    "tokenizer of unknown kind": (training("--config.data.tokenizer=gpt2"), "gpt2"),
    "tokenizer that is JSON alone": (
        lambda place: [
            *place.flags,
            f"--workdir={place.tmp / 'new'}",
            f"--config.data.tokenizer={place.file('t.json', '{}')}",
        ],
        "t.json",
    ),
    "tokenizer that is damaged": (
        lambda place: [
            *place.flags,
            f"--workdir={place.tmp / 'new'}",
            f"--config.data.tokenizer={place.file('t.model', 'x' * 99)}",
        ],
        "t.model",
    ),
    "evaluation with another tokenizer": (
        lambda place: [
            f"--workdir={place.run}",
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
    "shards that are none": (
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
    "topology that is none": (
        lambda place: ["--config=tiny", "--mode=plan", "--topology=v9:2"],
        "v9:2",
    ),
    "topology without a shape": (
        lambda place: ["--config=tiny", "--mode=plan", "--topology=v5e"],
        "v5e",
    ),
    "search for decoding": (
        lambda place: [
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
def test_a_bad_input_is_one_line(commands: Commands, place: Place, case: str) -> None:
    arguments, expected = CASES[case]
    before = contents(place.run)
    check_one_line(
        commands.run("main", *arguments(place), missing=("datasets", "lm_eval")), expected
    )
    assert contents(place.run) == before
    assert not (place.tmp / "new" / "checkpoints").exists() or not list(
        (place.tmp / "new" / "checkpoints").iterdir()
    )


def damage(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:-1])


def damage_all(place: Place) -> None:
    for path in (place.run / "checkpoints").rglob("*"):
        if path.is_file():
            damage(path)


def rename_newest(place: Place) -> None:
    for path in (place.run / "checkpoints").iterdir():
        if path.name != "12":
            shutil.rmtree(path)
    (place.run / "checkpoints" / "12").rename(place.run / "checkpoints" / "40")


@pytest.mark.parametrize("mode", ["evaluate", "generate", "export"])
@pytest.mark.parametrize("spoil", [damage_all, rename_newest])
def test_a_damaged_run_is_one_line(
    commands: Commands, place: Place, mode: str, spoil: Callable[[Place], None]
) -> None:
    spoil(place)
    before = contents(place.run)
    folder = [f"--folder={place.tmp / 'out'}"] if mode == "export" else []
    ended = commands.run("main", f"--workdir={place.run}", f"--mode={mode}", *folder)
    check_one_line(ended, "no checkpoint can be read")
    assert contents(place.run) == before


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "ENOSPC"])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(lambda place, out: [*place.flags, f"--workdir={out}"], id="train"),
        pytest.param(
            lambda place, out: [*place.flags, "--mode=prepare", f"--workdir={out}"], id="prepare"
        ),
        pytest.param(
            lambda place, out: [
                *place.flags,
                "--mode=train_tokenizer",
                "--vocab_size=300",
                f"--workdir={out}",
            ],
            id="train_tokenizer",
        ),
        pytest.param(
            lambda place, out: [f"--workdir={place.run}", "--mode=export", f"--folder={out}"],
            id="export",
        ),
        pytest.param(
            lambda place, out: ["--config=tiny", "--mode=cost", f"--workdir={out}"], id="cost"
        ),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(
    commands: Commands, place: Place, number: str, arguments: Any
) -> None:
    before = contents(place.run)
    disk = place.tmp / "disk"
    ended = commands.run("main", *arguments(place, disk / "out"), refused={str(disk): number})
    check_one_line(ended, str(disk))
    assert contents(place.run) == before


def test_results_of_an_evaluation_that_cannot_be_written_are_one_line(
    commands: Commands, place: Place
) -> None:
    before = contents(place.run)
    arguments = [f"--workdir={place.run}", "--mode=evaluate"]
    check_one_line(
        commands.run("main", *arguments, refused={str(place.run): "ENOSPC"}), "No space left"
    )
    assert contents(place.run) == before


@pytest.mark.slow
def test_a_token_cache_that_cannot_be_written_is_a_warning(
    commands: Commands, place: Place
) -> None:
    cache = place.tmp / "cache"
    ended = commands.run(
        "main",
        *place.flags,
        f"--config.data.tokenizer={ROOT / 'experiments' / 'bpe_2048.json'}",
        "--config.model.vocab_size=2048",
        "--config.train.num_steps=3",
        f"--workdir={place.tmp / 'new'}",
        environment={"XDG_CACHE_HOME": str(cache)},
        refused={str(cache): "EROFS"},
    )
    assert ended.status == 0, ended.errors
    assert str(cache) in ended.errors
    assert (place.tmp / "new" / "checkpoints" / "3").exists()
