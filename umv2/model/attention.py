"""Causal self-attention with rotary positions and a key-value cache."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from umv2 import kernels, sharding
from umv2.config import ModelConfig
from umv2.model import cpu_attention, layers
from umv2.model.parameter import Initializer
from umv2.types import struct

# Sequences longer than `_LONG` are processed in chunks of `_QUERY_CHUNK` queries: the full score
# matrix of 32K positions would not fit in device memory.
_QUERY_CHUNK = 1024
_LONG = 4096
# Cache positions read per block on CPU. Time in ms with 2,048 and with 300 positions filled, by
# block size: median of 7 runs on 2 cores, batch 32, 12 heads of width 64, cache length 2,048:
#
#                       no blocks       256         512        1024
#     float32              18, 18     41, 11      27, 6.4     19, 9.9
#     bfloat16           160, 160     20, 5.2     14, 3.8     12, 5.6
_CACHE_BLOCK = 1024


@struct
class KeyValueCache:
    """Keys and values of the positions processed so far, for one block.

    The head axis precedes the position axis, so attention needs no transposition.
    """

    keys: Float[Array, "b g s q"]
    values: Float[Array, "b g s q"]


class Attention(nnx.Module):
    """Attention as in OLMoE (arXiv 2409.02060): QK-norm over all heads jointly, no biases.

    `num_key_value_heads` < `num_heads` gives grouped-query attention (arXiv 2305.13245), and
    `window` > 0 sliding-window attention (arXiv 2004.05150).
    """

    def __init__(self, config: ModelConfig, *, init: Initializer):
        size, key_value_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        std = layers.linear_std(config.hidden_size)
        residual_std = std * layers.residual_scale(config.num_layers)
        into: Any = {"axes": ("hidden", "heads"), "group": "matrices"}
        self.query = init.normal("query", (size, size), std=std, **into)
        self.key = init.normal("key", (size, key_value_size), std=std, **into)
        self.value = init.normal("value", (size, key_value_size), std=std, **into)
        self.output = init.normal(
            "output", (size, size), std=residual_std, axes=("heads", "hidden"), group="matrices"
        )
        if config.query_key_norm:
            self.query_norm = layers.RMSNorm(size, config.norm_epsilon, init=init)
            self.key_norm = layers.RMSNorm(key_value_size, config.norm_epsilon, init=init)
        self.normalised = config.query_key_norm
        self.head_dim = config.head_dim
        self.rope = layers.Rope(config.rope_theta, config.rope_scaling, config.rope_scale)
        self.window = config.attention_window
        self.implementation: Literal["xla", "cudnn"] = config.attention

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b 1 t t"] | None = None,
        cache: KeyValueCache | None = None,
        position: Int[Array, "#b"] | int = 0,
        prefill: bool = False,
    ) -> tuple[Float[Array, "b t d"], KeyValueCache | None]:
        """Applies causal self-attention.

        Args:
          x: normalised input.
          mask: True where a query may attend to a key, in addition to the causal mask (used for
            packed documents).
          cache: keys and values of the positions before `position`, which x continues.
          position: position of x[:, 0], either one for all rows or one per row.
          prefill: the cache is empty; it is written from position 0 and not read.

        Returns:
          The projected output, and the cache updated with the positions of x.
        """
        query, keys = layers.linear(x, self.query[...]), layers.linear(x, self.key[...])
        values = layers.linear(x, self.value[...])
        if self.normalised:
            query, keys = self.query_norm(query), self.key_norm(keys)
        starts = jnp.broadcast_to(jnp.asarray(position, jnp.int32), x.shape[:1])
        specs: tuple[Any, Any] = (None, None)
        if sharding.on_mesh():
            starts = sharding.shard_batch_like(starts, x)
            specs = (sharding.spec(query), jax.tree.map(sharding.spec, cache))
        attended, cache = sharding.shard_map(
            lambda *arrays: self._attend(*arrays, prefill=prefill),
            query,
            keys,
            values,
            mask,
            cache,
            starts,
            out_specs=specs,
        )
        return layers.linear(attended, self.output[...]), cache

    def _attend(
        self,
        query: Float[Array, "b t e"],
        keys: Float[Array, "b t f"],
        values: Float[Array, "b t f"],
        mask: Bool[Array, "b 1 t t"] | None,
        cache: KeyValueCache | None,
        starts: Int[Array, " b"],
        *,
        prefill: bool,
    ) -> tuple[Float[Array, "b t e"], KeyValueCache | None]:
        """Computes attention for the heads of one device."""
        shape = query.shape
        positions = starts[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None, :]
        query = self.rope.rotate(self._split(query), positions)
        keys = self.rope.rotate(self._split(keys), positions)
        values = self._split(values)
        if cache is not None:
            cache = KeyValueCache(
                keys=_write(cache.keys, keys, starts, prefill=prefill),
                values=_write(cache.values, values, starts, prefill=prefill),
            )
        if cache is None or prefill:
            attended = self._attend_uncached(query, keys, values, mask)
        else:
            attended = _attend_to_cache(query, cache, positions, self.window)
        return attended.reshape(shape), cache

    def _attend_uncached(
        self,
        query: Float[Array, "b t h q"],
        keys: Float[Array, "b t g q"],
        values: Float[Array, "b t g q"],
        mask: Bool[Array, "b 1 t t"] | None,
    ) -> Float[Array, "b t h q"]:
        window = (self.window - 1, 0) if self.window else None
        length = query.shape[1]
        if length <= _LONG and self.implementation == "xla" and kernels.compiles_for_cpu():
            return cpu_attention.attend(query, keys, values, mask, self.window)
        if length <= _LONG or length % _QUERY_CHUNK or self.implementation == "cudnn":
            return jax.nn.dot_product_attention(
                query,
                keys,
                values,
                mask=mask,
                is_causal=True,
                local_window_size=window,
                implementation=self.implementation,
            )

        @jax.checkpoint
        def attend(start: Int[Array, ""]) -> Float[Array, "b chunk h q"]:
            def chunk(array: Array, axis: int) -> Array:
                return lax.dynamic_slice_in_dim(array, start, _QUERY_CHUNK, axis)

            positions = start + jnp.arange(_QUERY_CHUNK, dtype=jnp.int32)
            visible = _visible(positions[None, :], jnp.arange(length)[None, :], self.window)
            visible = visible[:, None]
            if mask is not None:
                visible = visible & chunk(mask, 2)
            return jax.nn.dot_product_attention(chunk(query, 1), keys, values, mask=visible)

        attended = lax.map(attend, jnp.arange(0, length, _QUERY_CHUNK, dtype=jnp.int32))
        return jnp.moveaxis(attended, 0, 1).reshape(query.shape)

    def _split(self, x: Float[Array, "b t e"]) -> Float[Array, "b t h q"]:
        return jnp.reshape(x, x.shape[:2] + (-1, self.head_dim))


def _visible(
    queries: Int[Array, "b t"], keys: Int[Array, "#b s"], window: int
) -> Bool[Array, "b t s"]:
    """Returns the causal (and sliding-window) mask for the given query and key positions."""
    distance = queries[:, :, None] - keys[:, None, :]
    causal = distance >= 0
    return causal & (distance < window) if window else causal


def _write(
    cache: Float[Array, "b g s q"],
    new: Float[Array, "b t g q"],
    starts: Int[Array, " b"],
    *,
    prefill: bool,
) -> Float[Array, "b g s q"]:
    """Writes new entries into the cache, starting at position `starts` of each row."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    if prefill:
        return lax.dynamic_update_slice_in_dim(cache, new, 0, axis=2)
    # vmap gives one scatter for all rows, done in place if the cache is donated. One update per row
    # runs as fast, but for 128 rows and 20 blocks compiles in half a minute instead of a second.
    return jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=1))(cache, new, starts)


def _attend_to_cache(
    query: Float[Array, "b t h q"],
    cache: KeyValueCache,
    positions: Int[Array, "b t"],
    window: int,
) -> Float[Array, "b t h q"]:
    """Attends to all filled cache positions, including those of the queries.

    Accumulates in float32 (float64 for float64 queries), whatever the dtype of the cache.
    """
    num_heads = cache.keys.shape[1]
    grouped = query.reshape(*query.shape[:2], num_heads, -1, query.shape[-1])
    # Queries that share a key-value head become the rows of one matrix product.
    rows = jnp.moveaxis(grouped, 1, 3).reshape(len(query), num_heads, -1, query.shape[-1])
    repeats = rows.shape[2] // query.shape[1]
    row_positions = jnp.tile(positions, (1, repeats))
    dtype = layers.accumulation_dtype(query.dtype)
    rows = rows.astype(dtype) * query.shape[-1] ** -0.5
    attended = lax.platform_dependent(
        rows,
        cache.keys,
        cache.values,
        row_positions,
        cpu=lambda *arrays: _attend_blockwise(*arrays, window=window),
        default=lambda *arrays: _attend_dense(*arrays, window=window),
    )
    attended = attended.reshape(*rows.shape[:2], repeats, *query.shape[1::2])
    return jnp.moveaxis(attended, 3, 1).reshape(query.shape).astype(query.dtype)


def _attend_dense(
    query: Float[Array, "b g m q"],
    keys: Float[Array, "b g s q"],
    values: Float[Array, "b g s q"],
    positions: Int[Array, "b m"],
    *,
    window: int,
) -> Float[Array, "b g m q"]:
    scores = jnp.einsum(
        "bgmq,bgsq->bgms",
        query.astype(keys.dtype),
        keys,
        preferred_element_type=query.dtype,
    )
    visible = _visible(positions, jnp.arange(keys.shape[2])[None, :], window)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum(
        "bgms,bgsq->bgmq",
        weights.astype(values.dtype),
        values,
        preferred_element_type=query.dtype,
    )


def _attend_blockwise(
    query: Float[Array, "b g m q"],
    keys: Float[Array, "b g s q"],
    values: Float[Array, "b g s q"],
    positions: Int[Array, "b m"],
    *,
    window: int,
) -> Float[Array, "b g m q"]:
    """Computes blockwise attention with an online softmax, visiting only the visible blocks.

    Rows of the batch are processed one by one or, if the cache is short, several at a time, as many
    as fill a block. Each block of keys and values is converted to the query's dtype while it is in
    the processor's cache: with so few queries, XLA's CPU products of narrower types are slow.
    """
    num_rows, _, length, _ = keys.shape
    # Blocks of nearly equal size: the last one is read in full as well.
    size = -(-length // -(-length // _CACHE_BLOCK))
    rows_per_block = math.gcd(num_rows, 1 << (_CACHE_BLOCK // size).bit_length())

    def attend(row: Int[Array, ""]) -> Float[Array, "rows g m q"]:
        queries = lax.dynamic_slice_in_dim(query, row, rows_per_block)
        query_positions = lax.dynamic_slice_in_dim(positions, row, rows_per_block)

        def visit(block: Int[Array, ""] | int, carry: tuple[Array, Array, Array]) -> Any:
            running_max, denominator, numerator = carry
            first = block * size
            start = jnp.minimum(first, length - size)  # the last block may start earlier

            def read(cached: Array) -> Array:
                shape = (rows_per_block, cached.shape[1], size, cached.shape[3])
                return lax.dynamic_slice(cached, (row, 0, start, 0), shape).astype(query.dtype)

            key_positions = start + jnp.arange(size, dtype=jnp.int32)
            visible = _visible(query_positions, key_positions[None, :], window)
            visible = visible & (key_positions >= first)[None, None, :]
            scores = jnp.einsum("rgmq,rgsq->rgms", queries, read(keys))
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
            new_max = jnp.maximum(running_max, scores.max(axis=-1, keepdims=True))
            # The maximum is still -inf for a query that sees no key of the blocks so far.
            reference = jnp.where(jnp.isfinite(new_max), new_max, 0)
            weights = jnp.exp(scores - reference)
            correction = jnp.exp(running_max - reference)
            denominator = denominator * correction + weights.sum(axis=-1, keepdims=True)
            pooled = jnp.einsum("rgms,rgsq->rgmq", weights, read(values))
            return new_max, denominator, numerator * correction + pooled

        zeros = jnp.zeros_like(queries[..., :1])
        initial = (zeros - jnp.inf, zeros, jnp.zeros_like(queries))
        first_block = jnp.int32(0)
        if window:
            first_block = jnp.maximum(query_positions.min() - window + 1, 0) // size
        last_block = query_positions.max() // size
        _, denominator, numerator = lax.fori_loop(first_block, last_block + 1, visit, initial)
        return numerator / denominator

    attended = lax.map(attend, jnp.arange(0, num_rows, rows_per_block, dtype=jnp.int32))
    return attended.reshape(query.shape)
