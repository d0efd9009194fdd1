"""What one decode step reads from memory: bytes of weights, rows, experts and cache, part by part.

A step gives each of `batch_size` sequences one token. Every weight is read once for all
of them; rows of tables are read for each token, experts once if any token chose them. Counted are
the bytes asked for, each once: hardware moves sectors of 32 to 128 bytes, so narrow rows cost
more, and what a kernel writes and reads again (activations, logits, scores) is left out.
"""

import dataclasses
import math

import jax.numpy as jnp

from umv2.config import ModelConfig
from umv2.cost import accounting
from umv2.model.slots import LayerCost


@dataclasses.dataclass(frozen=True)
class Precision:
    """Data types, by their NumPy names, that a served model is held in."""

    weights: str = "bfloat16"
    tables: str = "bfloat16"
    cache: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DecodeBytes:
    """Bytes read in one decode step, by part.

    `embedding` is one row a sequence; `head` is all of the matrix, even where it is tied to the
    embedding. `sparse_values` are rows of tables, or experts. `buffers` are the addresses looked
    up in the shuffle, and u and v.
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
        """All bytes but those of the key-value cache."""
        return self.total - self.cache

    def as_dict(self) -> dict[str, float]:
        """Returns the parts and the sums over them."""
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

    Experts are those expected to be chosen at least once when tokens choose uniformly and
    independently; a trained router, less even, needs fewer.

    Args:
      config: the model.
      batch_size: sequences that take the step together.
      context_length: positions that each of them reads from its cache.
      precision: data types; None: the compute dtype for everything.
      distinct_rows: False: every token reads its own rows, the most there can be. True: a row
        that several tokens of a step want is read once, as expected under uniform choice.
    """
    precision = precision or Precision(*3 * (config.compute_dtype,))
    counts, found = accounting.parameter_counts(config), accounting.slots(config)
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

    values = value_bytes(*found.memory, table) + value_bytes(*found.experts, weight)
    buffers = found.sum("buffer_bytes") + batch_size * found.sum("address_bytes")
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
    """Returns the bytes of keys and values of all blocks, in `dtype` or else the compute dtype."""
    key_value_size = config.num_key_value_heads * config.head_dim
    entries = 2 * config.num_layers * batch_size * context_length * key_value_size
    return entries * bytes_per_entry(dtype or config.compute_dtype)


def expected_distinct(
    num_choices: int, num_picked: int, num_draws: int, *, copies: int = 1
) -> float:
    """Returns how many choices are expected to be picked at least once: E (1 - (1 - k / E)^b).

    Args:
      num_choices: E, experts or rows.
      num_picked: k, different ones that each draw takes, uniformly.
      num_draws: b, independent draws.
      copies: under how many addresses each choice stands; a draw takes different addresses.
    """
    addresses = num_choices * copies
    missed = math.prod((addresses - num_picked - i) / (addresses - i) for i in range(copies))
    if missed <= 0:
        return float(num_choices)
    # 1 - missed^b, exact also where `missed` is nearly 1.
    return num_choices * -math.expm1(num_draws * math.log(missed))


def bytes_per_entry(dtype: str) -> float:
    """Returns the bytes of one array entry: half a byte for types of 4 bits, which lie packed."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return info(dtype).bits / 8
