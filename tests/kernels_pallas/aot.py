"""Compiles for chips that are not attached, each batch of cases in a process of its own."""

import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
FUSED_BYTES = 2 * 2**20  # what a fused kernel may need beside arguments and results

Compiler = Literal["tpu", "h200"]

_MODULES = {"tpu": "libtpu", "h200": "jax_plugins.xla_cuda13"}
_SETTINGS = {
    "tpu": {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"},  # there is no host of TPUs to ask
    "h200": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},  # there is nothing to tune on
}


def run_cases(script: str, *cases: dict[str, Any], compiler: Compiler = "tpu") -> list[Any]:
    """What `script`, a file beside this one, says of each case: JSON in argv[1], JSON on stdout.

    Skips the test that asks where the compiler is not installed.
    """
    if not _installed(_MODULES[compiler]):
        pytest.skip(f"needs {_MODULES[compiler]}: pip install -e '.[compile]'")
    with environment(compiler) as variables:
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), json.dumps(cases)],
            capture_output=True,
            text=True,
            env=variables,
            check=False,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


def _installed(module: str) -> bool:
    # As in umv2.cost.topology, which these tests do without.
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


@contextlib.contextmanager
def environment(compiler: Compiler) -> Iterator[dict[str, str]]:
    """The environment of a process that compiles, for as long as it may: flags are fixed early."""
    root = str(Path(__file__).parents[2])
    variables = os.environ | _SETTINGS[compiler] | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    with Path(tempfile.gettempdir(), f"umv2_{compiler}.lock").open("w") as lock:
        if compiler == "tpu":  # libtpu serves one process of a machine at a time
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield variables
