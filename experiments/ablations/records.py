"""Records of finished runs: where they lie, and which run is an arm's.

A run lies in SCALE/ABLATION/ARM/seed_N.jsonl of the folder of results, under the first arm of the
catalogue that has its configuration. It belongs to every arm of that configuration, and what tells
is the configuration in the file: a field that is added later, or an arm that is renamed, loses no
run. (The first runs also hold a `config_hash`, which nothing reads.)
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
# In the folder of runs on another corpus than the scale's: the arguments of `corpora.take`.
CORPUS = "corpus.json"
_RUNS = "*/*/seed_*.jsonl"  # in the folder of a scale
# What changes how a run is stored or shown, not what it computes.
_BOOKKEEPING = {
    "train.log_interval_steps",
    "train.checkpoint_interval_steps",
    "train.num_checkpoints_kept",
}
# Fields that configs/base.py has no longer, each with the value that it has now for every run. A
# stored run with another value is no arm's.
_REMOVED: dict[str, Any] = {}

# What a field that is gone said, in the fields that took its place: by path, then by value.
_REPLACED: dict[str, dict[Any, dict[str, Any]]] = {
    "model.family": {
        "dense": {"model.ffn": "dense", "model.memory.layer": "none"},
        "memory": {"model.ffn": "dense", "model.memory.layer": "product_key"},
        "moe": {"model.ffn": "moe", "model.memory.layer": "none"},
    }
}

_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))  # None: it was not finite
# What the lines of each kind hold; there is one line about the run and one about its end.
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
        """Of the parameters and of the order of the data."""
        return int(self.head["seed"])

    @property
    def diverged(self) -> str | None:
        """What was said when the loss stopped being finite; None for a run that ended well."""
        message: str | None = self.end["diverged"]
        return message

    @property
    def losses(self) -> list[float]:
        """Training losses of the logged steps, nats a token; NaN where it was not finite."""
        return [_or_nan(step["loss"]) for step in self.steps]

    @property
    def tokens(self) -> list[int]:
        """Tokens seen after each logged step."""
        return [step["tokens"] for step in self.steps]

    @property
    def held_out_losses(self) -> list[float]:
        """Held-out losses, nats a token, in the order of evaluation; NaN where not finite."""
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
          RecordsError: a file that is not the records of a run, or of one that another file holds.
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
    """Returns the folders with runs: scales in their own order, each before its other corpora.

    Raises:
      RecordsError: a folder whose name begins with no scale.
    """
    folders = {path.parents[2] for path in results.glob(f"*/{_RUNS}")}
    for folder in folders:
        if scale_of(folder) not in scales.SCALES:
            known = ", ".join(scales.SCALES)
            raise RecordsError(f"{folder}: holds runs, and its name must begin with one of {known}")
    return sorted(folders, key=lambda f: (scales.SCALES.index(scale_of(f)), f.name))


def scale_of(folder: Path) -> str:
    """Returns the scale of the runs of a folder, named SCALE or SCALE_CORPUS."""
    return folder.name.partition("_")[0]


def corpus_of(folder: Path) -> dict[str, Any] | None:
    """Returns the corpus of the runs of a folder; None: the scale's own.

    Raises:
      RecordsError: the file that names it is damaged.
      FileError: it cannot be read.
    """
    path = folder / CORPUS
    if not path.exists():
        return None
    lines = measurements.read(path)
    if len(lines) != 1 or lines[0].keys() != {"corpus", "vocab_size"}:
        raise RecordsError(f"{path}: must be one line with corpus and vocab_size")
    return lines[0]


def run_file(folder: Path, arm: str, seed: int) -> Path:
    """Returns where the folder of a scale has a run of ABLATION/ARM."""
    return folder / arm / f"seed_{seed}.jsonl"


def plain(values: ConfigDict) -> dict[str, Any]:
    """Returns a configuration as it is stored."""
    stored: dict[str, Any] = json.loads(values.to_json())
    return stored


def identity(values: ConfigDict) -> str:
    """Returns a text that is the same for configurations that compute the same run."""
    return _identity(plain(values))


def _identity(config: Mapping[str, Any]) -> str:
    return json.dumps(_with_defaults(config), sort_keys=True)


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Lists 'path: left -> right' for every field in which two stored configurations differ.

    A field that only one of them has is at its default in the other; bookkeeping does not count.
    """
    return differing_fields(_with_defaults(left), _with_defaults(right))


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by path, those that the configuration has not at their defaults."""
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
      RecordsError: a file that is not one.
      FileError: a file that cannot be read.
    """
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _FIELDS}
    try:
        for number, line in enumerate(measurements.read(path), start=1):
            kind = line.get("kind")
            if kind not in found:
                raise RecordsError(
                    f"line {number}: kind={kind!r}: must be one of {', '.join(found)}"
                )
            fields = _flat(line) | line
            for name, types in _FIELDS[kind].items():
                if not isinstance(fields.get(name, ...), types):
                    given = repr(fields[name]) if name in fields else "missing"
                    raise RecordsError(f"line {number}: {name}: {given}")
            found[kind].append(line)
        for kind in ("run", "end"):
            if len(found[kind]) != 1:
                raise RecordsError(f"{len(found[kind])} lines of kind '{kind}' in place of one")
        if not found["held_out"] and found["end"][0]["diverged"] is None:
            raise RecordsError("no line of kind 'held_out'")
    except RecordsError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise RecordsError(f"{path}: not the records of a finished run: {text}") from error
    return Run(found["run"][0], found["step"], found["held_out"], found["end"][0])
