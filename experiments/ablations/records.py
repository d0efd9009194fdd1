"""Records of finished runs: where they are stored, and which arms a run belongs to.

A run is stored as SCALE/ABLATION/ARM/seed_N.jsonl in the results folder, under the first arm of the
catalogue with its configuration. It belongs to every arm with that configuration. Runs are matched
by the configuration in the file, so adding a field or renaming an arm loses no run. (The first runs
also have a `config_hash`, which is unused.)
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import base
from experiments import measurements
from experiments.ablations import scales
from experiments.measurements import RecordsError
from umv2.config.schema import differing_fields

FOLDER = flags.DEFINE_string(
    "results", "experiments/results/ablations", "Folder of the runs and pages of all ablations."
)
# Marks a folder of runs on a corpus other than the scale's: the arguments of `corpora.use`.
CORPUS = "corpus.json"
_RUNS = "*/*/seed_*.jsonl"  # in the folder of a scale
# Fields that change how a run is stored, shown or executed, not what it computes.
_BOOKKEEPING = {
    "train.log_interval_steps",
    "train.checkpoint_interval_steps",
    "train.num_checkpoints_kept",
    "model.attention",
}
# Fields removed from configs/base.py, each with the value that is now fixed. A stored run with
# another value belongs to no arm.
_REMOVED: dict[str, Any] = {}

# Fields that others replaced: by path, then by value, the equivalent values of the new fields.
_REPLACED: dict[str, dict[Any, dict[str, Any]]] = {
    "model.family": {
        "dense": {"model.ffn": "dense", "model.memory.layer": "none"},
        "memory": {"model.ffn": "dense", "model.memory.layer": "product_key"},
        "moe": {"model.ffn": "moe", "model.memory.layer": "none"},
    }
}

_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))  # None: not finite
# The fields of each kind of line. A file has one line of kind 'run' and one of kind 'end'.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": {
        "seed": (int,),
        "config": (dict,),
        "corpus.source": (str,),
        "corpus.hash": (str,),
        "date": (str,),
        "versions.python": (str,),
        "versions.jax": (str,),
        "device": (str,),
        "tokens": (int,),
        "training_flops": _NUMBER,
        "active_parameters": (int,),
        "total_parameters": (int,),
        "forward_flops_per_token": _NUMBER,
        "values_read": (int, type(None)),
        "decode_bytes.1": _NUMBER,
        "decode_bytes.64": _NUMBER,
    },
    "step": {"tokens": (int,), "loss": _MAYBE_NUMBER},
    "held_out": {"held_out_loss": _MAYBE_NUMBER},
    "end": {
        "diverged": (str, type(None)),
        "health": (dict,),
        "answers": (dict, type(None)),
        "seconds_shared_machine": _NUMBER,
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of one finished run: about it, its logged steps, its evaluations, its end."""

    head: dict[str, Any]
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    end: dict[str, Any]

    @property
    def seed(self) -> int:
        """Seed of the parameters and of the order of the data."""
        return int(self.head["seed"])

    @property
    def diverged(self) -> str | None:
        """The message of a run whose loss became non-finite; None for one that completed."""
        message: str | None = self.end["diverged"]
        return message

    @property
    def losses(self) -> list[float]:
        """Training losses of the logged steps, nats per token; NaN where not finite."""
        return [_or_nan(step["loss"]) for step in self.steps]

    @property
    def tokens(self) -> list[int]:
        """Tokens seen after each logged step."""
        return [step["tokens"] for step in self.steps]

    @property
    def held_out_losses(self) -> list[float]:
        """Held-out losses, nats per token, in the order of evaluation; NaN where not finite."""
        return [_or_nan(entry["held_out_loss"]) for entry in self.held_out]

    @property
    def answer_accuracy(self) -> float:
        """Accuracy on the multi-hop questions; NaN where none were asked."""
        answers = self.end["answers"] or {}
        return _or_nan(answers.get("accuracy"))


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


class Stored:
    """The finished runs of a scale."""

    def __init__(self, folder: Path):
        """Reads all runs in the folder of a scale.

        Raises:
          RecordsError: a file does not hold the records of a run, or two files hold the same run.
        """
        self.runs = {path: read(path) for path in sorted(folder.glob(_RUNS))}
        self._by_identity: dict[str, dict[int, Path]] = {}
        for path, run in self.runs.items():
            seeds = self._by_identity.setdefault(_identity(run.head["config"]), {})
            if run.seed in seeds:
                raise RecordsError(f"{path}: the same run as {seeds[run.seed]}; remove one of them")
            seeds[run.seed] = path

    def paths(self, values: ConfigDict) -> dict[int, Path]:
        """Returns the files of a configuration's runs by seed."""
        return self._by_identity.get(identity(values), {})

    def find(self, values: ConfigDict) -> dict[int, Run]:
        """Returns a configuration's runs by seed."""
        return {seed: self.runs[path] for seed, path in self.paths(values).items()}


def scale_folders(results: Path) -> list[Path]:
    """Returns the folders with runs in the order of the scales, each before its other corpora.

    Raises:
      RecordsError: the name of a folder does not begin with a scale.
    """
    folders = {path.parents[2] for path in results.glob(f"*/{_RUNS}")}
    for folder in folders:
        if scale_of(folder) not in scales.SCALES:
            known = ", ".join(scales.SCALES)
            raise RecordsError(f"{folder}: holds runs, and its name must begin with one of {known}")
    return sorted(folders, key=lambda f: (scales.SCALES.index(scale_of(f)), f.name))


def scale_of(folder: Path) -> str:
    """Returns the scale of the runs in a folder, which is named SCALE or SCALE_CORPUS."""
    return folder.name.partition("_")[0]


def corpus_of(folder: Path) -> dict[str, Any] | None:
    """Returns the corpus of the runs in a folder; None: that of the scale.

    Raises:
      RecordsError: the file that names the corpus is damaged.
      FileError: the file cannot be read.
    """
    path = folder / CORPUS
    if not path.exists():
        return None
    lines = measurements.read(path)
    if len(lines) != 1 or lines[0].keys() != {"corpus", "vocab_size"}:
        raise RecordsError(f"{path}: must be one line with corpus and vocab_size")
    return lines[0]


def run_file(folder: Path, arm: str, seed: int) -> Path:
    """Returns the file of a run of ABLATION/ARM in the folder of a scale."""
    return folder / arm / f"seed_{seed}.jsonl"


def plain(values: ConfigDict) -> dict[str, Any]:
    """Returns a configuration in its stored form."""
    stored: dict[str, Any] = json.loads(values.to_json())
    return stored


def identity(values: ConfigDict) -> str:
    """Returns a string that is equal for configurations that compute the same run."""
    return _identity(plain(values))


def _identity(config: Mapping[str, Any]) -> str:
    return json.dumps(_with_defaults(config), sort_keys=True)


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Lists 'path: left -> right' for every field in which two stored configurations differ.

    A field that only one of them has is at its default in the other; bookkeeping is ignored.
    """
    return differing_fields(_with_defaults(left), _with_defaults(right))


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by path, missing ones at their defaults."""
    given = _flat(config)
    for path, meanings in _REPLACED.items():
        if path in given:
            given |= meanings.get(value := given.pop(path), {path: value})
    fields = _flat(plain(base.get_config())) | _REMOVED | given
    return {path: value for path, value in fields.items() if path not in _BOOKKEEPING}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def read(path: Path) -> Run:
    """Reads the records of one run.

    Raises:
      RecordsError: the file does not hold the records of a finished run.
      FileError: the file cannot be read.
    """
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _FIELDS}
    try:
        for number, line in enumerate(measurements.read(path), start=1):
            kind = line.get("kind")
            if kind not in lines:
                raise RecordsError(
                    f"line {number}: kind={kind!r}: must be one of {', '.join(lines)}"
                )
            fields = _flat(line) | line
            for name, types in _FIELDS[kind].items():
                if not isinstance(fields.get(name, ...), types):
                    given = repr(fields[name]) if name in fields else "missing"
                    raise RecordsError(f"line {number}: {name}: {given}")
            lines[kind].append(line)
        for kind in ("run", "end"):
            if len(lines[kind]) != 1:
                raise RecordsError(f"{len(lines[kind])} lines of kind '{kind}' instead of one")
        if not lines["held_out"] and lines["end"][0]["diverged"] is None:
            raise RecordsError("no line of kind 'held_out'")
    except RecordsError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise RecordsError(f"{path}: not the records of a finished run: {text}") from error
    return Run(lines["run"][0], lines["step"], lines["held_out"], lines["end"][0])
