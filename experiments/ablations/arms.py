"""Definition of an ablation: named arms, each a diff to a base configuration, and what is fixed.

A diff maps the path of a field to its new value, or to a function that computes it from the
configuration, so that one diff applies at every scale.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from experiments.ablations import scales

ALL = ("active", "total", "flops", "values_read")
# Scoring keys costs FLOPs but no parameters. Where arms differ in retrieval, the FFN can therefore
# make up for the FLOPs or the active parameters, but not both; the paper holds compute fixed.
COMPUTE = ("flops",)
BUDGET = ("total", "flops", "values_read")

type Diff = Mapping[str, Any]
# The paper's finding on an arm, relative to the arm that it is compared with.
type Expected = Literal["higher", "lower", "equal", "not stated"]
# held_out_loss: nats per token after the last step | decay_gain: drop of the held-out loss while
# the learning rate decays | answer_accuracy: on the multi-hop questions.
type Measure = Literal["held_out_loss", "decay_gain", "answer_accuracy"]


# Learning rate of the value tables relative to that of the other parameters; paper, section 4.2.9.
CONSTANT_1: Diff = {
    "optimizer.values_multiplier": 1.0,
    "optimizer.values_final_multiplier": 1.0,
}
FALLING_4_TO_1: Diff = {
    "optimizer.values_multiplier": 4.0,
    "optimizer.values_final_multiplier": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration of an ablation.

    `paper` is what the paper reports, and `expected` the sign of that in the ablation's measure,
    both relative to the arm `versus` (empty: the baseline); `paper_difference` is the reported
    difference in loss, if any (held-out loss if the paper gives both). `make` changes many fields
    at once, for example the family, before `diff` is applied. At scale `paper`, the sizes in
    `published` are applied last, and `published_file` ('paper_1b_7b:moe') replaces the whole
    configuration; arms without either are sized by the solver, as at other scales.
    """

    diff: Diff = dataclasses.field(default_factory=dict)
    paper: str = ""
    expected: Expected = "not stated"
    paper_difference: float | None = None
    versus: str = ""
    make: Callable[[ConfigDict], None] | None = None
    published: Diff = dataclasses.field(default_factory=dict)
    published_file: str = ""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question, its arms (the first is the baseline), and the quantities held fixed.

    `fixed` names quantities of `umv2.cost.matching` in which every arm equals the baseline within
    1 %; the solver matches them by changing the sizes in `free`, and
    `python -m experiments.ablations.sizes` stores the solution. `scaled` is a diff to the base of a
    scale that all arms need, such as more layers. `explanation` is shown with the results.
    """

    question: str
    source: str
    finding: str
    arms: Mapping[str, Arm]
    fixed: tuple[str, ...] = ()
    free: tuple[str, ...] = ("ffn_size",)
    paper_file: str = "paper_500m_6b8"
    scaled: Mapping[str, Diff] = dataclasses.field(default_factory=dict)
    measure: Measure = "held_out_loss"
    explanation: str = ""

    @property
    def baseline(self) -> str:
        """The arm that others are matched to, and compared with by default."""
        return next(iter(self.arms))

    def versus(self, arm: str) -> str:
        """Returns the name of the arm that an arm is compared with."""
        return self.arms[arm].versus or self.baseline

    def base(self, scale: str) -> ConfigDict:
        """Returns the configuration to which the diffs of the arms apply."""
        config = scales.paper(self.paper_file) if scale == "paper" else getattr(scales, scale)()
        apply(config, self.scaled.get(scale, {}))
        return config

    def unsized(self, arm: str, scale: str) -> ConfigDict:
        """Returns the configuration of an arm without the sizes from the solver."""
        entry = self.arms[arm]
        if scale == "paper" and entry.published_file:
            return _published(entry.published_file)
        config = self.base(scale)
        if entry.make is not None:
            entry.make(config)
        apply(config, entry.diff)
        if scale == "paper":
            apply(config, entry.published)
        return config

    def is_published(self, arm: str, scale: str) -> bool:
        """Whether an arm has published sizes at a scale."""
        entry = self.arms[arm]
        return scale == "paper" and bool(entry.published or entry.published_file)


def _published(file: str) -> ConfigDict:
    name, _, family = file.partition(":")
    if not family:
        return scales.paper(name)
    import importlib

    config: ConfigDict = importlib.import_module(f"configs.{name}").get_config(family)
    return config


def apply(config: ConfigDict, diff: Diff) -> None:
    """Applies a diff in place.

    Functions in the diff see the original configuration.

    Raises:
      KeyError: no field has the path.
    """
    values = {
        path: value(config, path) if callable(value) else value for path, value in diff.items()
    }
    for path, value in values.items():
        *sections, name = path.split(".")
        section = config
        for key in sections:
            section = section[key]
        if name not in section:
            raise KeyError(f"{path}: no such field")
        section[name] = value


def field(config: ConfigDict, path: str) -> Any:
    """Returns the value of a field by its path."""
    value: Any = config
    for name in path.split("."):
        value = value[name]
    return value


def times(factor: float) -> Callable[[ConfigDict, str], Any]:
    """Multiplies a field by a factor; integers are rounded, to at least 1."""

    def scaled(config: ConfigDict, path: str) -> Any:
        value = field(config, path)
        return max(1, round(value * factor)) if isinstance(value, int) else value * factor

    return scaled


def top_m(factor: float) -> Diff:
    """Multiplies top-m; the shortlist has the same size up to 128, as in the paper."""

    def shortlist(config: ConfigDict, path: str) -> int:
        del path
        return min(128, times(factor)(config, "model.memory.top_m"))

    return {"model.memory.top_m": times(factor), "model.memory.shortlist": shortlist}


def row_split(pre: int, value: int) -> Diff:
    """Splits a row into Pre-value and Value; the width of Value is even, for two cores."""

    def value_dim(config: ConfigDict, path: str) -> int:
        del path
        row = config.model.memory.value_dim + config.model.memory.pre_value_dim
        return 2 * round(row * value / (pre + value) / 2)

    def pre_value_dim(config: ConfigDict, path: str) -> int:
        row = config.model.memory.value_dim + config.model.memory.pre_value_dim
        return row - value_dim(config, path)

    return {"model.memory.value_dim": value_dim, "model.memory.pre_value_dim": pre_value_dim}


def half_of_row() -> Diff:
    """Plain rows of half the width, so as wide as the Value of `row_split(1, 1)`."""

    def half(config: ConfigDict, path: str) -> int:
        del path
        return 2 * round((config.model.memory.value_dim + config.model.memory.pre_value_dim) / 4)

    return {"model.memory.value_dim": half, "model.memory.pre_value_dim": 0}


def fraction_of_hidden(fraction: float) -> Callable[[ConfigDict, str], int]:
    """A width, as a fraction of that of the residual stream."""
    return lambda config, path: round(config.model.hidden_size * fraction)


def layers(fraction: float) -> Diff:
    """Keeps memory layers in a fraction of the blocks, evenly spaced.

    Top-m grows in inverse proportion, so that all layers together read as many values.
    """

    def count(config: ConfigDict) -> int:
        return max(1, round(config.model.num_layers * fraction))

    def blocks(config: ConfigDict, path: str) -> tuple[int, ...]:
        del path
        return evenly_spaced(count(config), config.model.num_layers)

    def selected(config: ConfigDict, path: str) -> int:
        del path
        return round(config.model.memory.top_m * config.model.num_layers / count(config))

    return {
        "model.memory.read_layers": blocks,
        "model.memory.write_layers": blocks,
        "model.memory.top_m": selected,
        "model.memory.shortlist": lambda config, path: min(128, selected(config, path)),
    }


def evenly_spaced(count: int, num_layers: int) -> tuple[int, ...]:
    """Returns the blocks, counted from 1, in the middle of `count` equal parts of the model."""
    return tuple((2 * i + 1) * num_layers // (2 * count) + 1 for i in range(count))


def placed(count: int) -> Diff:
    """Keeps `count` memory layers, evenly spaced."""

    def blocks(config: ConfigDict, path: str) -> tuple[int, ...]:
        del path
        return evenly_spaced(count, config.model.num_layers)

    return {"model.memory.read_layers": blocks, "model.memory.write_layers": blocks}


def skips() -> Diff:
    """Places one memory per five blocks, at least two: read in the first block, added in the last.

    UltraMem-227M has four in 20 blocks.
    """

    def ends(config: ConfigDict) -> list[int]:
        num_layers = config.model.num_layers
        count = max(2, round(num_layers / 5))
        return [round(i * num_layers / count) for i in range(count + 1)]

    def read(config: ConfigDict, path: str) -> tuple[int, ...]:
        del path
        return tuple(low + 1 for low in ends(config)[:-1])

    def write(config: ConfigDict, path: str) -> tuple[int, ...]:
        del path
        return tuple(ends(config)[1:])

    return {"model.memory.read_layers": read, "model.memory.write_layers": write}


def fraction_of_steps(fraction: float) -> Callable[[ConfigDict, str], int]:
    """A number of steps, as a fraction of the training steps."""
    return lambda config, path: math.floor(config.train.num_steps * fraction)
