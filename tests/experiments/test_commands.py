"""Every command of experiments/ with invalid input: a one-line error, and nothing is lost."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import measurements
from experiments.ablations.catalogue import configuration
from tests.commands import TRACE, Commands, Completed
from tests.experiments.ablations.test_records import store

ROOT = Path(__file__).parents[2]
# Every command by the last part of its name.
ENTRIES = {
    path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if "cli.run(main)" in path.read_text()
}
PAGES = sorted((ROOT / "experiments" / "results").rglob("*.md"))
# Files and folders in the working directory of the cases below.
WORKING = {
    "file": "",
    "own.py": "from configs import base\nget_config = base.get_config\n",
    "syntax.py": "def get_config(:\n",
    "without.py": "x = 1\n",
    "failing.py": "def get_config():\n    return {}['a']\n",
    "importing.py": "import no_such_package\n",
    "damaged/smoke/heads/one/seed_0.jsonl": '{"kind": "run", "seed"',
    "foreign/smoke/heads/one/seed_0.jsonl": '{"task": "needle", "answers": 3}\n',
    "other/smoke/notes/heads.md": "nothing was run",
    "misnamed/smok/heads/one/seed_0.jsonl": "",
    "corpus/smoke/corpus.json": "[]",
    "damaged.jsonl": '{"kind": "dec',
    "foreign.jsonl": '{"kind": "run"}\n',
    "empty.jsonl": "",
    "folder/step_time.jsonl/x": "",
}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    started = Commands("experiments.cli", "umv2.config.files")
    yield started
    started.close()


@pytest.fixture
def working(tmp_path: Path) -> Path:
    for name, content in WORKING.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def check_one_line(completed: Completed, message: str) -> None:
    assert completed.status == 1, completed
    assert TRACE not in completed.errors + completed.output
    (line,) = completed.errors.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


# Flags that a command needs before it looks at the others.
NEEDED = {
    "run": ["--ablation=heads"],
    "step_time": ["--config=tiny"],
    "match": ["--config=tiny"],
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("extra", "extra: unexpected argument"),
        ("--no_such_flag=1", "[Uu]nknown command line flag 'no_such_flag'"),
    ],
)
def test_arguments_and_flags_that_no_command_has(
    commands: Commands, working: Path, entry: str, argument: str, message: str
) -> None:
    completed = commands.run(ENTRIES[entry], *NEEDED.get(entry, []), argument, folder=working)
    check_one_line(completed, message)


@pytest.mark.parametrize("entry", NEEDED)
def test_required_flags(commands: Commands, working: Path, entry: str) -> None:
    (needed,) = NEEDED[entry]
    name = needed.partition("=")[0]
    check_one_line(commands.run(ENTRIES[entry], folder=working), f"[Ff]lag {name}")


MISTAKES = [
    ("run", "--ablation=head", r"--ablation=head: must be one of .*\(nearest: heads\)"),
    ("run", "--ablation=", "--ablation: must name one of value_processing"),
    ("run", "--ablation=heads --arms=tow", r"--arms=tow: must be one of one, two \(nearest: two\)"),
    ("run", "--ablation=heads --arms=multi_projector", "--arms=multi_projector: must be one of"),
    ("run", "--ablation=heads --scale=cpuu", "--scale=cpuu: .*smoke"),
    ("run", "--ablation=heads --seeds=0", "--seeds=0: 0 is not an integer in the range"),
    ("run", "--ablation=heads --seeds=three", "--seeds=three: "),
    ("run", "--ablation=heads --seeds=1e3", "--seeds=1e3: "),
    ("run", f"--ablation=heads --seeds={10**20}", "--seeds=1000.*: .* range"),
    ("run", "--ablation=heads --vocab_size=5", "--vocab_size=5: "),
    ("run", "--ablation=heads --vocab_size=300", "--vocab_size=300: needs --corpus"),
    ("run", "--ablation=heads --corpus=standard_libary", r"--corpus=.*\(nearest: standard_library"),
    ("run", "--ablation=heads --corpus=", "--corpus='': must not be empty"),
    ("run", "--ablation=heads --corpus=none/*.txt", "--corpus=none/.*no text file matches"),
    ("run", "--ablation=heads --corpus=gs://b/x", "--corpus=gs://b/x: must be a local path"),
    ("run", "--ablation=heads --results=gs://b/x", "--results=gs://b/x: must be a local path"),
    ("run", "--ablation=heads --results=", "--results='': must not be empty"),
    ("run", "--ablation=heads --results=~nobody_here/x", "--results=~nobody_here/x: "),
    ("run", "--ablation=heads --results=file", "file/cpu: cannot be created"),
    ("run", "--ablation=heads --results=/proc/x", "/proc/x/cpu: cannot be created"),
    ("run", f"--ablation=heads --results={'x' * 300}", "cannot be created: File name too"),
    ("run", "--ablation=heads --workdir=file/x", "file/x/cpu: cannot be created"),
    ("run", "--ablation=heads --workdir=hf://x", "--workdir=hf://x: must be a local path"),
    ("run", "--ablation=heads --scale=smoke --results=damaged", "damaged/.*seed_0.jsonl: not the"),
    ("run", "--ablation=heads --scale=smoke --results=foreign", "foreign/.*seed_0.jsonl: not the"),
    ("report", "--results=missing", "missing: has no runs"),
    ("report", "--results=file", "file: has no runs"),
    ("report", "--results=other", "other: has no runs"),
    ("report", "--results=s3://b", "--results=s3://b: must be a local path"),
    (
        "report",
        "--results=damaged",
        "damaged/.*seed_0.jsonl: not the records .* line 1 is not JSON",
    ),
    ("report", "--results=foreign", "foreign/.*seed_0.jsonl: not the records .* kind=None"),
    ("report", "--results=misnamed", "misnamed/smok: holds runs, and its name must begin with"),
    ("sizes", "--scales=cpuu", r"--scales=cpuu: must be one of .*\(nearest: cpu\)"),
    ("sizes", "--check --scales=", "--scales=: must be one of"),
    ("match", "--config=tinny", r"--config=tinny: no such file \(nearest: tiny\)"),
    ("match", "--config=cpu_small --families=mo", r"--families=mo: must be .*\(nearest: moe\)"),
    ("match", "--config=tiny:moe", "--config=tiny:moe: must be the reference; drop the colon"),
    ("match", "--config=own.py", "--config=own.py: must be a file of configs/ that defines"),
    ("match", "--config=paper_2b5_25b", "must be a file of configs/ that defines the families'"),
    ("step_time", "--config=missing.py", "--config=missing.py: no such file"),
    ("step_time", "--config=.", "--config=.: is a folder"),
    ("step_time", "--config=https://x/tiny.py", "--config=https://x/tiny.py: must be a local path"),
    ("step_time", "--config=tiny:mo", r"--config=tiny:mo: family 'mo': .*\(nearest: moe\)"),
    ("step_time", "--config=syntax.py", r"--config=syntax.py: SyntaxError: .*syntax.py:1"),
    ("step_time", "--config=without.py", "--config=without.py: .* defines no function get_config"),
    ("step_time", "--config=failing.py", r"KeyError: a \(failing.py:2\)"),
    ("step_time", "--config=importing.py", "No module named 'no_such_package'"),
    ("step_time", "--config=tiny --config.model.memory.top=3", r"--config.model.memory.top: unkn"),
    ("step_time", "--config=tiny --config.model.memory.top_m=x", "top_m='x': must be an integer"),
    ("step_time", "--config=tiny --config.model=3", "--config.model: is a section"),
    ("step_time", "--config=tiny --config.no=3", "--config.no: unknown field"),
    ("step_time", "--config=tiny --rounds=0", "--rounds=0: "),
    ("step_time", "--config=tiny --output=file", "file: cannot be created"),
    ("step_time", "--config=tiny --output=folder", "folder/step_time.jsonl: .*Is a directory"),
    ("step_time", "--config=tiny --output=", "--output='': must not be empty"),
    ("step_time", "--config=tiny --output=gs://b", "--output=gs://b: must be a local path"),
    ("step_time", "--config=tiny --output=/proc/x", "/proc/x: cannot be created"),
    ("step_time", "--config=tiny --rounds=-1", "--rounds=-1: "),
    ("step_time", "--config=tiny --output=file/x", "file/x: cannot be created"),
    ("step_time", "--config=tiny --variants=", "--variants: must name one"),
    ("step_time", "--config=tiny --variants=config,,dense", "--variants: must name one"),
    ("step_time", "--config=tiny --variants=tinny", "--variants=tinny: no such file"),
    ("step_time", "--config=tiny --variants=tiny:mo", r"family 'mo': .*\(nearest: moe\)"),
    ("step_time", "--config=tiny --variants=plain_experts", "--config=tiny has no experts"),
    ("step_time", "--config=own.py --variants=families", "--config=own.py: must be a file of conf"),
    ("compile_matrix", "--chips=v5", r"--chips=v5: must be one of .*\(nearest: v5[ep]\)"),
    ("compile_matrix", "--operators=top_k", "--operators=top_k: must be one of"),
    ("compile_matrix", "--backends=pallas", "--backends=pallas: must be one of"),
    ("compile_matrix", "--shapes=1m", "--shapes=1m: must be one of"),
    ("compile_matrix", "--passes=back", "--passes=back: must be one of forward, gradients"),
    (
        "harness_equality",
        "--equality_output=gs://b/x",
        "--equality_output=gs://b/x: must be a local path",
    ),
    ("latency", "--size=1b", "--size=1b: "),
    ("latency", "--families=mo", r"--families=mo: must be one of .*\(nearest: moe\)"),
    ("latency", "--families=moe:int8", "model.compute_dtype='int8': must be one of"),
    ("latency", "--families=", "--families: must name at least one of our"),
    ("latency", "--families=hugging_face", "--families: must name at least one of our"),
    ("latency", "--batches=x", "--batches=x: must be an integer of at least 1"),
    ("latency", "--batches=0", "--batches=0: must be an integer of at least 1"),
    ("latency", "--batches=1,,2", "--batches=: must be an integer of at least 1"),
    ("latency", "--contexts=-1", "--contexts=-1: must be an integer of at least 1"),
    ("latency", "--contexts=1e3", "--contexts=1e3: must be an integer of at least 1"),
    ("latency", "--rounds=0", "--rounds=0: "),
    ("latency", "--latency_output=folder", "folder: .*Is a directory"),
    ("latency", "--latency_output=gs://b/x", "--latency_output=gs://b/x: must be a local path"),
    ("latency_report", "--latency_file=missing.jsonl", "missing.jsonl: cannot be read: No such"),
    ("latency_report", "--latency_file=folder", "folder: cannot be read: Is a directory"),
    ("latency_report", "--latency_file=damaged.jsonl", "damaged.jsonl: line 1 is not JSON"),
    ("latency_report", "--latency_file=foreign.jsonl", "foreign.jsonl: line 1 is not a record"),
    ("latency_report", "--latency_file=empty.jsonl", "empty.jsonl: has no measurements"),
    ("latency_report", "--latency_file=s3://b/x", "--latency_file=s3://b/x: must be a local path"),
    ("long_context", "--long_context_families=mo", r"families=mo: must be .*\(nearest: moe\)"),
    ("long_context", "--long_context_families=", "--long_context_families=: must be one of"),
    ("long_context", "--long_context_seeds=0", "--long_context_seeds=0: "),
    ("long_context", "--long_context_processes=-1", "--long_context_processes=-1: "),
    ("long_context", "--long_context_runs=file", "file: cannot be created"),
    (
        "long_context",
        "--long_context_runs=gs://b",
        "--long_context_runs=gs://b: must be a local path",
    ),
    ("long_context", "--long_context_report", "no run of ultramem_v2, moe, dense is stored there"),
    ("plans", "--only=paper_1b", "--only=paper_1b: unknown case"),
    ("plans", "--limit=-1", "--limit=-1: "),
    ("plans", "--tries=0", "--tries=0: "),
    ("redraw", "", "experiments/results: no such folder here"),
]


@pytest.mark.parametrize(("entry", "arguments", "message"), MISTAKES)
def test_a_mistake_is_a_one_line_error(
    commands: Commands, working: Path, entry: str, arguments: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in working.rglob("*") if path.is_file()}
    check_one_line(commands.run(ENTRIES[entry], *arguments.split(), folder=working), message)
    assert {path: path.read_bytes() for path in working.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("entry", "arguments", "package", "extra"),
    [
        ("harness_equality", "", "lm_eval", "eval,reference"),
        ("harness_equality", "", "torch", "eval,reference"),
        ("latency", "--families=moe,hugging_face", "transformers", "reference"),
    ],
)
def test_a_missing_package_is_a_one_line_error(
    commands: Commands, working: Path, entry: str, arguments: str, package: str, extra: str
) -> None:
    completed = commands.run(ENTRIES[entry], *arguments.split(), folder=working, missing=[package])
    check_one_line(completed, rf"{package}.*: not installed; pip install -e '\.\[{extra}\]'")


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_shows_how_to_run_the_command(commands: Commands, entry: str) -> None:
    completed = commands.run(ENTRIES[entry], "--help")
    assert f"python -m {ENTRIES[entry]}" in completed.output
    assert TRACE not in completed.errors + completed.output


def commands_of_pages() -> list[str]:
    """Returns the commands mentioned on the pages of results, without duplicates."""
    commands = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        commands += re.findall(r"`python -m ([^`]+)`", text)
        commands += re.findall(r"^    (?:\w+=\S+ )*python -m ([^#\n]+)", text, re.MULTILINE)
    return sorted({" ".join(command.split()) for command in commands})


@pytest.mark.parametrize("command", commands_of_pages())
def test_commands_on_the_pages_of_results_exist(commands: Commands, command: str) -> None:
    module, *arguments = command.split()
    if module == "kernels_pallas.bench":  # tested with the kernels
        return
    assert module in ENTRIES.values()
    completed = commands.run(module, *arguments, "--help")
    assert f"python -m {module}" in completed.output
    assert not completed.errors


def test_a_stored_run_of_another_configuration_is_not_overwritten(
    commands: Commands, tmp_path: Path
) -> None:
    values = configuration("heads", "two", "smoke")
    values.train.num_steps = 7
    path = store(tmp_path / "results" / "smoke", "heads/two", values)
    before = path.read_bytes()
    flags = ("--ablation=heads", "--arms=two", "--scale=smoke", "--results=results", "--workdir=w")
    name = path.relative_to(tmp_path)
    message = rf"{name}: its configuration is not .*\(train.num_steps: 7 -> 6\); move the file"
    check_one_line(commands.run("experiments.ablations.run", *flags, folder=tmp_path), message)
    assert path.read_bytes() == before


def write_runs(folder: Path) -> None:
    for seed in range(2):
        for arm in ("one", "two"):
            values = configuration("heads", arm, "smoke")
            store(folder / "smoke", f"heads/{arm}", values, seed)


@pytest.mark.parametrize("page", ["README.md", "smoke/heads.md", "smoke/heads.png"])
def test_a_page_that_cannot_be_written_is_a_one_line_error(
    commands: Commands, tmp_path: Path, page: str
) -> None:
    write_runs(tmp_path)
    (tmp_path / page).mkdir()
    message = f"{page}: cannot be (written|read): Is a directory"
    check_one_line(
        commands.run("experiments.ablations.report", f"--results={tmp_path}", folder=tmp_path),
        message,
    )


def test_notes_that_are_not_text_are_a_one_line_error(commands: Commands, tmp_path: Path) -> None:
    write_runs(tmp_path)
    notes = tmp_path / "smoke" / "notes" / "heads.md"
    notes.parent.mkdir()
    notes.write_bytes(b"\xff\xfe")
    completed = commands.run(
        "experiments.ablations.report", f"--results={tmp_path}", folder=tmp_path
    )
    check_one_line(completed, f"{notes}: must be text in UTF-8")


def test_the_results_folder_may_be_in_the_home_folder(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_runs(tmp_path)
    home = Path("~").expanduser()
    relative = Path("~") / Path(*[".."] * (len(home.parts) - 1)) / tmp_path.relative_to("/")
    completed = commands.run(
        "experiments.ablations.report", f"--results={relative}", folder=tmp_path
    )
    assert completed.status == 0, completed
    assert "[heads](smoke/heads.md)" in completed.output
    assert not (tmp_path / "~").exists()


def test_full_or_closed_standard_output(commands: Commands, tmp_path: Path) -> None:
    write_runs(tmp_path)
    flag = f"--results={tmp_path}"
    check_one_line(
        commands.run("experiments.ablations.report", flag, folder=tmp_path, stdout="/dev/full"),
        "No space left on device",
    )
    completed = commands.run("experiments.ablations.report", flag, folder=tmp_path, stdout="closed")
    assert (completed.status, completed.errors) == (141, "")


def test_any_results_are_written_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "step_time.jsonl"
    measurements.append(path, [{"ratio": float("nan")}])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"ratio": None}
