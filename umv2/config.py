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

from umv2.schema import (
    ConfigError,
    Interval,
    Natural,
    NaturalFloat,
    Positive,
    PositiveFloat,
    build,
    differing_fields,
    nearest_name,
    require,
)

# What others use of the schema comes from here too.
__all__ = ["Config", "ConfigError", "differing_fields", "from_config_dict", "nearest_name"]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """One memory layer and the value store behind it (`model.memory`)."""

    read_layers: tuple[int, ...]
    write_layers: tuple[int, ...]
    num_keys: Positive
    key_dim: Positive
    tucker_rank: Positive
    num_cores: Positive
    num_heads: Positive
    top_m: Positive
    shortlist: Positive
    scoring: Literal["tucker", "sum"]
    score_activation: Literal["none", "softmax", "relu"]
    query: Literal["per_rank", "shared", "per_head", "released"]
    query_norm: Literal["rms", "layer", "none"]
    key_norm: Literal["rms", "none"]
    key_expansion: Positive
    shuffle: bool
    value_dim: Positive
    pre_value_dim: Natural
    pre_projection: bool
    activation: Literal["none", "gelu", "silu", "relu"]
    projection: Literal["single", "per_block", "none"]
    output_gate: Literal["none", "silu"]
    bias: bool
    sharing: Literal["none", "ring", "no_ring", "block"]
    share_group: Positive
    initialization: Literal["principled", "released", "unit"]
    chunk_tokens: Natural

    @property
    def num_values(self) -> int:
        """Rows N = n^2 of one value table."""
        return self.num_keys**2

    @property
    def visible_keys(self) -> int:
        """Keys per side before expansion: n sqrt(g), rounded down (exact for square g)."""
        return math.isqrt(self.share_group * self.num_values)

    @property
    def num_visible(self) -> int:
        """Rows that one layer may read."""
        return self.visible_keys**2

    @property
    def keys_per_side(self) -> int:
        """Row keys (= column keys) of one layer, key expansion included."""
        return self.key_expansion * self.visible_keys

    @property
    def num_blocks(self) -> int:
        """Virtual blocks E^2 that the addresses of a layer are divided into."""
        return self.key_expansion**2

    @property
    def num_slots(self) -> int:
        """Pooled vectors that enter the output projection: one, or one a virtual block."""
        return self.num_blocks if self.projection == "per_block" else 1

    @property
    def has_pre_projection(self) -> bool:
        """Whether pre-values meet a projection W_p of the input."""
        return self.pre_value_dim > 0 and self.pre_projection

    @property
    def num_selected(self) -> int:
        """Values that a token activates in one layer, over all heads."""
        return self.num_heads * self.top_m

    def validate(self, hidden_size: int) -> None:
        """Raises ConfigError for sizes that contradict each other within one layer."""
        prefix = "model.memory."
        require(
            self.shortlist <= self.keys_per_side,
            prefix + "shortlist",
            self.shortlist,
            f"must be at most the keys per side, {self.keys_per_side} (num_keys, share_group and"
            " key_expansion)",
        )
        require(
            self.top_m <= self.shortlist**2,
            prefix + "top_m",
            self.top_m,
            f"must be at most shortlist**2 = {self.shortlist**2}",
        )
        require(
            self.value_dim % self.num_cores == 0,
            prefix + "value_dim",
            self.value_dim,
            f"must be a multiple of num_cores = {self.num_cores}: each core weights one slice",
        )
        if self.scoring == "sum":
            require(
                self.tucker_rank == 1 and self.num_cores == 1,
                prefix + "scoring",
                self.scoring,
                "additive scores need tucker_rank = 1 and num_cores = 1",
            )
        if self.score_activation == "softmax":
            require(
                self.num_cores == 1,
                prefix + "score_activation",
                self.score_activation,
                f"needs num_cores = 1 (it is {self.num_cores}): one distribution over a head's"
                " values",
            )
        if self.query == "released":
            require(
                self.tucker_rank == 2 and self.num_heads <= 4,
                prefix + "query",
                self.query,
                "the released layout holds four chunks: it needs tucker_rank = 2 and at most"
                " 4 heads",
            )
        if self.activation != "none":
            require(
                self.pre_value_dim > 0,
                prefix + "activation",
                self.activation,
                "acts on the pre-score, so pre_value_dim must be > 0",
            )
        if not self.pre_projection:
            require(
                self.pre_value_dim == hidden_size,
                prefix + "pre_projection",
                self.pre_projection,
                f"without it pre-values meet the input itself, so pre_value_dim ="
                f" {self.pre_value_dim} must be model.hidden_size = {hidden_size}",
            )
        if self.projection == "none":
            require(
                self.value_dim == hidden_size,
                prefix + "projection",
                self.projection,
                f"without it the pooled values are the output, so value_dim = {self.value_dim}"
                f" must be model.hidden_size = {hidden_size}",
            )
        require(
            (self.sharing == "none") == (self.share_group == 1),
            prefix + "share_group",
            self.share_group,
            f"must be 1 exactly when sharing is 'none' (it is {self.sharing!r})",
        )
        addresses = self.keys_per_side**2
        require(
            addresses < 2**31,
            prefix + "num_keys",
            self.num_keys,
            f"gives {addresses} addresses a layer; ids are int32, so fewer than 2**31",
        )


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """One mixture of experts (`model.moe`)."""

    num_experts: Positive
    top_k: Positive
    expert_size: Positive
    renormalize: bool

    def validate(self) -> None:
        """Raises ConfigError for sizes that contradict each other."""
        require(
            self.top_k <= self.num_experts,
            "model.moe.top_k",
            self.top_k,
            f"must be at most num_experts = {self.num_experts}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder (`model`)."""

    family: Literal["dense", "memory", "moe"]
    vocab_size: Positive
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_key_value_heads: Positive
    ffn_size: Natural
    tie_embeddings: bool
    rope_theta: Annotated[float, Interval(1, includes_low=False)]
    norm_epsilon: PositiveFloat
    query_key_norm: bool
    compute_dtype: Literal["bfloat16", "float32", "float64"]
    attention: Literal["xla", "cudnn"]
    scan_layers: bool
    remat: Literal["none", "full", "dots"]
    memory: MemoryConfig
    moe: MoeConfig

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """(read, write) block of each sparse layer, counted from 0; empty for a dense model."""
        if self.family == "dense":
            return ()
        if self.family == "moe" or not self.memory.read_layers:
            return tuple((i, i) for i in range(self.num_layers))
        pairs = zip(self.memory.read_layers, self.memory.write_layers, strict=True)
        return tuple((read - 1, write - 1) for read, write in pairs)

    @property
    def num_selectable(self) -> int:
        """Rows or experts that one sparse layer selects from; 0 for a dense model."""
        match self.family:
            case "memory":
                return self.memory.num_visible
            case "moe":
                return self.moe.num_experts
            case _:
                return 0

    def validate(self) -> None:
        """Raises ConfigError for sizes that contradict each other."""
        require(
            self.hidden_size % self.num_heads == 0 and self.head_dim % 2 == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide hidden_size = {self.hidden_size} into heads of even width (RoPE turns"
            " pairs)",
        )
        require(
            self.num_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        require(
            self.ffn_size > 0 or self.family == "moe",
            "model.ffn_size",
            self.ffn_size,
            f"must be >= 1 in family {self.family!r}; experts (family 'moe') do without an FFN",
        )
        if self.family == "memory":
            self.memory.validate(self.hidden_size)
            self._validate_placements()
        if self.family == "moe":
            self.moe.validate()

    def _validate_placements(self) -> None:
        memory = self.memory
        reads, writes = memory.read_layers, memory.write_layers
        require(
            len(reads) == len(writes),
            "model.memory.write_layers",
            writes,
            f"must pair one by one with read_layers = {reads}",
        )
        for read, write in zip(reads, writes, strict=True):
            require(
                1 <= read <= write <= self.num_layers,
                "model.memory.read_layers",
                reads,
                f"each pair needs 1 <= read <= write <= num_layers = {self.num_layers}"
                f" (got {read} -> {write})",
            )
        require(
            list(reads) == sorted(set(reads)),
            "model.memory.read_layers",
            reads,
            "must rise strictly: a block feeds at most one memory layer",
        )
        num_tables = len(self.placements)
        require(
            memory.share_group <= num_tables,
            "model.memory.share_group",
            memory.share_group,
            f"must be at most the number of memory layers, {num_tables}",
        )
        if memory.sharing == "block":
            require(
                num_tables % memory.share_group == 0,
                "model.memory.share_group",
                memory.share_group,
                f"must divide the number of memory layers, {num_tables}, when sharing is 'block'",
            )
        require(
            num_tables * memory.num_values < 2**31,
            "model.memory.num_keys",
            memory.num_keys,
            f"gives a store of {num_tables * memory.num_values} rows; ids are int32, so fewer"
            " than 2**31",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences (`data`)."""

    source: Literal["standard_library", "text", "array_record", "memmap", "hugging_face"]
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
    mask_across_documents: bool
    num_workers: Natural
    prefetch_batches: Positive
    seed: Natural

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
class EvaluationConfig:
    """Held-out evaluation (`evaluation`)."""

    batch_size: Positive


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Sampling (`generate`)."""

    max_new_tokens: Positive
    temperature: NaturalFloat
    top_k: Natural
    top_p: Annotated[float, Interval(0, 1, includes_low=False)]
    seed: Natural


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and how the work is divided over them (`mesh`)."""

    replica: int

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(
            self.replica == -1 or self.replica >= 1,
            "mesh.replica",
            self.replica,
            "must be >= 1, or -1 for all devices",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: Natural
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
        self.mesh.validate()
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
