"""Exact parameter and FLOP counts of a configuration, part by part, and the memory of training.

A multiply-add counts as two FLOPs. Norms, activations, rotations, softmaxes and top-k selections
are left out: they are no sums of products, and below 1 % of the FLOPs at the paper's sizes. (A
selection may still take longer than its FLOPs say: it is comparisons, which no matrix unit makes.)
"""

import dataclasses

from umv2.config import Config, ModelConfig
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.slots import LayerCost, memory_layer

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
class Slots:
    """What stands in the slots of all blocks: pairs of how many layers, and what one costs."""

    memory: tuple[int, LayerCost]
    experts: tuple[int, LayerCost]

    def sum(self, name: str) -> int:
        """Returns the sum of one of `LayerCost`'s figures over all layers."""
        return sum(count * getattr(layer, name) for count, layer in (self.memory, self.experts))


def slots(config: ModelConfig) -> Slots:
    """Asks the layers of a model what they cost; a slot that is empty costs nothing."""
    memory, experts = (0, LayerCost()), (0, LayerCost())
    if config.placements:
        memory = (len(config.placements), memory_layer(config).cost(config))
    if config.ffn == "moe":
        experts = (config.num_layers, MixtureOfExperts.cost(config))
    return Slots(memory, experts)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model; buffers (u, v, shuffle) are none.

    Layers that share tables own one each all the same: sharing changes who reads a table.
    """
    h, num_layers = config.hidden_size, config.num_layers
    key_value_size = config.num_key_value_heads * config.head_dim
    embedding = config.vocab_size * h
    attention_norms = h + key_value_size if config.query_key_norm else 0
    found = slots(config)
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=num_layers * 2 * h * (h + key_value_size),
        ffn=num_layers * 3 * h * config.ffn_size,
        norms=num_layers * (2 * h + attention_norms) + h,
        sparse_projections=found.sum("projections") + found.sum("biases"),
        routing=found.sum("routing") + found.sum("norms"),
        sparse_values=found.sum("values"),
        selected=found.sum("selected"),
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
    counts, found = parameter_counts(config), slots(config)
    # Scores and weighted sum: a multiply-add each for every position and entry of the query.
    attended = config.num_layers * 4 * config.hidden_size * context_length
    return {
        "attention": 2.0 * counts.attention + attended,
        "ffn": 2.0 * counts.ffn,
        "sparse_projections": 2.0 * found.sum("projections"),
        "routing": 2.0 * found.sum("routing") + found.sum("selection_flops"),
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
    gradients are complete only at the end of the backward pass. Replicas hold everything again.
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
    found = slots(config)
    return TrainingMemory(
        parameters=parameters,
        gradients=parameters,
        moments=2 * parameters,
        buffers=found.sum("stored_bytes"),
        usage=found.sum("counters") * INT32_BYTES,
    )
