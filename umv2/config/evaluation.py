"""The configuration of evaluation and of generation (`evaluation`, `generate`)."""

import dataclasses
from typing import Annotated, Literal

from umv2.config.data import LongContextTask
from umv2.config.schema import (
    Interval,
    Natural,
    NaturalFloat,
    Positive,
    Seed,
    require,
)


@dataclasses.dataclass(frozen=True)
class LongContextConfig:
    """The long-context suite (`evaluation.long_context`)."""

    tasks: tuple[LongContextTask, ...]
    lengths: tuple[int, ...]
    num_examples: Positive
    batch_tokens: Positive
    extrapolation: Literal["none", "linear", "ntk", "window"]
    seed: Seed

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(bool(self.tasks), "evaluation.long_context.tasks", self.tasks, "must name tasks")
        require(
            bool(self.lengths) and min(self.lengths, default=0) >= 64,
            "evaluation.long_context.lengths",
            self.lengths,
            "must be lengths in tokens, each >= 64",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation (`evaluation`)."""

    batch_size: Positive
    long_context: LongContextConfig


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Sampling (`generate`)."""

    max_new_tokens: Positive
    temperature: NaturalFloat
    top_k: Natural
    top_p: Annotated[float, Interval(0, 1, includes_low=False)]
    stop: tuple[str, ...]
    seed: Seed

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(all(self.stop), "generate.stop", self.stop, "must not contain an empty string")
