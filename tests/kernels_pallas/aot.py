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

# The module that has the compiler, and its settings.
_COMPILERS = {
    "tpu": ("libtpu", {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"}),  # there is no host to ask
    # There is nothing to tune on.
    "h200": ("jax_plugins.xla_cuda13", {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}),
}


def run_cases(
    script: str, *cases: dict[str, Any], compiler: Literal["tpu", "h200"] = "tpu"
) -> list[Any]:
    """What `script`, a file beside this one, says of each case: JSON in argv[1], JSON on stdout.

    Skips the test that asks where the compiler is not installed.
    """
    module, settings = _COMPILERS[compiler]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}: pip install -e '.[compile]'")
    root = Path(__file__).parents[2]
    environment = os.environ | settings | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    with _libtpu_alone() if compiler == "tpu" else contextlib.nullcontext():
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), json.dumps(cases)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@contextlib.contextmanager
def _libtpu_alone() -> Iterator[None]:
    """libtpu serves one process of a machine at a time."""
    with Path(tempfile.gettempdir(), "umv2_libtpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
