"""A copy of the folder `kernels_pallas` only needs jax and its requirements."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Blocks imports of everything else, as if only jax were installed.
_BLOCK = """
import importlib, importlib.abc, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
_RUN = """
import jax, jax.numpy as jnp
import kernels_pallas as kp

for module in pkgutil.walk_packages(kp.__path__, "kernels_pallas."):
    importlib.import_module(module.name)
assert kp.__file__.startswith(FOLDER), kp.__file__

ids = jnp.array([[0, 2], [1, 1]], jnp.int32)
arrays = (jnp.ones((3, 4)), ids, jnp.ones((2, 2, 1)))
assert jax.grad(lambda v: kp.value_aggregation(v, *arrays[1:]).sum())(arrays[0]).sum() == 16
assert kp.value_aggregation_row_gradients(*arrays, jnp.ones((2, 4))).num_rows == 3
assert jax.grad(lambda v: kp.row_products(v, ids, jnp.ones((2, 4))).sum())(arrays[0]).sum() == 16
keys = jnp.arange(24.0).reshape(1, 2, 1, 3, 4)

def best(query):
    return kp.product_key_top_k(query, keys, None, None, None, top_m=1, shortlist=1)

assert best(jnp.ones((1, 2, 1, 2, 4)))[1].tolist() == [[8], [8]]
assert jax.grad(lambda query: best(query)[0].sum())(jnp.ones((1, 2, 1, 2, 4))).sum() == 248
print("all of it")
"""


def normalized(distribution: str) -> str:
    return distribution.lower().replace("-", "_")


def required_by(distribution: str) -> set[str]:
    """The names of a distribution and of its requirements without extras, transitively."""
    found, waiting = set(), [distribution]
    while waiting:
        name = normalized(re.split(r"[^\w.-]", waiting.pop())[0])
        if name not in found:
            found.add(name)
            required = metadata.requires(name) or []
            waiting += [text for text in required if "extra ==" not in text]
    return found


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the folder in an otherwise empty folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels_pallas", tmp_path / "kernels_pallas", ignore=ignored)
    return tmp_path


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that can only import jax and the copy."""
    needed = required_by("jax")
    blocked = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not needed & {normalized(name) for name in distributions}
    }
    values = f"BLOCKED, FOLDER = {blocked - {'kernels_pallas'} | {'umv2'}!r}, {str(folder)!r}\n"
    return subprocess.run(
        [sys.executable, "-c", values + _BLOCK + script, *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_copy_only_needs_jax(copied: Path) -> None:
    assert not {"jaxtyping", "umv2", "flax", "matplotlib", "pytest"} & required_by("jax")
    refused = run(copied, "import jaxtyping")
    assert "No module named 'jaxtyping'" in refused.stderr
    finished = run(copied, _RUN)
    assert finished.stdout == "all of it\n", finished.stderr


@pytest.mark.slow
def test_a_copy_benchmarks_without_a_plot(copied: Path) -> None:
    command = ["--op=value_aggregation", "--shapes=one_token", "--repeats=1", "--ids=uniform"]
    script = "from kernels_pallas import bench\nbench.run()"
    finished = run(copied, script, *command, "--implementation=xla", "--passes=forward")
    assert finished.returncode == 0, finished.stderr
    assert "one_token" in finished.stdout
