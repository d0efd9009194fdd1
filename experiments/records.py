"""Records of finished runs: where they lie, how they are written and read."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

RESULTS = "experiments/results/ablations"
# What changes how a run is stored or shown, not what it computes.
_NOT_HASHED = ("log_interval_steps", "checkpoint_interval_steps", "num_checkpoints_kept")


def config_hash(values: ConfigDict) -> str:
    """Returns what tells two configurations apart in stored results; bookkeeping does not count."""
    plain = json.loads(values.to_json())
    for name in _NOT_HASHED:
        plain["train"].pop(name)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def run_file(results: Path, config_hash: str, seed: int) -> Path:
    """Returns the file of one run; `results` is the folder of a scale."""
    return results / "runs" / config_hash / f"seed_{seed}.jsonl"


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a run's records, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(unfinished, path)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the installed versions of packages."""
    return {name: importlib.metadata.version(name) for name in packages}
