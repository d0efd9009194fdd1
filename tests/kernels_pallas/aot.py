"""Compiles for TPUs that are not attached, each batch of cases in a process of its own."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
FUSED_BYTES = 2 * 2**20  # what a fused kernel may need beside arguments and results


def run_cases(script: str, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What `script`, a file beside this one, says of each case: JSON in argv[1], JSON on stdout."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install libtpu")
    path = Path(__file__).with_name(script)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no host of TPUs to ask
    }
    # libtpu serves one process of a machine at a time.
    with Path(tempfile.gettempdir(), "umv2_libtpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.run(
            [sys.executable, str(path), json.dumps(cases)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)
