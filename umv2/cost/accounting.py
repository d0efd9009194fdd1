"""Exact parameter and FLOP counts of a configuration, part by part, and the memory of training.

A multiply-add counts as two FLOPs. Norms, activations, rotations, softmaxes and top-k selections
are left out: they are no sums of products, and below 1 % of the FLOPs at the paper's sizes. (A
selection may still take longer than its share: it is comparisons, which no matrix unit makes.)
"""

import dataclasses

from umv2.config import Config, ModelConfig
from umv2.model.memory import retrieval

FLOAT32_BYTES = INT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part.

    `sparse_projections`: of memory layers, W_q, W_p, W_v, W_g and their biases. `routing`: keys,
    cores and norms, or the router. `sparse_values`: rows of the value tables, or experts, of which
    a token reads `selected`. All other parts take part in every token.

    Papers count embeddings differently, so all ways are given. UltraMemV2's Table 10 counts none
    in its totals, and among the active parameters one (227M) or none (OLMoE-1B/7B).
    """

    embedding: int
    head: int
    attention: int
    ffn: int
    norms: int
    sparse_projections: int
    routing: int
    sparse_values: int
    selected: int

    @property
    def dense_without_embeddings(self) -> int:
        """Parameters that every token uses, embedding and head left out."""
        layers = self.attention + self.ffn + self.norms
        return layers + self.sparse_projections + self.routing

    @property
    def active(self) -> int:
        """Parameters that a token uses, embedding and head included."""
        return self.active_without_embeddings + self.embedding + self.head

    @property
    def active_one_embedding(self) -> int:
        """Parameters that a token uses, with one of embedding and head, tied or not."""
        return self.active_without_embeddings + self.embedding

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that a token uses, embedding and head left out."""
        return self.dense_without_embeddings + self.selected

    @property
    def total(self) -> int:
        """All parameters."""
        return self.total_without_embeddings + self.embedding + self.head

    @property
    def total_without_embeddings(self) -> int:
        """All parameters but embedding and head."""
        return self.dense_without_embeddings + self.sparse_values

    def as_dict(self) -> dict[str, int]:
        """Returns the parts and the sums over them."""
        sums = (
            "active",
            "active_one_embedding",
            "active_without_embeddings",
            "total",
            "total_without_embeddings",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in sums}


@dataclasses.dataclass(frozen=True)
class _SparseLayer:
    """One sparse layer: its parameters, and the FLOPs of a token in choosing rows or experts."""

    matrices: int = 0
    biases: int = 0
    keys: int = 0  # or the router
    cores_and_norms: int = 0
    values: int = 0
    selected: int = 0
    selection_flops: int = 0


def _memory_layer(config: ModelConfig) -> _SparseLayer:
    h, memory = config.hidden_size, config.memory
    heads, rank, keys_per_side = memory.num_heads, memory.tucker_rank, memory.keys_per_side
    query = memory.key_dim * retrieval.query_chunks(memory.query, tucker_rank=rank, num_heads=heads)
    pooled = memory.num_slots * memory.value_dim
    projected, gated = memory.projection != "none", memory.output_gate != "none"
    pre = memory.pre_value_dim * memory.pre_projection
    biases = query + projected * h + gated * pooled
    norms = {"none": 0, "rms": 1, "layer": 2}
    norms_of_both = norms[memory.query_norm] + norms[memory.key_norm]
    row = memory.value_dim + memory.pre_value_dim
    grid = memory.shortlist**2
    if memory.scoring == "tucker":
        cores = memory.num_cores * heads * rank**2
        # S u and S v of every key; S_row C of the row candidates; their product with S_col for
        # every pair; and the chosen pairs once more, core by core.
        chosen = memory.num_cores * memory.top_m * (rank**2 + rank)
        per_head = 2 * rank * keys_per_side + memory.shortlist * rank**2 + grid * rank + chosen
        scoring_flops = 2 * heads * per_head
    else:
        cores = 0
        scoring_flops = heads * (grid + memory.top_m)
    return _SparseLayer(
        matrices=h * (query + pre + projected * pooled + gated * pooled),
        biases=biases if memory.bias else 0,
        keys=heads * 2 * rank * keys_per_side * memory.key_dim,
        cores_and_norms=cores + norms_of_both * memory.key_dim,
        values=memory.num_values * row,
        selected=memory.num_selected * row,
        selection_flops=scoring_flops,
    )


def _moe_layer(config: ModelConfig) -> _SparseLayer:
    moe = config.moe
    expert = 3 * config.hidden_size * moe.expert_size
    return _SparseLayer(
        keys=config.hidden_size * moe.num_experts,
        values=moe.num_experts * expert,
        selected=moe.top_k * expert,
    )


def _sparse_layer(config: ModelConfig) -> _SparseLayer:
    match config.family:
        case "memory":
            return _memory_layer(config)
        case "moe":
            return _moe_layer(config)
        case "dense":
            return _SparseLayer()


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model; buffers (u, v, shuffle) are none.

    Layers that share tables own one each all the same: sharing changes who reads a table.
    """
    h, num_layers = config.hidden_size, config.num_layers
    key_value_size = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * h
    attention_norms = h + key_value_size if config.query_key_norm else 0
    num_sparse, sparse = len(config.placements), _sparse_layer(config)
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=num_layers * 2 * h * (h + key_value_size),
        ffn=num_layers * 3 * h * config.ffn_size,
        norms=num_layers * (2 * h + attention_norms) + h,
        sparse_projections=num_sparse * (sparse.matrices + sparse.biases),
        routing=num_sparse * (sparse.keys + sparse.cores_and_norms),
        sparse_values=num_sparse * sparse.values,
        selected=num_sparse * sparse.selected,
    )


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Returns FLOPs of a forward pass for one token by part, averaged over a causal sequence.

    A third of training; prefill is all of it but the head. Parts as in `ParameterCounts`; those
    that the model lacks are 0.
    """
    # Position t of 1..T sees t positions: (T + 1) / 2 on average.
    return _flops_per_token(config, (sequence_length + 1) / 2)


def decode_flops_per_token(config: ModelConfig, context_length: int) -> dict[str, float]:
    """Returns FLOPs of one decode step for one token by part.

    Args:
      config: the model.
      context_length: positions that the token attends to, itself included.
    """
    return _flops_per_token(config, float(context_length))


def _flops_per_token(config: ModelConfig, context_length: float) -> dict[str, float]:
    counts, sparse = parameter_counts(config), _sparse_layer(config)
    num_sparse = len(config.placements)
    # Scores and weighted sum: a multiply-add each for every position and entry of the query.
    attended = config.num_layers * 4 * config.hidden_size * context_length
    return {
        "attention": 2.0 * counts.attention + attended,
        "ffn": 2.0 * counts.ffn,
        "sparse_projections": 2.0 * num_sparse * sparse.matrices,
        "routing": 2.0 * num_sparse * sparse.keys + num_sparse * sparse.selection_flops,
        "sparse_values": 2.0 * counts.selected,
        "head": 2.0 * config.vocab_size * config.hidden_size,
    }


def training_flops_per_token(config: Config) -> float:
    """Returns FLOPs of forward and backward pass for one token: three times the forward pass."""
    return 3 * sum(forward_flops_per_token(config.model, config.data.sequence_length).values())


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds from step to step, over all devices, every array once.

    Activations, the batch, and copies in the compute dtype come on top, and go with the step;
    gradients are whole only at the end of the backward pass. Replicas hold everything again.
    """

    parameters: int
    gradients: int
    moments: int
    buffers: int
    usage: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.checkpoint + self.gradients

    @property
    def checkpoint(self) -> int:
        """Size of a checkpoint before compression: all but the gradients."""
        return self.parameters + self.moments + self.buffers + self.usage

    def as_dict(self) -> dict[str, int]:
        """Returns the parts and the sums over them."""
        return dataclasses.asdict(self) | {"total": self.total, "checkpoint": self.checkpoint}


def training_memory(config: ModelConfig) -> TrainingMemory:
    """Counts the bytes of the train state and the gradients: AdamW with everything in float32.

    A gradient of a value table is dense. Step counters (20 bytes) are left out.
    """
    parameters = FLOAT32_BYTES * parameter_counts(config).total
    num_sparse = len(config.placements)
    return TrainingMemory(
        parameters=parameters,
        gradients=parameters,
        moments=2 * parameters,
        buffers=num_sparse * (core_vector_bytes(config) + shuffle_bytes(config)),
        usage=num_sparse * config.num_selectable * INT32_BYTES,
    )


def core_vector_bytes(config: ModelConfig) -> int:
    """Returns the bytes of u and v of one memory layer; 0 where there are no cores."""
    if config.family != "memory" or config.memory.scoring != "tucker":
        return 0
    return 2 * config.memory.num_heads * config.memory.tucker_rank * FLOAT32_BYTES


def shuffle_bytes(config: ModelConfig) -> int:
    """Returns the bytes of the permutation of addresses of one memory layer; 0 where is none."""
    if config.family != "memory" or not config.memory.shuffle:
        return 0
    return config.memory.keys_per_side**2 * INT32_BYTES
