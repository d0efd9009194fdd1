"""The experiment configuration: frozen dataclasses built from an `ml_collections.ConfigDict`.

`configs/base.py` gives every field its unit and source. This module gives it a type and checks it
against the others, before any work is done: each mistake ends in one `ConfigError` that names the
field, its value and the rule.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from umv2.model_config import MemoryConfig, ModelConfig, MoeConfig
from umv2.schema import (
    ConfigError,
    Interval,
    Natural,
    NaturalFloat,
    Positive,
    PositiveFloat,
    Seed,
    build,
    differing_fields,
    nearest_name,
    require,
)

# What others use of the schema and of the model's section comes from here too.
__all__ = [
    "Config",
    "ConfigError",
    "MemoryConfig",
    "ModelConfig",
    "MoeConfig",
    "differing_fields",
    "from_config_dict",
    "nearest_name",
]


# The modules of umv2/evaluation/long_context.
LongContextTask = Literal[
    "memorize",
    "multi_round",
    "in_context",
    "needle",
    "key_value",
    "multi_hop",
    "reasoning",
]


@dataclasses.dataclass(frozen=True)
class LongContextDataConfig:
    """Documents of the long-context suite among those of the source (`data.long_context`)."""

    tasks: tuple[LongContextTask, ...]
    num_documents: Natural
    text_fraction: Annotated[float, Interval(0, 1, includes_high=False)]
    context_weight: Annotated[float, Interval(0, 1)]
    warm_up_steps: Natural
    seed: Seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences (`data`)."""

    source: Literal[
        "standard_library", "site_packages", "text", "array_record", "memmap", "hugging_face"
    ]
    paths: tuple[str, ...]
    text_field: str
    memmap_dtype: Literal["uint16", "uint32"]
    hugging_face_name: str
    hugging_face_config: str
    hugging_face_split: str
    tokenizer: str
    end_of_text_id: int
    sequence_length: Annotated[int, Interval(2)]
    held_out_fraction: Annotated[float, Interval(0, 1, False, False)]
    long_context: LongContextDataConfig
    mask_across_documents: bool
    num_workers: Natural
    prefetch_batches: Positive
    seed: Seed

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        if self.source in ("text", "array_record", "memmap"):
            require(
                bool(self.paths), "data.paths", self.paths, f"source {self.source!r} needs globs"
            )
        if self.source == "hugging_face":
            require(
                bool(self.hugging_face_name),
                "data.hugging_face_name",
                self.hugging_face_name,
                "source 'hugging_face' needs the name of a data set",
            )
        tasks = self.long_context
        if tasks.num_documents:
            require(
                self.source in ("standard_library", "site_packages", "text"),
                "data.long_context.num_documents",
                tasks.num_documents,
                f"mixes documents with text, and source {self.source!r} holds none",
            )
            require(
                bool(tasks.tasks),
                "data.long_context.tasks",
                tasks.tasks,
                f"must name tasks, as num_documents = {tasks.num_documents}",
            )
            require(
                self.sequence_length >= 64,
                "data.sequence_length",
                self.sequence_length,
                "must be >= 64 for documents of data.long_context, which are not cut",
            )
        else:
            require(
                tasks.warm_up_steps == 0,
                "data.long_context.warm_up_steps",
                tasks.warm_up_steps,
                "warms up for the tasks, and there are none: num_documents = 0",
            )
        if self.tokenizer == "none":
            require(
                self.source in ("array_record", "memmap"),
                "data.tokenizer",
                self.tokenizer,
                "only token files (array_record, memmap) can do without a tokenizer",
            )
            require(
                self.end_of_text_id >= 0,
                "data.end_of_text_id",
                self.end_of_text_id,
                "must be given (>= 0) where there is no tokenizer",
            )


@dataclasses.dataclass(frozen=True)
class WeightDecayConfig:
    """Decoupled weight decay of each parameter group (`optimizer.weight_decay`)."""

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
    values_schedule: Literal["multiplier", "constant"]
    values_learning_rate: PositiveFloat
    values_multiplier: PositiveFloat
    values_final_multiplier: PositiveFloat
    values_decay_fraction: Annotated[float, Interval(0, 1, includes_low=False)]

    def validate(self, num_steps: int) -> None:
        """Raises ConfigError for impossible values, given the length of training in steps."""
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
                f"must lie in [warmup_steps = {self.warmup_steps}, train.num_steps = {num_steps})",
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients added to the cross entropy (`loss`)."""

    z_loss: NaturalFloat
    tucker_penalty: NaturalFloat
    tucker_margin: NaturalFloat
    balance_loss: NaturalFloat
    load_balance: NaturalFloat
    load_balance_scope: Literal["layer", "model"]
    router_z_loss: NaturalFloat


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run (`train`)."""

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
        require(all(self.stop), "generate.stop", self.stop, "no string may be empty")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and how the work is divided over them (`mesh`)."""

    replica: int
    fsdp: Positive
    memory: Positive
    tensor: Positive
    parameters: Literal["fsdp", "fsdp_and_memory"]
    table_sharding: Literal["auto", "columns", "rows"]

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(
            self.replica == -1 or self.replica >= 1,
            "mesh.replica",
            self.replica,
            "must be >= 1, or -1 for all devices that the other axes leave",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: Seed
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    generate: GenerateConfig
    mesh: MeshConfig

    def validate(self) -> None:
        """Raises ConfigError for the first field that contradicts its rule or another field."""
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.optimizer.validate(self.train.num_steps)
        warm_up_steps = self.data.long_context.warm_up_steps
        require(
            warm_up_steps < self.train.num_steps,
            "data.long_context.warm_up_steps",
            warm_up_steps,
            f"must be < train.num_steps = {self.train.num_steps}",
        )
        self.evaluation.long_context.validate()
        self.generate.validate()
        self.mesh.validate()
        self._validate_divisions()
        memory = self.model.memory
        for name, family, layers in (
            ("tucker_penalty", "memory", "memory layers"),
            ("balance_loss", "memory", "memory layers"),
            ("load_balance", "moe", "experts"),
            ("router_z_loss", "moe", "experts"),
        ):
            if getattr(self.loss, name) > 0:
                require(
                    self.model.family == family,
                    f"loss.{name}",
                    getattr(self.loss, name),
                    f"needs {layers}, but model.family is {self.model.family!r}",
                )
        if self.loss.tucker_penalty > 0:
            require(
                memory.scoring == "tucker" and memory.tucker_rank > 1,
                "loss.tucker_penalty",
                self.loss.tucker_penalty,
                "needs Tucker scoring of rank > 1: it acts on all but the first singular value",
            )

    def _validate_divisions(self) -> None:
        """Raises ConfigError for a size that the axes of the mesh do not divide.

        Value tables are not among them: `cost.exchange` chooses what divides them.
        """
        mesh, model = self.mesh, self.model
        dense = ("fsdp", "memory") if mesh.parameters == "fsdp_and_memory" else ("fsdp",)
        sizes: list[tuple[tuple[str, ...], str, int]] = [
            (dense, "model.hidden_size", model.hidden_size),
            (("tensor",), "model.vocab_size", model.vocab_size),
            (("tensor",), "model.num_heads", model.num_heads),
            (("tensor",), "model.num_key_value_heads", model.num_key_value_heads),
            (("tensor",), "model.ffn_size", model.ffn_size),
        ]
        match model.family:
            case "memory":
                sizes.append((dense, "model.memory.key_dim", model.memory.key_dim))
                sizes.append((("tensor",), "data.sequence_length", self.data.sequence_length))
            case "moe":
                sizes.append((("memory", "tensor"), "model.moe.expert_size", model.moe.expert_size))
        for axes, field, size in sizes:
            parts = math.prod(getattr(mesh, axis) for axis in axes)
            require(
                size % parts == 0,
                " x ".join(f"mesh.{axis}" for axis in axes),
                parts,
                f"must divide {field}={size}; {math.gcd(size, parts)} does, and {parts} divides"
                f" {field}={-(-size // parts) * parts}",
            )


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates a `Config` from a ConfigDict or a nested mapping.

    Raises:
      ConfigError: for an unknown or missing field, a wrong type, a name outside its choices, or
        values that contradict each other.
    """
    result = typing.cast(Config, build(Config, config))
    result.validate()
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of plain values (tuples as lists), for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))
