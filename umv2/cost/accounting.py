"""Exact parameter and FLOP counts of a configuration, part by part.

A multiply-add counts as two FLOPs. Norms, activations, rotations, softmaxes and top-k selections
are left out: they are no matrix products, and below 1 % of the work at the paper's sizes.
"""

import dataclasses

from umv2.config import Config, ModelConfig
from umv2.model import retrieval


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part.

    `active` parts take part in every token; of `values`, a token reads `selected_values`. Papers
    count embeddings differently, so both ways are given: UltraMemV2's Table 10 counts one
    embedding matrix among the active parameters and none in the total.
    """

    embedding: int
    head: int
    attention: int
    ffn: int
    norms: int
    memory_projections: int
    memory_keys: int
    values: int
    selected_values: int

    @property
    def dense_without_embeddings(self) -> int:
        """Parameters that every token uses, embedding and head left out."""
        layers = self.attention + self.ffn + self.norms
        return layers + self.memory_projections + self.memory_keys

    @property
    def active(self) -> int:
        """Parameters that a token uses, embedding and head included."""
        return self.active_without_embeddings + self.embedding + self.head

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that a token uses, embedding and head left out."""
        return self.dense_without_embeddings + self.selected_values

    @property
    def total(self) -> int:
        """All parameters."""
        return self.total_without_embeddings + self.embedding + self.head

    @property
    def total_without_embeddings(self) -> int:
        """All parameters but embedding and head."""
        return self.dense_without_embeddings + self.values


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model; buffers (u, v, shuffle) are none."""
    h, num_layers = config.hidden_size, config.num_layers
    key_value_size = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * h
    attention_norms = h + key_value_size if config.query_key_norm else 0
    memory_projections = memory_keys = values = selected = 0
    num_memory = len(config.placements)
    if num_memory:
        memory = config.memory
        chunks = retrieval.query_chunks(memory.query, memory.tucker_rank)
        slots = memory.num_slots * memory.value_dim
        row = memory.value_dim + memory.pre_value_dim
        projections = h * (chunks * memory.key_dim + memory.pre_value_dim + slots)
        keys = memory.num_heads * 2 * memory.tucker_rank * memory.keys_per_side * memory.key_dim
        cores = memory.num_cores * memory.num_heads * memory.tucker_rank**2
        cores = cores if memory.scoring == "tucker" else 0
        memory_projections = num_memory * projections
        memory_keys = num_memory * (keys + cores + 2 * memory.key_dim)
        values = num_memory * memory.num_values * row
        selected = num_memory * memory.num_selected * row
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=num_layers * 2 * h * (h + key_value_size),
        ffn=num_layers * 3 * h * config.ffn_size,
        norms=num_layers * (2 * h + attention_norms) + h,
        memory_projections=memory_projections,
        memory_keys=memory_keys,
        values=values,
        selected_values=selected,
    )


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Returns FLOPs of a forward pass for one token by part, averaged over a causal sequence."""
    counts = parameter_counts(config)
    num_memory, memory = len(config.placements), config.memory
    # A position sees (t + 1) / 2 positions on average; scores and weighted sum each cost 2 h.
    context = (sequence_length + 1) / 2
    flops = {
        "attention": 2.0 * counts.attention + config.num_layers * 4 * config.hidden_size * context,
        "ffn": 2.0 * counts.ffn,
        "head": 2.0 * config.vocab_size * config.hidden_size,
    }
    if num_memory:
        keys = memory.num_heads * 2 * memory.tucker_rank * memory.keys_per_side * memory.key_dim
        grid = memory.num_heads * memory.shortlist**2 * memory.tucker_rank
        flops["retrieval"] = 2.0 * num_memory * (keys + grid)
        flops["memory_projections"] = 2.0 * counts.memory_projections
        flops["values"] = 2.0 * counts.selected_values
    return flops


def training_flops_per_token(config: Config) -> float:
    """Returns FLOPs of forward and backward pass for one token: three times the forward pass."""
    return 3 * sum(forward_flops_per_token(config.model, config.data.sequence_length).values())
