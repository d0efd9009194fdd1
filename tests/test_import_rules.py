"""Checks the import rules of the design by walking syntax trees."""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
BANNED = {name: entry["msg"] for name, entry in RUFF["flake8-tidy-imports"]["banned-api"].items()}

# The parts of umv2 that each part may import, in addition to BASE.
BASE = (
    "umv2.config",
    "umv2.files",
    "umv2.command",
    "umv2.tables",
    "umv2.pictures",
    "umv2.hardware",
    "umv2.types",
)
_MODEL = ("umv2.sharding", "umv2.kernels", "umv2.distributed", "umv2.model")
_TRAINING = (*_MODEL, "umv2.cost", "umv2.data", "umv2.training")
_ABOVE = ("umv2.evaluation", "umv2.inference", "umv2.interop", "umv2.planning")
UMV2: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(BASE, ()),
    "umv2.sharding": (),
    "umv2.kernels": ("kernels_pallas",),
    "umv2.distributed": (),
    "umv2.model": ("umv2.sharding", "umv2.kernels"),
    "umv2.data": ("umv2.distributed",),
    "umv2.cost": ("umv2.sharding", "umv2.model"),
    "umv2.training": _TRAINING,
    "umv2.inference": (*_MODEL, "umv2.data"),
    "umv2.interop": _TRAINING,
    "umv2.evaluation": (*_TRAINING, "umv2.inference"),
    "umv2.planning": (*_TRAINING, "umv2.inference"),
    "umv2.modes": (*_TRAINING, *_ABOVE),
    "umv2.cli": (*_TRAINING, *_ABOVE, "umv2.modes"),
}

# The packages, besides the standard library, that these may import at load time ...
LOAD_TIME_IMPORTS = {
    "configs": ("configs", "ml_collections"),
    "experiments": (
        "experiments",
        "configs",
        "ml_collections",
        "absl",
        "umv2.command",
        "umv2.files",
        "umv2.config.schema",
    ),
}
# ... and these at any time. numpy comes with jax.
IMPORTS = {
    "kernels_pallas": ("kernels_pallas", "jax", "numpy"),
    "kernels_pallas.array_types": ("jax", "jaxtyping", "numpy"),  # jaxtyping if installed
    "kernels_pallas.benchmark": ("kernels_pallas", "jax", "numpy", "matplotlib"),
}
# Packages with their only importers. Tests may import anything.
ONLY_IMPORTERS = {
    "kernels_pallas": ("umv2.kernels", "kernels_pallas", "experiments"),
    "orbax": ("umv2.training.checkpoint",),
    "absl.flags": ("umv2.cli", "umv2.command", "experiments"),
    "configs": ("configs", "experiments"),
    "experiments": ("experiments",),
    "main": (),
    "tests": (),
}
PRINTERS = ("umv2.cli", "kernels_pallas.bench", "experiments")

MAX_TYPE_IGNORES = 10  # in the repository
TYPE_IGNORE = re.compile(r"#\s*type:\s*ignore")
EXPLAINED_TYPE_IGNORE = re.compile(r"#\s*type:\s*ignore\[[a-z, -]+\]\s+#\s*\w")


def is_within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or in one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every import; a relative name keeps its leading dots."""
    for node in nodes:
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                prefix = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def load_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when a module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from load_time_nodes(child)


def attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every attribute, with its head resolved by the imports."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
            case ast.ImportFrom():
                origins |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{origins.get(head, head)}.{rest}"


def part(name: str) -> str | None:
    """Returns the part of umv2 that contains a dotted name: the longest that matches."""
    return max((p for p in UMV2 if is_within(name, p)), key=len, default=None)


def import_fault(module: str, name: str) -> str | None:
    """Returns why a module may not import a name, or None if it may."""
    if name.startswith("."):
        return f"imports {name} by a relative name"
    if is_within(module, "tests"):
        return None
    for target, importers in ONLY_IMPORTERS.items():
        if is_within(name, target) and not is_within(module, *importers):
            return f"imports {name}, which only {', '.join(importers) or 'tests'} may"
    for importer in sorted(IMPORTS, reverse=True):  # the longer name first
        if is_within(module, importer):
            allowed = is_within(name, *IMPORTS[importer], *sys.stdlib_module_names)
            return None if allowed else f"imports {name}, not one of {IMPORTS[importer]}"
    here, there = part(module), part(name)
    if here is None or there is None or here == there or (here in BASE and there in BASE):
        return None
    return None if there in (*BASE, *UMV2[here]) else f"imports {name}, which {here} may not"


def faults(module: str, source: str) -> list[str]:
    """Returns the violations in one module, by line."""
    tree = ast.parse(source)
    broken = [
        (line, fault)
        for line, name in imports(ast.walk(tree))
        if (fault := import_fault(module, name))
    ]
    if allowed := LOAD_TIME_IMPORTS.get(module.partition(".")[0]):
        for line, name in imports(load_time_nodes(tree)):
            if not is_within(name, *allowed, *sys.stdlib_module_names):
                broken.append((line, f"imports {name} at load time"))
    for line, name in (*imports(ast.walk(tree)), *attributes(tree)):
        broken += [(line, f"uses {b}: {why}") for b, why in BANNED.items() if is_within(name, b)]
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")) if not is_within(module, *PRINTERS):
                broken.append((node.lineno, "calls print: libraries log through absl.logging"))
    broken += [
        (line, "ignores a type without a code and a reason")
        for line, comment in type_ignores(source)
        if not EXPLAINED_TYPE_IGNORE.search(comment)
    ]
    if is_within(module, "umv2") and module != "umv2" and part(module) is None:
        broken.append((1, "belongs to no part of UMV2"))
    return [f"{module}:{line} {fault}" for line, fault in sorted(set(broken))]


def type_ignores(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of the comments that silence the type checker."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and TYPE_IGNORE.search(token.string):
            yield token.start[0], token.string


def sources() -> dict[str, str]:
    """Returns the text of every Python file of the project by path; folders may be missing."""
    folders = ("configs", "experiments", "umv2", "kernels_pallas", "tests")
    paths = [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in sorted(paths)}


def module_name(path: str) -> str:
    """Returns the module of a path: umv2/model/__init__.py is umv2.model."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_every_module_follows_the_rules() -> None:
    broken = [f for path, text in sources().items() for f in faults(module_name(path), text)]
    assert not broken, "\n".join(broken)


def test_the_walk_reads_this_file_and_the_package() -> None:
    assert {"tests/test_import_rules.py", "umv2/__init__.py"} <= sources().keys()


def test_there_are_few_type_ignores() -> None:
    ignores = [path for path, text in sources().items() for _ in type_ignores(text)]
    assert len(ignores) <= MAX_TYPE_IGNORES, ignores


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("umv2.model.block", "import umv2.training.train", "umv2.model may not"),
        ("umv2.model.block", "from umv2 import inference", "umv2.model may not"),
        ("umv2.model.block", "def f():\n    from umv2.data import sources", "umv2.model may not"),
        ("umv2.sharding.mesh", "from umv2.model import layers", "umv2.sharding may not"),
        ("umv2.config.data", "from umv2.sharding import create_mesh", "umv2.config may not"),
        ("umv2.training.train", "from umv2 import modes", "umv2.training may not"),
        ("umv2.training.train", "from umv2.evaluation import report", "umv2.training may not"),
        ("umv2.cost.traffic", "from umv2.training import optim", "umv2.cost may not"),
        ("umv2.training.train", "import main", "only tests may"),
        ("umv2.planning.plan", "from configs import tiny", "only configs, experiments may"),
        ("umv2.model.block", "import kernels_pallas", "only umv2.kernels"),
        ("umv2.model.block", "from kernels_pallas.weighted_lookup import api", "only umv2.kernels"),
        ("umv2.training.state", "import orbax.checkpoint as ocp", "only umv2.training.checkpoint"),
        ("umv2.training.train", "from absl import flags", "only umv2.cli"),
        ("kernels_pallas.dispatch", "from absl import flags", "only umv2.cli"),
        ("kernels_pallas.dispatch", "import flax", "not one of"),
        ("kernels_pallas.dispatch", "from umv2.types import Batch", "not one of"),
        ("kernels_pallas.bench", "from umv2.types import Batch", "not one of"),
        ("configs.tiny", "import jax", "at load time"),
        ("experiments.ablations.report", "if True:\n    import numpy", "at load time"),
        ("umv2.types", "from . import config", "relative"),
        ("umv2.types", "from ..umv2 import config", "relative"),
        ("umv2.helpers", "", "belongs to no part"),
        ("umv2.types", "import jax._src.core", r"uses jax\._src"),
        ("umv2.types", "import jax\njax._src.core", r"uses jax\._src"),
        ("umv2.types", "from jax.experimental import shard_map", "uses jax.experimental.shard_map"),
        ("umv2.types", "from flax import nnx\n@nnx.jit\ndef f(): pass", r"2 uses flax\.nnx\.jit"),
        ("umv2.types", "from flax import nnx as n\nn.scan(f)", r"uses flax\.nnx\.scan"),
        ("umv2.types", "import flax.nnx as n\nn.vmap(f)", r"uses flax\.nnx\.vmap"),
        ("umv2.types", "from flax.nnx import vmap as v", r"uses flax\.nnx\.vmap"),
        ("umv2.types", "def f():\n    print(1)", "2 calls print"),
        ("umv2.types", "x = 1  # type: ignore", "without a code"),
        ("umv2.types", "x = 1  # type: ignore[misc]", "without a code"),
        ("tests.test_model", "from flax import nnx\nnnx.jit(f)", r"uses flax\.nnx\.jit"),
    ],
)
def test_a_violation_is_reported(module: str, source: str, fault: str) -> None:
    (broken,) = faults(module, source)
    assert re.search(fault, broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("main", "from umv2 import cli"),
        ("umv2.cli", "from absl import app, flags\nfrom umv2 import modes\nprint(1)"),
        ("umv2.evaluation.report", "from umv2.training import records\nimport umv2.config"),
        ("umv2.training.held_out", "from umv2.training.checkpoint import restore"),
        ("umv2.training.checkpoint", "import orbax.checkpoint"),
        ("umv2.model.block", "from umv2 import sharding, types\nfrom umv2.model import layers"),
        ("umv2.config.data", "from umv2 import types"),
        ("umv2.kernels", "from kernels_pallas import weighted_lookup"),
        ("kernels_pallas.dispatch", "import json\nimport jax.numpy as jnp"),
        ("kernels_pallas.bench", "import argparse\nprint(1)"),
        ("kernels_pallas.benchmark.report", "from matplotlib import pyplot"),
        ("configs.tiny", "import math\nimport ml_collections\nfrom configs import base"),
        ("experiments.ablations.report", "def plot():\n    import matplotlib"),
        ("tests.test_model", "import orbax.checkpoint\nfrom umv2 import model, data"),
        ("umv2.types", "x = 1  # type: ignore[misc]  # because"),
        ("umv2.types", 'x = "# type: ignore"\nself.print(jit(nnx))'),
    ],
)
def test_allowed_code_is_not_reported(module: str, source: str) -> None:
    assert not faults(module, source)
