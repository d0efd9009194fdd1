"""The environment that make targets set up, and the settings of tests."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import umv2
from tests.test_import_rules import imports, sources

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PIN_FILES = ("requirements.txt", "requirements-dev.txt")


def read_pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("pin", [p for f in PIN_FILES for p in read_pins(f)], ids=str)
def test_requirements_have_two_bounds_and_are_installed(pin: Requirement) -> None:
    assert {spec.operator for spec in pin.specifier} == {">=", "<"}
    assert pin.specifier.contains(metadata.version(pin.name))


def test_every_package_that_the_code_imports_is_required() -> None:
    extras = [Requirement(text) for e in PROJECT["optional-dependencies"].values() for text in e]
    required = {canonicalize_name(r.name) for r in read_pins("requirements.txt") + extras}
    distributions = metadata.packages_distributions()
    trees = [
        ast.walk(ast.parse(text))
        for path, text in sources().items()
        if not path.startswith("tests/")
    ]
    imported = {name.partition(".")[0] for nodes in trees for _, name in imports(nodes)}
    others = (
        imported - sys.stdlib_module_names - {"umv2", "kernels_pallas", "configs", "experiments"}
    )
    assert "jax" in others
    for name in others:
        names = {canonicalize_name(d) for d in distributions.get(name, [name])}
        assert names & required, f"{name} is imported but not required"


def test_the_version_is_valid() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", umv2.__version__)


def test_tests_see_eight_devices_and_float32() -> None:
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8
    assert jnp.arange(2.0).dtype == jnp.float32


def test_silent_rank_promotion_raises() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)


@pytest.mark.usefixtures("x64")
def test_the_x64_fixture_allows_float64() -> None:
    assert jnp.arange(2.0).dtype == jnp.float64


def start_make(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # A minimal environment, as these tests may themselves run under make.
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["make", *arguments], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True
    )


def make(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start_make(folder, *arguments)
    output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile with requirements that need no download."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*PIN_FILES, "pyproject.toml"):
        (tmp_path / name).write_text("# nothing\n")
    return tmp_path


def test_a_python_that_is_too_old_is_a_one_line_error(project: Path) -> None:
    old = project / "python3.11"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    status, _, errors = make(project, "venv", f"PYTHON={old} python-that-is-not-there")
    assert status != 0
    message, from_make = errors.splitlines()
    assert message.startswith("umv2 needs Python >= 3.12")
    assert "apt install" in message
    assert from_make.startswith("make: ***")
    assert not (project / ".venv").exists()


@pytest.mark.slow
def test_the_environment_matches_the_requirements_from_any_state(project: Path) -> None:
    arguments = ("venv", f"PYTHON=python-that-is-not-there {sys.executable}")
    pins = project / "requirements.txt"

    def stamps() -> list[str]:
        return [path.name for path in (project / ".venv").glob("pins-*")]

    # Two at once, over the remains of an interrupted venv: one works, the other waits.
    (project / ".venv").mkdir()
    both = [start_make(project, *arguments) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(outputs).count("Installing") == 1
    (first,) = stamps()

    assert "Installing" not in make(project, *arguments)[1]

    pins.write_text("# other pins\n")
    assert "Installing" in make(project, *arguments)[1]
    assert len(stamps()) == 1
    assert stamps() != [first]

    # A partial installation is not reused.
    pins.write_text("not a requirement\n")
    assert make(project, *arguments)[0] != 0
    assert stamps() == []
    (project / ".venv/leftover").touch()
    pins.write_text("# nothing\n")
    assert make(project, *arguments)[0] == 0
    assert stamps() == [first]
    assert not (project / ".venv/leftover").exists()


def test_the_oldest_jax_has_an_environment_and_tests_of_its_own(project: Path) -> None:
    (project / "requirements.txt").write_text("# jax>=1\njax>=0.11.2,<0.13\njaxtyping>=0.3,<0.4\n")
    status, commands, errors = make(project, "-n", "test-oldest", "EXTRAS=gpu", "ARGS=-x")
    assert (status, errors) == (0, "")
    (install,) = re.findall(r"-m pip install .*\n? .*", commands)
    assert install.split("requirements-dev.txt")[1].split()[0] == "jax==0.11.2"
    assert re.search(
        r"^\.venv-oldest/bin/python -m pytest .* tests/kernels_pallas .* -x$", commands, re.M
    )
    assert ".venv/" not in commands


def test_make_help_names_every_target(project: Path) -> None:
    targets = {line.split()[0] for line in make(project, "help")[1].splitlines()}
    assert targets >= {
        "train",
        "test",
        "test-all",
        "test-oldest",
        "lint",
        "format",
        "venv",
        "clean",
    }


def test_every_package_is_in_the_wheel() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in ("umv2", "kernels_pallas")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(folders | {"umv2.configs"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment where the wheel and its requirements are installed."""
    folder = tmp_path_factory.mktemp("installed")
    tree = folder / "tree"
    for name in ("umv2", "kernels_pallas", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "kernels_pallas" / "tuned").mkdir(exist_ok=True)
    (tree / "kernels_pallas" / "tuned" / "some_device.json").write_text("{}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-index"]
    wheel = [*pip, "wheel", *options, "--no-build-isolation", f"--wheel-dir={folder}", str(tree)]
    subprocess.run(wheel, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python, (built,) = folder / "venv/bin/python", folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", *options, built], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # The requirements come from this environment; its .pth files (of an editable umv2) are ignored.
    (site / "requirements.pth").write_text(f"{Path(jax.__file__).parent.parent}\n")
    return folder


def of_installed(folder: Path, cwd: Path, *command: str) -> str:
    result = subprocess.run(
        [folder / "venv/bin" / command[0], *command[1:]],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_contains_the_command_the_configurations_and_its_types(
    installed: Path, tmp_path: Path
) -> None:
    assert "--mode" in of_installed(installed, tmp_path, "umv2", "--help")
    (tmp_path / "mine.py").write_text(
        "from configs import tiny\n\ndef get_config(family):\n    return tiny.get_config(family)\n"
    )
    (tmp_path / "configs").mkdir()  # an unrelated folder
    by_name, of_user = (
        of_installed(installed, tmp_path, "umv2", f"--config={given}:moe", "--mode=inspect")
        for given in ("tiny", "mine.py")
    )
    assert 'model.ffn = "moe"' in by_name
    assert of_user == by_name
    program = (
        "import importlib.resources, umv2; from umv2.configs import paper_1b_7b;"
        "print(umv2.__file__, paper_1b_7b.get_config().train.num_steps > 0);"
        "read = lambda *n: importlib.resources.files(n[0]).joinpath(*n[1:]).read_text();"
        "print(read('umv2', 'py.typed'), read('kernels_pallas', 'py.typed'),"
        " read('kernels_pallas', 'tuned', 'some_device.json'))"
    )
    printed = of_installed(installed, tmp_path, "python", "-c", program).split()
    assert printed == [
        f"{next(installed.glob('venv/lib/*/site-packages'))}/umv2/__init__.py",
        "True",
        "{}",
    ]


@pytest.mark.slow
def test_the_wheel_installs_two_top_level_packages(installed: Path) -> None:
    (site,) = installed.glob("venv/lib/*/site-packages")
    names = {path.name for path in site.iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert names - {"__pycache__"} == {"umv2", "kernels_pallas"}
    fields = metadata.Distribution.at(next(site.glob("umv2-*.dist-info"))).metadata
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Project-URL"].startswith("Paper, https://arxiv.org/abs/")
    assert len(fields.get_all("Classifier") or []) >= 5
