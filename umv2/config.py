"""The experiment configuration: frozen dataclasses built from an `ml_collections.ConfigDict`.

`configs/base.py` gives every field its unit and source. This module gives it a type and checks it
against the others, before any work is done: each mistake ends in one `ConfigError` that names the
field, its value and the rule.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, the value and the rule."""


def _reject(field: str, value: object, rule: str) -> NoReturn:
    raise ConfigError(f"{field}={value!r}: {rule}")


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        _reject(field, value, rule)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """One memory layer and the value store behind it (`model.memory`)."""

    read_layers: tuple[int, ...]
    write_layers: tuple[int, ...]
    num_keys: int
    key_dim: int
    tucker_rank: int
    num_cores: int
    num_heads: int
    top_m: int
    shortlist: int
    scoring: Literal["tucker", "sum"]
    query: Literal["per_rank", "shared", "released"]
    key_expansion: int
    projection: Literal["single", "per_block"]
    value_dim: int
    pre_value_dim: int
    activation: Literal["none", "gelu", "silu", "relu"]
    sharing: Literal["none", "ring", "no_ring", "block"]
    share_group: int
    initialization: Literal["principled", "released", "unit"]
    chunk_tokens: int

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
    def num_selected(self) -> int:
        """Values that a token activates in one layer, over all heads."""
        return self.num_heads * self.top_m

    def validate(self) -> None:
        """Raises ConfigError for sizes that contradict each other within one layer."""
        prefix = "model.memory."
        for name in ("num_keys", "key_dim", "tucker_rank", "num_cores", "num_heads", "top_m"):
            _require(getattr(self, name) >= 1, prefix + name, getattr(self, name), "must be >= 1")
        for name in ("shortlist", "key_expansion", "value_dim", "share_group"):
            _require(getattr(self, name) >= 1, prefix + name, getattr(self, name), "must be >= 1")
        for name in ("pre_value_dim", "chunk_tokens"):
            _require(getattr(self, name) >= 0, prefix + name, getattr(self, name), "must be >= 0")
        _require(
            self.shortlist <= self.keys_per_side,
            prefix + "shortlist",
            self.shortlist,
            f"must be at most the keys per side, {self.keys_per_side} (num_keys, share_group and"
            " key_expansion)",
        )
        _require(
            self.top_m <= self.shortlist**2,
            prefix + "top_m",
            self.top_m,
            f"must be at most shortlist**2 = {self.shortlist**2}",
        )
        _require(
            self.value_dim % self.num_cores == 0,
            prefix + "value_dim",
            self.value_dim,
            f"must be a multiple of num_cores = {self.num_cores}: each core weights one slice",
        )
        if self.scoring == "sum":
            _require(
                self.tucker_rank == 1 and self.num_cores == 1,
                prefix + "scoring",
                self.scoring,
                "additive scores need tucker_rank = 1 and num_cores = 1",
            )
        if self.query == "released":
            _require(
                self.tucker_rank == 2 and self.num_heads <= 4,
                prefix + "query",
                self.query,
                "the released layout holds four chunks: it needs tucker_rank = 2 and at most"
                " 4 heads",
            )
        if self.activation != "none":
            _require(
                self.pre_value_dim > 0,
                prefix + "activation",
                self.activation,
                "acts on the pre-score, so pre_value_dim must be > 0",
            )
        _require(
            (self.sharing == "none") == (self.share_group == 1),
            prefix + "share_group",
            self.share_group,
            f"must be 1 exactly when sharing is 'none' (it is {self.sharing!r})",
        )
        addresses = self.keys_per_side**2
        _require(
            addresses < 2**31,
            prefix + "num_keys",
            self.num_keys,
            f"gives {addresses} addresses a layer; ids are int32, so fewer than 2**31",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder (`model`)."""

    family: Literal["dense", "memory"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    ffn_size: int
    tie_embeddings: bool
    rope_theta: float
    norm_epsilon: float
    query_key_norm: bool
    compute_dtype: Literal["bfloat16", "float32", "float64"]
    attention: Literal["xla", "cudnn"]
    scan_layers: bool
    remat: Literal["none", "full", "dots"]
    memory: MemoryConfig

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """(read, write) block of each memory layer, counted from 0; empty for a dense model."""
        if self.family == "dense":
            return ()
        if not self.memory.read_layers:
            return tuple((i, i) for i in range(self.num_layers))
        pairs = zip(self.memory.read_layers, self.memory.write_layers, strict=True)
        return tuple((read - 1, write - 1) for read, write in pairs)

    def validate(self) -> None:
        """Raises ConfigError for sizes that contradict each other."""
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be >= 1")
        _require(
            self.hidden_size % self.num_heads == 0 and self.head_dim % 2 == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide hidden_size = {self.hidden_size} into heads of even width (RoPE turns"
            " pairs)",
        )
        _require(
            1 <= self.num_key_value_heads and self.num_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        _require(self.norm_epsilon > 0, "model.norm_epsilon", self.norm_epsilon, "must be > 0")
        _require(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "must be > 1")
        if self.family == "memory":
            self.memory.validate()
            self._validate_placements()

    def _validate_placements(self) -> None:
        memory = self.memory
        reads, writes = memory.read_layers, memory.write_layers
        _require(
            len(reads) == len(writes),
            "model.memory.write_layers",
            writes,
            f"must pair one by one with read_layers = {reads}",
        )
        for read, write in zip(reads, writes, strict=True):
            _require(
                1 <= read <= write <= self.num_layers,
                "model.memory.read_layers",
                reads,
                f"each pair needs 1 <= read <= write <= num_layers = {self.num_layers}"
                f" (got {read} -> {write})",
            )
        _require(
            list(reads) == sorted(set(reads)),
            "model.memory.read_layers",
            reads,
            "must rise strictly: a block feeds at most one memory layer",
        )
        num_tables = len(self.placements)
        _require(
            memory.share_group <= num_tables,
            "model.memory.share_group",
            memory.share_group,
            f"must be at most the number of memory layers, {num_tables}",
        )
        if memory.sharing == "block":
            _require(
                num_tables % memory.share_group == 0,
                "model.memory.share_group",
                memory.share_group,
                f"must divide the number of memory layers, {num_tables}, when sharing is 'block'",
            )
        _require(
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
    sequence_length: int
    held_out_fraction: float
    mask_across_documents: bool
    num_workers: int
    prefetch_batches: int
    seed: int

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        _require(
            self.sequence_length >= 2, "data.sequence_length", self.sequence_length, "must be >= 2"
        )
        _require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            self.held_out_fraction,
            "must lie between 0 and 1",
        )
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "must be >= 0")
        _require(
            self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "must be >= 1"
        )
        if self.source in ("text", "array_record", "memmap"):
            _require(bool(self.paths), "data.paths", self.paths, f"source {self.source!r} needs globs")
        if self.source == "hugging_face":
            _require(
                bool(self.hugging_face_name),
                "data.hugging_face_name",
                self.hugging_face_name,
                "source 'hugging_face' needs the name of a data set",
            )
        if self.tokenizer == "none":
            _require(
                self.source in ("array_record", "memmap"),
                "data.tokenizer",
                self.tokenizer,
                "only token files (array_record, memmap) can do without a tokenizer",
            )
            _require(
                self.end_of_text_id >= 0,
                "data.end_of_text_id",
                self.end_of_text_id,
                "must be given (>= 0) where there is no tokenizer",
            )


@dataclasses.dataclass(frozen=True)
class WeightDecayConfig:
    """Decoupled weight decay of each parameter group (`optimizer.weight_decay`)."""

    embeddings: float
    norms: float
    matrices: float
    keys: float
    values: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedules and the parameter groups (`optimizer`)."""

    learning_rate: float
    warmup_steps: int
    schedule: Literal["cosine", "constant", "constant_then_cosine"]
    decay_start_step: int
    final_fraction: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    weight_decay: WeightDecayConfig
    values_schedule: Literal["multiplier", "constant"]
    values_learning_rate: float
    values_multiplier: float
    values_final_multiplier: float
    values_decay_fraction: float

    def validate(self, num_steps: int) -> None:
        """Raises ConfigError for impossible values, given the length of training in steps."""
        _require(
            self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be > 0"
        )
        _require(
            0 <= self.warmup_steps < num_steps,
            "optimizer.warmup_steps",
            self.warmup_steps,
            f"must lie in [0, train.num_steps = {num_steps})",
        )
        _require(
            0 <= self.final_fraction <= 1,
            "optimizer.final_fraction",
            self.final_fraction,
            "must lie in [0, 1]",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "must lie in [0, 1)")
        _require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "must be > 0")
        _require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "must be > 0")
        for field in dataclasses.fields(self.weight_decay):
            value = getattr(self.weight_decay, field.name)
            _require(value >= 0, f"optimizer.weight_decay.{field.name}", value, "must be >= 0")
        if self.schedule == "constant_then_cosine":
            _require(
                self.warmup_steps <= self.decay_start_step < num_steps,
                "optimizer.decay_start_step",
                self.decay_start_step,
                f"must lie in [warmup_steps = {self.warmup_steps}, train.num_steps = {num_steps})",
            )
        for name in ("values_learning_rate", "values_multiplier", "values_final_multiplier"):
            value = getattr(self, name)
            _require(value > 0, f"optimizer.{name}", value, "must be > 0")
        _require(
            0 < self.values_decay_fraction <= 1,
            "optimizer.values_decay_fraction",
            self.values_decay_fraction,
            "must lie in (0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients added to the cross entropy (`loss`)."""

    z_loss: float
    tucker_penalty: float
    tucker_margin: float
    balance_loss: float

    def validate(self) -> None:
        """Raises ConfigError for negative coefficients."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(value >= 0, f"loss.{field.name}", value, "must be >= 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run (`train`)."""

    num_steps: int
    batch_size: int
    gradient_accumulation: int
    log_interval_steps: int
    evaluation_interval_steps: int
    checkpoint_interval_steps: int
    num_checkpoints_kept: int
    tensorboard: bool
    wandb_project: str

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        for name in (
            "num_steps",
            "batch_size",
            "gradient_accumulation",
            "log_interval_steps",
            "evaluation_interval_steps",
            "checkpoint_interval_steps",
            "num_checkpoints_kept",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be >= 1")
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            "train.gradient_accumulation",
            self.gradient_accumulation,
            f"must divide train.batch_size = {self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation (`evaluation`)."""

    batch_size: int

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        _require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "must be >= 1")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Sampling (`generate`)."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        _require(
            self.max_new_tokens >= 1, "generate.max_new_tokens", self.max_new_tokens, "must be >= 1"
        )
        _require(self.temperature >= 0, "generate.temperature", self.temperature, "must be >= 0")
        _require(self.top_k >= 0, "generate.top_k", self.top_k, "must be >= 0 (0: no limit)")
        _require(0 < self.top_p <= 1, "generate.top_p", self.top_p, "must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and how the work is divided over them (`mesh`)."""

    replica: int

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        _require(
            self.replica == -1 or self.replica >= 1,
            "mesh.replica",
            self.replica,
            "must be >= 1, or -1 for all devices",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: int
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
        self.loss.validate()
        self.evaluation.validate()
        self.generate.validate()
        self.mesh.validate()
        memory = self.model.memory
        for name in ("tucker_penalty", "balance_loss"):
            if getattr(self.loss, name) > 0:
                _require(
                    self.model.family == "memory",
                    f"loss.{name}",
                    getattr(self.loss, name),
                    f"needs memory layers, but model.family is {self.model.family!r}",
                )
        if self.loss.tucker_penalty > 0:
            _require(
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
    result = typing.cast(Config, _build(Config, config, ""))
    result.validate()
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of plain values (tuples as lists), for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def differing_fields(left: Mapping[str, Any], right: Mapping[str, Any], path: str = "") -> list[str]:
    """Lists 'path: left -> right' for every leaf in which two nested mappings differ."""
    differences: list[str] = []
    for key in sorted(set(left) | set(right)):
        here = f"{path}{key}"
        a, b = left.get(key, "(absent)"), right.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differences += differing_fields(a, b, f"{here}.")
        elif a != b:
            differences.append(f"{here}: {a!r} -> {b!r}")
    return differences


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """Returns ' (nearest: ...)' for the valid name closest to a misspelt one, or ''."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (nearest: {matches[0]})" if matches else ""


def _build(cls: type, section: Any, path: str) -> Any:
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        _reject(path.rstrip("."), section, "must be a section, not a value")
    hints = typing.get_type_hints(cls)
    given = dict(section.items())
    for name in given:
        if name not in hints:
            raise ConfigError(f"{path}{name}: unknown field{nearest_name(name, hints)}")
    for name in hints:
        if name not in given:
            raise ConfigError(f"{path}{name}: missing; configs/base.py gives it a value")
    return cls(**{name: _convert(hint, given[name], path + name) for name, hint in hints.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path + ".")
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            nearest = nearest_name(str(value), choices)
            _reject(path, value, f"must be one of {', '.join(map(repr, choices))}{nearest}")
        return value
    if origin is tuple:
        (element, _) = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            _reject(path, value, f"must be a tuple of {element.__name__}")
        return tuple(_convert(element, item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, so isinstance would let `top_m=True` pass.
    if type(value) is not hint:
        _reject(path, value, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value
