"""The configuration of training: optimizer, loss, loop (`optimizer`, `loss`, `train`)."""

import dataclasses
from typing import Annotated, Literal

from umv2.config.schema import (
    Interval,
    Natural,
    NaturalFloat,
    Positive,
    PositiveFloat,
    require,
)


@dataclasses.dataclass(frozen=True)
class WeightDecayConfig:
    """Decoupled weight decay per parameter group (`optimizer.weight_decay`)."""

    embeddings: NaturalFloat
    norms: NaturalFloat
    matrices: NaturalFloat
    keys: NaturalFloat
    values: NaturalFloat


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedules and the parameter groups (`optimizer`)."""

    learning_rate: PositiveFloat
    warmup_steps: Natural
    schedule: Literal["cosine", "constant", "constant_then_cosine"]
    decay_start_step: Natural
    final_fraction: Annotated[float, Interval(0, 1)]
    beta1: Annotated[float, Interval(0, 1, includes_high=False)]
    beta2: Annotated[float, Interval(0, 1, includes_high=False)]
    epsilon: PositiveFloat
    clip_norm: PositiveFloat
    weight_decay: WeightDecayConfig
    values_optimizer: str
    values_schedule: Literal["multiplier", "constant"]
    values_learning_rate: PositiveFloat
    values_multiplier: PositiveFloat
    values_final_multiplier: PositiveFloat
    values_decay_fraction: Annotated[float, Interval(0, 1, includes_low=False)]

    def validate(self, num_steps: int) -> None:
        """Raises ConfigError for values that are impossible for `num_steps` of training."""
        require(
            self.warmup_steps < num_steps,
            "optimizer.warmup_steps",
            self.warmup_steps,
            f"must be < train.num_steps = {num_steps}",
        )
        if self.schedule == "constant_then_cosine":
            require(
                self.warmup_steps <= self.decay_start_step < num_steps,
                "optimizer.decay_start_step",
                self.decay_start_step,
                f"must be in [warmup_steps = {self.warmup_steps}, train.num_steps = {num_steps})",
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients of the losses added to the cross entropy (`loss`)."""

    z_loss: NaturalFloat
    tucker_penalty: NaturalFloat
    tucker_margin: NaturalFloat
    balance_loss: NaturalFloat
    load_balance: NaturalFloat
    load_balance_scope: Literal["layer", "model"]
    router_z_loss: NaturalFloat


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training length, batch size, logging, evaluation and checkpoint intervals (`train`)."""

    num_steps: Positive
    batch_size: Positive
    gradient_accumulation: Positive
    log_interval_steps: Positive
    evaluation_interval_steps: Positive
    checkpoint_interval_steps: Positive
    num_checkpoints_kept: Positive
    tensorboard: bool
    wandb_project: str

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(
            self.batch_size % self.gradient_accumulation == 0,
            "train.gradient_accumulation",
            self.gradient_accumulation,
            f"must divide train.batch_size = {self.batch_size}",
        )
