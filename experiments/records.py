"""Records of finished runs: where they lie, how they are written and read."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

FOLDER = flags.DEFINE_string(
    "results", "experiments/results/ablations", "Folder of the runs and pages of all ablations."
)
# In the folder of runs on another corpus than the scale's: the arguments of `corpora.take`.
CORPUS = "corpus.json"
_KINDS = ("run", "step", "held_out", "end")
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


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of one finished run: about it, its logged steps, its evaluations, its end."""

    head: dict[str, Any]
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    end: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of the parameters and of the order of the data."""
        return int(self.head["seed"])

    @property
    def diverged(self) -> str | None:
        """What was said when the loss stopped being finite; None for a run that ended well."""
        message: str | None = self.end["diverged"]
        return message

    @property
    def losses(self) -> list[float]:
        """Training losses of the logged steps, nats a token."""
        return [step["loss"] for step in self.steps]

    @property
    def tokens(self) -> list[int]:
        """Tokens seen after each logged step."""
        return [step["tokens"] for step in self.steps]

    @property
    def held_out_losses(self) -> list[float]:
        """Losses of the held-out text, nats a token, in the order of evaluation."""
        return [entry["held_out_loss"] for entry in self.held_out]


def read(path: Path) -> Run:
    """Reads the records of one run.

    Raises:
      ValueError: a file that is not one; the message names it.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in _KINDS}
        (head,), (end,) = kinds["run"], kinds["end"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the records of a finished run: {error}") from error
    return Run(head, kinds["step"], kinds["held_out"], end)


def read_all(results: Path) -> dict[str, dict[int, Run]]:
    """Returns the finished runs of a scale by configuration and seed.

    Raises:
      ValueError: a file that is not the records of a run, or not where it belongs.
    """
    found: dict[str, dict[int, Run]] = {}
    for path in sorted(results.glob("runs/*/seed_*.jsonl")):
        run = read(path)
        if run_file(results, run.head["config_hash"], run.seed) != path:
            raise ValueError(f"{path}: holds {run.head['config_hash']}, seed {run.seed}")
        found.setdefault(run.head["config_hash"], {})[run.seed] = run
    return found
