"""Every command and snippet in the documentation works as described.

`COMMANDS` has an entry for each: how it is run here, or why it is not, and which test runs it. A
command without an entry is a failure. The slow test runs the README from top to bottom like a new
user, on a small text and with a small model.
"""

import ast
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench
from tests import tiny_run
from tests.test_main import run
from umv2 import cli, modes
from umv2.config import files as config_files
from umv2.config import to_dict
from umv2.training import checkpoint

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
CODE = (
    "umv2/cli.py",
    *(f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))),
)
# The start of a command, after its environment variables.
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ +)*"
    r"(?:(?:python|umv2|make|pip|source|export|sbatch|gcloud) |flags=|experiments/)"
)


@dataclasses.dataclass(frozen=True)
class Runs:
    """A command of umv2 that the slow test runs; other tests parse its flags, with modes stubbed.

    `shorter` are overrides that make it quick, unless the configuration of a run applies.
    """

    shorter: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reads:
    """A command of umv2 of which only flags and configuration are parsed; says why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Parses:
    """A Python module of which the flags are parsed; `tested` runs it."""

    tested: str


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A command that another test runs, or that cannot be run here."""

    tested: str


@dataclasses.dataclass(frozen=True)
class Makes:
    """A make target, checked with `make -n`."""


@dataclasses.dataclass(frozen=True)
class Installs:
    """Extras of pyproject.toml that exist."""


How = Runs | Reads | Parses | Elsewhere | Makes | Installs


def overrides(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"--config.{path}={value}" for path, value in values.items())


# A small model and a few steps, independent of the named configuration ...
EXPERTS = {"num_experts": 4, "top_k": 2, "expert_size": 8}
SMALL = overrides(
    {path: value for path, value in tiny_run.TINY.items() if path != "data.source"}
    | {f"model.moe.{name}": value for name, value in EXPERTS.items()}
    | {"train.num_steps": 4}
)
# ... on a small text, if a command names none.
TEXT = overrides({"data.source": "text", "data.paths": "corpus/*.jsonl"})
TASKS = overrides(
    {
        "data.sequence_length": 128,
        "data.long_context.num_documents": 16,
        "data.long_context.warm_up_steps": 1,
        "evaluation.long_context.lengths": (128,),
        "evaluation.long_context.num_examples": 1,
    }
)
EVALUATIONS = ("evaluate_long_context", "evaluate_downstream")
COMPILES = Reads("compiles for minutes: tests/planning/test_plan.py")
PROCESSES = Reads("needs several processes: tests/test_processes.py")
LAUNCHED = Elsewhere("tests/test_launch.py")
BENCH = Parses("tests/kernels_pallas/test_bench.py")
SET_UP = Elsewhere("tests/test_setup.py")

# Commands by the first page that has them.
COMMANDS: dict[str, How] = {
    "make train": Makes(),
    "make test": Makes(),
    "source .venv/bin/activate": SET_UP,
    "python main.py --config=configs/cpu_small.py --workdir=runs/cpu_small": Runs((*SMALL, *TEXT)),
    "python main.py --workdir=runs/cpu_small --mode=evaluate": Runs(),
    'python main.py --workdir=runs/cpu_small --mode=generate --prompt="import "': Runs(),
    "python main.py --config=configs/paper_1b_7b.py --mode=inspect": Runs(),
    "python main.py --workdir=runs/cpu_small": Runs(),
    "python main.py --workdir=runs/cpu_small --mode=evaluate"
    " --config.evaluation.batch_size=4": Runs(),
    "python main.py --workdir=runs/cpu_small --mode=generate"
    " --config.generate.temperature=0": Runs(),
    "pip install .": SET_UP,
    "umv2 --config=tiny --workdir=runs/tiny": Runs((*SMALL, *TEXT)),
    "umv2 --config=tiny:moe --mode=inspect": Runs(),
    "python main.py --config=configs/tiny.py:moe --workdir=runs/moe": Runs(
        (*SMALL, *TEXT, "--config.model.ffn_size=0")
    ),
    "python -m experiments.ablations.match --config=configs/paper_227m_1b2.py": Parses(
        "tests/experiments/test_commands.py"
    ),
    "python main.py --config=configs/long_context_tiny.py --workdir=runs/long_context": Runs(
        (*SMALL, *TEXT, *TASKS)
    ),
    "python main.py --workdir=runs/long_context --mode=evaluate --suite=long_context": Runs(),
    "pip install -e '.[eval]'": Installs(),
    "python main.py --workdir=runs/cpu_small --mode=evaluate --suite=arc_easy,hellaswag"
    " --limit=100": Reads("downloads the tasks: tests/evaluation/test_downstream.py"),
    "python -m experiments.benchmarks.harness_equality": Parses(
        "tests/experiments/test_commands.py"
    ),
    "python -m experiments.ablations.run --ablation=heads --scale=cpu --seeds=3": Parses(
        "tests/experiments/ablations/test_run.py"
    ),
    "python -m experiments.ablations.report": Parses("tests/experiments/ablations/test_report.py"),
    "python main.py --config=experiments/ablations/catalogue.py:heads/two"
    " --workdir=runs/two_heads": Runs((*SMALL, *TEXT)),
    "python main.py --mode=cost --config=configs/paper_1b_7b.py:moe"
    " --compare=configs/paper_1b_7b.py": Runs(),
    "python -m experiments.benchmarks.latency": Parses("tests/experiments/test_commands.py"),
    "python main.py --config=configs/cpu_small.py --workdir=runs/pod --config.mesh.fsdp=4"
    " --config.mesh.memory=16 --config.mesh.tensor=1": Reads("needs 64 devices"),
    "pip install -e '.[compile]'": Installs(),
    "python main.py --mode=plan --config=configs/paper_1b_7b.py --topology=v6e:8x8"
    " --config.mesh.memory=64": COMPILES,
    "python main.py --mode=plan --config=configs/paper_1b_7b.py --topology=v6e:8x8"
    " --search": COMPILES,
    "python main.py --mode=import --folder=OLMoE-1B-7B --workdir=runs/olmoe"
    " --config=configs/paper_1b_7b.py:moe": Reads("needs the model: tests/interop/test_olmoe.py"),
    "python main.py --mode=export --workdir=runs/cpu_small --folder=runs/exported": Runs(),
    "python main.py --mode=export --workdir=runs/moe --folder=runs/exported_moe"
    " --format=olmoe": Runs(),
    "python main.py --config=configs/tiny.py --workdir=runs/shakespeare --config.data.source=text"
    " --config.data.paths=shakespeare.txt": Runs(SMALL),
    "python main.py --mode=train_tokenizer --config=configs/tiny.py --workdir=runs/bpe"
    " --vocab_size=8192 --config.data.source=text"
    " --config.data.paths=\"('corpus/*.jsonl',)\"": Runs(),
    "python main.py --mode=prepare --config=configs/tiny.py --workdir=runs/tokens"
    " --config.data.source=text --config.data.paths=\"('corpus/*.jsonl',)\""
    " --config.data.tokenizer=runs/bpe/bpe_8192.json --config.model.vocab_size=8192": Runs(),
    "python main.py --config=configs/tiny.py --workdir=runs/on_tokens"
    " --config.data.source=array_record --config.data.paths=\"('runs/tokens/*.array_record',)\""
    " --config.data.tokenizer=runs/bpe/bpe_8192.json --config.model.vocab_size=8192": Runs(SMALL),
    "python -m kernels_pallas.bench --op=value_aggregation --output=runs/bench": BENCH,
    "python -m kernels_pallas.bench --op=product_key_top_k --shapes=model": BENCH,
    "python -m kernels_pallas.bench --op=value_aggregation --implementation=pallas_gpu"
    " --tune": BENCH,
    "python -m experiments.benchmarks.conformance": Parses(
        "tests/experiments/benchmarks/test_checks.py"
    ),
    "python -m experiments.benchmarks.compile_matrix": Parses(
        "tests/experiments/benchmarks/test_checks.py"
    ),
    "python main.py --mode=plan": Elsewhere("docs/plans.md"),  # followed by the full command
    "python main.py --mode=plan --config=configs/paper_1b_7b.py --topology=h200:8"
    " --config.mesh.memory=8 --plan_step=decode": COMPILES,
    "python -m experiments.benchmarks.plans": Parses("tests/experiments/test_commands.py"),
    "python main.py --config=configs/paper_1b_7b.py --workdir=/mnt/shared/run"
    " --config.mesh.replica=2 --config.mesh.memory=16": PROCESSES,
    "pip install kubernetes": Elsewhere("docs/pods.md"),  # used by JAX
    "export JAX_PLATFORMS=cpu": PROCESSES,
    "python main.py --config=configs/tiny.py --workdir=runs/two"
    " --coordinator_address=localhost:9999 --num_processes=2 --process_id=0": PROCESSES,
    "python main.py --config=configs/tiny.py --workdir=runs/two"
    " --coordinator_address=localhost:9999 --num_processes=2 --process_id=1": PROCESSES,
    "gcloud compute tpus queued-resources create my-tpu --zone=ZONE --node-count=2"
    " --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e": LAUNCHED,
    "QUEUED_RESOURCE=my-tpu ZONE=ZONE FOLDER=umv2 experiments/launch/tpu.sh --config=..."
    " --workdir=/mnt/shared/run --config.mesh.replica=2": LAUNCHED,
    "gcloud compute tpus queued-resources ssh my-tpu --zone=ZONE --worker=0"
    " --command='pkill -f main.py'": LAUNCHED,
    "sbatch --nodes=4 --time=4:00:00 experiments/launch/slurm.sbatch --config=..."
    " --workdir=/shared/run": LAUNCHED,
    "IMAGE=... VOLUME=my-claim HOSTS=4 experiments/launch/jobset.sh gpu --config=..."
    " --workdir=/data/run | kubectl apply -f -": LAUNCHED,
    "IMAGE=... VOLUME=my-claim HOSTS=16 SLICES=2 TPU=tpu-v6e-slice TOPOLOGY=8x8"
    " experiments/launch/jobset.sh tpu --config=... --workdir=/data/run"
    " | kubectl apply -f -": LAUNCHED,
    "umv2 --workdir=runs/tiny --mode=evaluate": Runs(),
    'umv2 --workdir=runs/tiny --mode=generate --prompt="def "': Runs(),
    "python main.py": Elsewhere("tests/test_main.py"),  # the name of the command
    "python main.py --config=configs/tiny.py:pkm --workdir=runs/pkm": Runs(
        (*SMALL, *TEXT, *overrides({"model.memory.value_dim": 16, "model.memory.pre_value_dim": 0}))
    ),
    "python main.py --config=configs/paper_227m_1b2.py --workdir=runs/227m"
    " --config.data.paths=\"('/data/olmoe-mix/*.npy',)\"": Reads("needs the paper's corpus"),
    "make train ARGS=--config.train.num_steps=60": Makes(),
    "make train EXTRAS=gpu": Makes(),
    "make train PYTHON=/path/to/python3.13": Makes(),
}


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields lines joined at backslashes, with the number of the first line."""
    begun: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        first, before = begun or (number, "")
        joined = before + (line.strip() if before else line)
        begun = (first, joined[:-1]) if joined.endswith("\\") else None
        if begun is None:
            yield first, joined


def without_comment(command: str) -> str:
    """Strips the comment after a command: after a #, or after two spaces or more."""
    command = re.sub(r" +#.*$", "", command.strip())
    return re.sub(r"(?<=\S) {2,}[^-\s].*$", "", command).rstrip(" &|")


def commands_of(page: str) -> Iterator[str]:
    """Yields the commands of a page: indented lines, and text between backticks."""
    text = (ROOT / page).read_text()
    variables: dict[str, str] = {}
    if page in CODE:
        text = ast.get_docstring(ast.parse(text)) or ""
    if page == "Makefile":
        text = "\n".join(f"    {line[4:]}" for line in text.splitlines() if line[:5] == "#   m")
    for _, line in logical_lines(text):
        indented = line.startswith("    ") or page.startswith("configs/")
        texts = [line] if indented else re.findall(r"(?<!`)`([^`]+)`", line)
        for written in texts:
            command = without_comment(written)
            for name, value in variables.items():
                command = command.replace(f"${name}", value)
            if COMMAND.match(command):
                if assigned := re.fullmatch(r'(\w+)="(.*)"', command):
                    variables[assigned[1]] = assigned[2]
                elif " " in command:
                    yield command


def all_commands() -> list[str]:
    return list(dict.fromkeys(c for page in (*PAGES, *CODE, "Makefile") for c in commands_of(page)))


def of_kind(*kinds: type) -> list[str]:
    return [command for command in all_commands() if isinstance(COMMANDS.get(command), kinds)]


def arguments_of(command: str) -> list[str]:
    """Returns the arguments after `python main.py` or `umv2`."""
    words = shlex.split(command)
    return words[2:] if words[0] == "python" else words[1:]


def test_every_command_of_the_pages_is_listed_and_every_listed_one_is_on_a_page() -> None:
    assert sorted(all_commands()) == sorted(COMMANDS)


def test_tests_referred_to_exist() -> None:
    for how in COMMANDS.values():
        for path in re.findall(r"(?:tests|docs)/\S+", str(vars(how))):
            assert (ROOT / path.strip("'})")).is_file(), how


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the clone that commands name."""
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Stub:
    """Stands in for the result of a mode."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: ""


@pytest.mark.parametrize("command", of_kind(Runs, Reads))
def test_flags_and_configuration_of_a_command_are_right(
    command: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not command.startswith(("python main.py ", "umv2 ")):
        assert command.startswith("export ")
        return
    called: list[str] = []

    def stand_in(name: str) -> Any:
        def call(*_: Any, **__: Any) -> Stub:
            called.append(name)
            return Stub()

        return call

    for name in vars(modes):
        if name in (*cli._MODES, *EVALUATIONS, "export_run", "import_model"):
            monkeypatch.setattr(modes, name, stand_in(name))
    monkeypatch.setattr(cli, "_join_processes", lambda: True)
    monkeypatch.setattr(cli, "_after_logs", lambda _: [])
    stored = to_dict(config_files.read("cpu_small", "--config"))
    monkeypatch.setattr(checkpoint, "saved_config", lambda _: stored)
    (tree / "runs/cpu_small/checkpoints").mkdir(parents=True)
    completed = run(*arguments_of(command))
    assert completed.err == ""
    assert len(called) == 1


@pytest.mark.parametrize("command", of_kind(Parses))
def test_flags_of_a_module_are_right(command: str) -> None:
    program, _, module, *arguments = shlex.split(command)
    assert program == "python"
    if module == "kernels_pallas.bench":
        bench.arguments(arguments)
        return
    parses = (
        "import importlib, sys; importlib.import_module(sys.argv[1]);"
        "from experiments import cli; assert len(cli._parse(sys.argv[1:])) == 1"
    )
    subprocess.run([sys.executable, "-c", parses, module, *arguments], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", of_kind(Makes))
def test_make_has_the_targets_and_passes_arguments_on(command: str) -> None:
    result = subprocess.run(
        [*shlex.split(command), "--dry-run"],
        cwd=ROOT,
        # Without the variables of a make that runs the tests.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    for argument in re.findall(r"(?<=ARGS=)\S+", command):
        assert argument in result.stdout
    of_umv2 = re.findall(r"bin/python main\.py (.*)", result.stdout)
    assert len(of_umv2) == (3 if "train" in command else 0)
    for line in of_umv2:
        if "--config=" in line:
            assert run(*shlex.split(line), "--mode=inspect").err == ""


@pytest.mark.parametrize("command", of_kind(Installs))
def test_extras_exist(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.\[(.*)\]", command)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_overrides_mentioned_on_the_pages_are_valid() -> None:
    count = 0
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()):
            for path, value in re.findall(r"^--config\.([\w.]+)(?:=(.*))?$", code):
                config_files.parse(path, shlex.split(value)) if value else (
                    config_files.field_type(path)
                )
                count += 1
    assert count >= 5


def test_files_listed_in_the_readme_exist() -> None:
    _, _, listing = (ROOT / "README.md").read_text().partition("## Where things are\n\n")
    paths = re.findall(r"^    (\S+)  ", listing, re.MULTILINE)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_links_between_pages_are_valid() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.slow
def test_the_snippet_of_the_kernels_page_runs() -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    lines = [line[4:] for line in page.splitlines() if line.startswith("    ")]
    snippet = "\n".join(line for line in lines if not COMMAND.match(line))
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    names: dict[str, Any] = {
        "query": normal(1, 2, 2, 5, 8),
        "keys": normal(1, 2, 2, 32, 8),
        "u": normal(1, 2),
        "v": normal(1, 2),
        "cores": normal(1, 1, 2, 2),
        "values": normal(32 * 32, 12),
        "pre_values": normal(32 * 32, 4),
        "inputs": normal(5, 4),
    }
    exec(compile(snippet, "docs/kernels.md", "exec"), names)
    assert names["scores"].shape[:2] == names["addresses"].shape == (5, 32)
    assert names["pooled"].shape == (5, 12)
    expected = jnp.einsum("tmd,td->tm", names["pre_values"][names["addresses"]], names["inputs"])
    assert jnp.allclose(names["pre_scores"], expected, atol=1e-5)


@pytest.mark.slow(minutes=5)
def test_the_commands_of_the_pages_run_in_order(tree: Path) -> None:
    """From top to bottom like a new user, but shortened; they write only into runs/."""
    modules = sorted(Path(json.__file__).parent.parent.glob("[a-h]*.py"))
    texts = [path.read_text(errors="replace") for path in modules]
    (tree / "corpus").mkdir()
    records = [json.dumps({"text": text}) for text in texts if len(text) < 20_000]
    (tree / "corpus/standard_library.jsonl").write_text("\n".join(records))
    (tree / "shakespeare.txt").write_text("To be, or not to be, that is the question: \n" * 200)
    there = set(tree.iterdir())

    with tiny_run.quick_compilation(tree / "runs" / "compiled"):
        for command in of_kind(Runs):
            how = COMMANDS[command]
            assert isinstance(how, Runs)
            completed = run(*arguments_of(command), *how.shorter)
            assert completed.status == 0, f"{command}: {completed.err}"
            if "--mode" in command and "prepare" not in command and "export" not in command:
                assert completed.out, command
    assert set(tree.iterdir()) - there == {tree / "runs"}
    assert (tree / "runs/cost/cost.png").is_file()
    assert (tree / "runs/exported_moe/config.json").is_file()
