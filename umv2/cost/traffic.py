"""Memory traffic of a decode step: bytes read of weights, table rows, experts and cache.

A step generates one token for each of `batch_size` sequences. Weights are read once per step, table
rows once per token, and experts once if any token is routed to them. Counts requested bytes:
hardware moves sectors of 32 to 128 bytes, so narrow rows cost more. Intermediate results that a
kernel writes and reads (activations, logits, scores) are not counted.
"""

import dataclasses
import math

import jax.numpy as jnp

from umv2.config import ModelConfig
from umv2.cost import accounting
from umv2.model.slots import LayerCost


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of a served model, by their NumPy names."""

    weights: str = "bfloat16"
    tables: str = "bfloat16"
    cache: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DecodeBytes:
    """Bytes read in one decode step, by part.

    `embedding` is one row per sequence; `head` is the full matrix, even if tied to the embedding.
    `sparse_values` are rows of tables, or experts. `buffers` are u, v, and the addresses looked up
    in the shuffle.
    """

    embedding: float
    attention: float
    ffn: float
    norms: float
    sparse_projections: float
    routing: float
    sparse_values: float
    buffers: float
    head: float
    cache: float

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(dataclasses.astuple(self))

    @property
    def without_cache(self) -> float:
        """All bytes except those of the key-value cache."""
        return self.total - self.cache

    def as_dict(self) -> dict[str, float]:
        """Returns the parts and their sums."""
        sums = {"without_cache": self.without_cache, "total": self.total}
        return dataclasses.asdict(self) | sums


def decode_bytes(
    config: ModelConfig,
    batch_size: int,
    context_length: int,
    *,
    precision: Precision | None = None,
    distinct_rows: bool = False,
) -> DecodeBytes:
    """Counts the bytes that one decode step reads.

    The number of experts read is its expectation under uniform, independent routing; a trained
    router is less uniform and reads fewer.

    Args:
      config: the model.
      batch_size: sequences per step.
      context_length: positions that each sequence reads from its cache.
      precision: dtypes; None: the compute dtype for everything.
      distinct_rows: False counts the rows of every token, an upper bound. True counts a row that
        several tokens read once, in expectation under uniform selection.
    """
    precision = precision or Precision(*3 * (config.compute_dtype,))
    counts, layers = accounting.parameter_counts(config), accounting.slots(config)
    weight, table = bytes_per_entry(precision.weights), bytes_per_entry(precision.tables)

    def value_bytes(count: int, layer: LayerCost, entry: float) -> float:
        if not layer.num_choices:
            return entry * count * batch_size * layer.selected
        rows = float(batch_size * layer.num_draws * layer.num_picked)
        if distinct_rows or layer.shared_reads:
            rows = expected_distinct(
                layer.num_choices,
                layer.num_picked,
                batch_size * layer.num_draws,
                copies=layer.copies,
            )
        return entry * count * rows * layer.selected / (layer.num_draws * layer.num_picked)

    values = value_bytes(*layers.memory, table) + value_bytes(*layers.experts, weight)
    buffers = layers.sum("buffer_bytes") + batch_size * layers.sum("address_bytes")
    return DecodeBytes(
        embedding=weight * batch_size * config.hidden_size,
        attention=weight * counts.attention,
        ffn=weight * counts.ffn,
        norms=weight * counts.norms,
        sparse_projections=weight * counts.sparse_projections,
        routing=weight * counts.routing,
        sparse_values=values,
        buffers=float(buffers),
        head=weight * config.vocab_size * config.hidden_size,
        cache=cache_bytes(config, batch_size, context_length, dtype=precision.cache),
    )


def cache_bytes(
    config: ModelConfig, batch_size: int, context_length: int, *, dtype: str | None = None
) -> float:
    """Returns the bytes of the key-value cache of all blocks; `dtype` None: the compute dtype."""
    key_value_size = config.num_key_value_heads * config.head_dim
    entries = 2 * config.num_layers * batch_size * context_length * key_value_size
    return entries * bytes_per_entry(dtype or config.compute_dtype)


def expected_distinct(
    num_choices: int, num_picked: int, num_draws: int, *, copies: int = 1
) -> float:
    """Returns the expected number of choices picked at least once: E (1 - (1 - k / E)^b).

    Args:
      num_choices: E, the number of experts or rows.
      num_picked: k, the number of distinct choices per draw, uniformly random.
      num_draws: b, the number of independent draws.
      copies: number of addresses of each choice; a draw picks distinct addresses.
    """
    addresses = num_choices * copies
    missed = math.prod((addresses - num_picked - i) / (addresses - i) for i in range(copies))
    if missed <= 0:
        return float(num_choices)
    # 1 - missed^b, accurate even if `missed` is close to 1.
    return num_choices * -math.expm1(num_draws * math.log(missed))


def bytes_per_entry(dtype: str) -> float:
    """Returns the bytes of one array element: half a byte for packed 4-bit types."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return info(dtype).bits / 8
