"""Exact parameter and FLOP counts of a configuration, by part, and the memory of training.

A multiply-add counts as two FLOPs. Norms, activations, RoPE, softmax and top-k are not counted:
they are not matrix products, and below 1 % of the FLOPs at the paper's sizes. (A top-k may still
take longer than its FLOPs suggest, because comparisons do not run on matrix units.)
"""

import dataclasses

from umv2.config import Config, ModelConfig
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.slots import LayerCost, memory_layer

FLOAT32_BYTES = INT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part.

    `sparse_projections`: W_q, W_p, W_v, W_g of memory layers and their biases. `routing`: keys,
    cores and norms, or the router. `sparse_values`: rows of the value tables, or experts; a token
    reads `selected` of them. Every token uses all other parts.

    Papers count embeddings differently, so there is a property for each convention. UltraMemV2's
    Table 10 excludes them from the totals, and includes one (227M) or none (OLMoE-1B/7B) of the two
    in the active parameters.
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
        """Parameters that every token uses, without embedding and head."""
        layers = self.attention + self.ffn + self.norms
        return layers + self.sparse_projections + self.routing

    @property
    def active(self) -> int:
        """Parameters that a token uses, with embedding and head."""
        return self.active_without_embeddings + self.embedding + self.head

    @property
    def active_one_embedding(self) -> int:
        """Parameters that a token uses, counting the embedding but not the head, tied or not."""
        return self.active_without_embeddings + self.embedding

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that a token uses, without embedding and head."""
        return self.dense_without_embeddings + self.selected

    @property
    def total(self) -> int:
        """All parameters."""
        return self.total_without_embeddings + self.embedding + self.head

    @property
    def total_without_embeddings(self) -> int:
        """All parameters except embedding and head."""
        return self.dense_without_embeddings + self.sparse_values

    def as_dict(self) -> dict[str, int]:
        """Returns the parts and their sums."""
        sums = (
            "active",
            "active_one_embedding",
            "active_without_embeddings",
            "total",
            "total_without_embeddings",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in sums}


@dataclasses.dataclass(frozen=True)
class Slots:
    """The layers in the slots of all blocks, as (number of layers, cost of one) pairs."""

    memory: tuple[int, LayerCost]
    experts: tuple[int, LayerCost]

    def sum(self, name: str) -> int:
        """Returns the sum of one of `LayerCost`'s figures over all layers."""
        return sum(count * getattr(layer, name) for count, layer in (self.memory, self.experts))


def slots(config: ModelConfig) -> Slots:
    """Returns the cost of the memory layers and experts of a model; 0 for empty slots."""
    memory, experts = (0, LayerCost()), (0, LayerCost())
    if config.placements:
        memory = (len(config.placements), memory_layer(config).cost(config))
    if config.ffn == "moe":
        experts = (config.num_layers, MixtureOfExperts.cost(config))
    return Slots(memory, experts)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model; buffers (u, v, shuffle) are not parameters.

    With table sharing, there is still one table per layer: sharing only changes which layers read
    a table.
    """
    h, num_layers = config.hidden_size, config.num_layers
    key_value_size = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * h
    attention_norms = h + key_value_size if config.query_key_norm else 0
    layers = slots(config)
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=num_layers * 2 * h * (h + key_value_size),
        ffn=num_layers * 3 * h * config.ffn_size,
        norms=num_layers * (2 * h + attention_norms) + h,
        sparse_projections=layers.sum("projections") + layers.sum("biases"),
        routing=layers.sum("routing") + layers.sum("norms"),
        sparse_values=layers.sum("values"),
        selected=layers.sum("selected"),
    )


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Returns the FLOPs per token of a forward pass, by part, averaged over a causal sequence.

    Training takes three times as many; prefill takes all of them except the head. The parts are
    those of `ParameterCounts`; parts that the model lacks are 0.
    """
    # Position t of 1..T sees t positions: (T + 1) / 2 on average.
    return _flops_per_token(config, (sequence_length + 1) / 2)


def decode_flops_per_token(config: ModelConfig, context_length: int) -> dict[str, float]:
    """Returns the FLOPs per token of a decode step, by part.

    Args:
      config: the model.
      context_length: positions that the token attends to, including itself.
    """
    return _flops_per_token(config, float(context_length))


def _flops_per_token(config: ModelConfig, context_length: float) -> dict[str, float]:
    counts, layers = parameter_counts(config), slots(config)
    # Scores and weighted sum: one multiply-add each, per position and element of the query.
    attended = config.num_layers * 4 * config.hidden_size * context_length
    return {
        "attention": 2.0 * counts.attention + attended,
        "ffn": 2.0 * counts.ffn,
        "sparse_projections": 2.0 * layers.sum("projections"),
        "routing": 2.0 * layers.sum("routing") + layers.sum("selection_flops"),
        "sparse_values": 2.0 * counts.selected,
        "head": 2.0 * config.vocab_size * config.hidden_size,
    }


def training_flops_per_token(config: Config) -> float:
    """Returns the FLOPs per token of forward and backward pass: three times the forward pass."""
    return 3 * sum(forward_flops_per_token(config.model, config.data.sequence_length).values())


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the train state and gradients, summed over all devices, each array counted once.

    Does not include temporaries of a step: activations, the batch, and copies in the compute dtype.
    All gradients coexist only at the end of the backward pass. Replicas multiply these figures.
    """

    parameters: int
    gradients: int
    moments: int
    buffers: int
    usage: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.checkpoint + self.gradients

    @property
    def checkpoint(self) -> int:
        """Size of a checkpoint before compression: everything but the gradients."""
        return self.parameters + self.moments + self.buffers + self.usage

    def as_dict(self) -> dict[str, int]:
        """Returns the parts and their sums."""
        return dataclasses.asdict(self) | {"total": self.total, "checkpoint": self.checkpoint}


def training_memory(config: ModelConfig) -> TrainingMemory:
    """Counts the bytes of the train state and the gradients: AdamW with everything in float32.

    Gradients of value tables are dense. Step counters (20 bytes) are not counted.
    """
    parameters = FLOAT32_BYTES * parameter_counts(config).total
    layers = slots(config)
    return TrainingMemory(
        parameters=parameters,
        gradients=parameters,
        moments=2 * parameters,
        buffers=layers.sum("stored_bytes"),
        usage=layers.sum("counters") * INT32_BYTES,
    )
