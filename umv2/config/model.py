"""The configuration of the model: decoder, memory layers and mixture of experts (`model`)."""

import dataclasses
import math
from typing import Annotated, Literal

from umv2.config.schema import Interval, Natural, Positive, PositiveFloat, require

# What the backward pass keeps, from most to least.
Rematerialization = Literal["none", "dots", "kernels", "full"]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The memory layers and their value tables (`model.memory`)."""

    layer: str
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
    read_dtype: Literal["float32", "compute"]
    chunk_tokens: Natural
    product_key_top_k: Literal["auto", "xla", "pallas_tpu", "pallas_gpu"]
    value_aggregation: Literal["auto", "xla", "pallas_tpu", "pallas_sparsecore", "pallas_gpu"]

    @property
    def num_values(self) -> int:
        """Number of rows of one value table, N = n^2."""
        return self.num_keys**2

    @property
    def visible_keys(self) -> int:
        """Keys per side before expansion: n sqrt(g), rounded down (exact for square g)."""
        return math.isqrt(self.share_group * self.num_values)

    @property
    def num_visible(self) -> int:
        """Number of rows that one layer can read."""
        return self.visible_keys**2

    @property
    def keys_per_side(self) -> int:
        """Number of row keys (and of column keys) of one layer, key expansion included."""
        return self.key_expansion * self.visible_keys

    @property
    def num_blocks(self) -> int:
        """Number of virtual blocks, E^2, of the addresses of a layer."""
        return self.key_expansion**2

    @property
    def num_slots(self) -> int:
        """Number of pooled vectors in the output projection: one, or one per virtual block."""
        return self.num_blocks if self.projection == "per_block" else 1

    @property
    def has_pre_projection(self) -> bool:
        """Whether the input is projected by W_p before its products with pre-values."""
        return self.pre_value_dim > 0 and self.pre_projection

    @property
    def num_selected(self) -> int:
        """Number of values that a token selects in one layer, over all heads."""
        return self.num_heads * self.top_m

    def validate(self, hidden_size: int) -> None:
        """Raises ConfigError for sizes of a layer that contradict each other."""
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
                f"needs num_cores = 1 (it is {self.num_cores}): a head has one distribution over"
                " its values",
            )
        if self.query == "released":
            require(
                self.tucker_rank == 2 and self.num_heads <= 4,
                prefix + "query",
                self.query,
                "the released layout has four chunks: it needs tucker_rank = 2 and at most 4 heads",
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
                f"without it, pre-values are multiplied with the input itself, so pre_value_dim ="
                f" {self.pre_value_dim} must be model.hidden_size = {hidden_size}",
            )
        if self.projection == "none":
            require(
                self.value_dim == hidden_size,
                prefix + "projection",
                self.projection,
                f"without it, the pooled values are the output, so value_dim = {self.value_dim}"
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
            f"gives {addresses} addresses per layer; int32 ids allow fewer than 2**31",
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

    vocab_size: Positive
    hidden_size: Positive
    num_layers: Annotated[int, Interval(1), Interval(1, 100_000)]  # bounds early lists of layers
    num_heads: Positive
    num_key_value_heads: Positive
    ffn: Literal["dense", "moe", "none"]
    ffn_size: Natural
    tie_embeddings: bool
    rope_theta: Annotated[float, Interval(1, includes_low=False)]
    rope_scaling: Literal["none", "linear", "ntk"]
    rope_scale: Annotated[float, Interval(1)]
    attention_window: Natural
    norm_epsilon: PositiveFloat
    query_key_norm: bool
    compute_dtype: Literal["bfloat16", "float32", "float64"]
    attention: Literal["auto", "xla", "cudnn", "splash"]
    scan_layers: bool
    remat: Rematerialization
    memory: MemoryConfig
    moe: MoeConfig

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """(read, write) block of each memory layer, counted from 0; empty if there are none."""
        if self.memory.layer == "none":
            return ()
        if not self.memory.read_layers:
            return tuple((i, i) for i in range(self.num_layers))
        pairs = zip(self.memory.read_layers, self.memory.write_layers, strict=True)
        return tuple((read - 1, write - 1) for read, write in pairs)

    @property
    def active_ffn_size(self) -> int:
        """Total inner width of the FFN and the selected experts of a token in one block."""
        experts = self.moe.top_k * self.moe.expert_size if self.ffn == "moe" else 0
        return self.ffn_size + experts

    def validate(self) -> None:
        """Raises ConfigError for sizes that contradict each other."""
        require(
            self.hidden_size % self.num_heads == 0 and self.head_dim % 2 == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide hidden_size = {self.hidden_size} into heads of even width (RoPE rotates"
            " pairs)",
        )
        require(
            self.num_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        require(
            self.rope_scaling != "none" or self.rope_scale == 1,
            "model.rope_scale",
            self.rope_scale,
            "must be 1 if rope_scaling is 'none'",
        )
        require(
            self.ffn == "moe" or (self.ffn_size > 0) == (self.ffn == "dense"),
            "model.ffn_size",
            self.ffn_size,
            f"must be {'>= 1' if self.ffn == 'dense' else '0'} if model.ffn is {self.ffn!r};"
            " with 'moe' it is the width of a shared expert, or 0",
        )
        require(
            self.ffn != "none" or self.memory.layer != "none",
            "model.ffn",
            self.ffn,
            "a block needs an FFN or a memory layer, but model.memory.layer is 'none'",
        )
        if self.memory.layer != "none":
            self.memory.validate(self.hidden_size)
            self._validate_placements()
        if self.ffn == "moe":
            self.moe.validate()

    def _validate_placements(self) -> None:
        memory = self.memory
        reads, writes = memory.read_layers, memory.write_layers
        require(
            len(reads) == len(writes),
            "model.memory.write_layers",
            writes,
            f"must have as many entries as read_layers = {reads}",
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
            "must be strictly increasing: a block feeds at most one memory layer",
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
                f"must divide the number of memory layers, {num_tables}, if sharing is 'block'",
            )
        require(
            num_tables * memory.num_values < 2**31,
            "model.memory.num_keys",
            memory.num_keys,
            f"gives a store of {num_tables * memory.num_values} rows; int32 ids allow fewer than"
            " 2**31",
        )
