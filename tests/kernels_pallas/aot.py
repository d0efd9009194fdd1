"""Compiles for chips that are not attached, each batch of cases in a separate process."""

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
FUSED_BYTES = 2 * 2**20  # temporaries that a fused kernel may need

Compiler = Literal["tpu", "h200"]

_MODULES = {"tpu": "libtpu", "h200": "jax_plugins.xla_cuda13"}
_SETTINGS = {
    "tpu": {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"},  # no TPU host metadata to query
    "h200": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},  # no device to autotune on
}


def run_cases(script: str, *cases: dict[str, Any], compiler: Compiler = "tpu") -> list[Any]:
    """Runs `script`, a file in this folder, on the cases: JSON in argv[1], JSON on stdout.

    Skips the calling test if the compiler is not installed.
    """
    results: list[Any] = run(Path(__file__).with_name(script), json.dumps(cases), compiler)
    return results


def run(script: Path, argument: str, compiler: Compiler) -> Any:
    """Runs a script for a compiler, and returns the JSON that it prints; skips like `run_cases`."""
    if not _installed(_MODULES[compiler]):
        pytest.skip(f"needs {_MODULES[compiler]}: pip install -e '.[compile]'")
    with environment(compiler) as variables:
        process = subprocess.run(
            [sys.executable, str(script), argument],
            capture_output=True,
            text=True,
            env=variables,
            check=False,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


def declared_costs(text: str) -> list[tuple[int, int, int]]:
    """FLOPs, transcendentals and bytes of each custom kernel of a compiled program.

    They are JSON, in the `backend_config` of a TPU kernel, and escaped in that of a Mosaic GPU
    kernel; in its `frontend_attributes` in jax 0.11.
    """
    declared = r'cost_estimate(?:_json)?"? ?[:=] ?"?({[^{}]*})'
    costs = map(json.loads, re.findall(declared, text.replace(r"\22", '"')))
    return [
        (int(cost["flops"]), int(cost["transcendentals"]), int(cost["bytes_accessed"]))
        for cost in costs
    ]


def _installed(module: str) -> bool:
    # Duplicated from umv2, which these tests must not import.
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


@contextlib.contextmanager
def environment(compiler: Compiler) -> Iterator[dict[str, str]]:
    """Yields the environment of a compiling process; on exit, another process may compile.

    XLA reads its flags at startup, so they must be in the environment.
    """
    root = str(Path(__file__).parents[2])
    variables = os.environ | _SETTINGS[compiler] | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    with Path(tempfile.gettempdir(), f"umv2_{compiler}.lock").open("w") as lock:
        if compiler == "tpu":  # only one process per machine can use libtpu
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield variables
