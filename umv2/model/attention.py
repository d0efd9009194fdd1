"""Causal self-attention with rotary positions and a key-value cache."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from umv2 import sharding
from umv2.config import ModelConfig
from umv2.model import layers
from umv2.model.parameter import Initializer
from umv2.types import struct

# Queries that meet all keys at once where a sequence is longer than this: scores of 32K positions
# with each other would fill a device.
_QUERY_CHUNK = 1024
_LONG = 4096
# Positions of a cache that are read at once on CPU. Medians of 7 runs on 2 cores, batch 32, 12
# heads of 64, a cache of 2,048, milliseconds where 2,048 and where 300 positions are filled:
#
#                      all at once      256         512        1024
#     float32              18, 18     41, 11      27, 6.4     19, 9.9
#     bfloat16           160, 160     20, 5.2     14, 3.8     12, 5.6
_CACHE_BLOCK = 1024


@struct
class KeyValueCache:
    """Keys and values of the positions seen so far, of one block.

    Heads stand before positions, so that the products of attention read both as they lie.
    """

    keys: Float[Array, "b g s q"]
    values: Float[Array, "b g s q"]


class Attention(nnx.Module):
    """Attention as in OLMoE (arXiv 2409.02060): RMSNorm on all heads at once, no biases.

    `num_key_value_heads` < `num_heads` gives grouped queries (arXiv 2305.13245), `window` > 0
    attention to the last positions alone (arXiv 2004.05150).
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
        """Attends to earlier positions.

        Args:
          x: normalised input.
          mask: True where a query may see a key, beside causality (packed documents).
          cache: keys and values of positions < `position`; x then continues them.
          position: position of x[:, 0], the same in all rows or one of each.
          prefill: the cache is empty and only written, from position 0 on.

        Returns:
          The projected output, and the cache with the positions of x written into it.
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
        """Attends with the heads of one device."""
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
            attended = self._attend_to_each_other(query, keys, values, mask)
        else:
            attended = _attend_to_cache(query, cache, positions, self.window)
        return attended.reshape(shape), cache

    def _attend_to_each_other(
        self,
        query: Float[Array, "b t h q"],
        keys: Float[Array, "b t g q"],
        values: Float[Array, "b t g q"],
        mask: Bool[Array, "b 1 t t"] | None,
    ) -> Float[Array, "b t h q"]:
        window = (self.window - 1, 0) if self.window else None
        length = query.shape[1]
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

            places = start + jnp.arange(_QUERY_CHUNK, dtype=jnp.int32)
            seen = _seen(places[None, :], jnp.arange(length)[None, :], self.window)[:, None]
            if mask is not None:
                seen = seen & chunk(mask, 2)
            return jax.nn.dot_product_attention(chunk(query, 1), keys, values, mask=seen)

        attended = lax.map(attend, jnp.arange(0, length, _QUERY_CHUNK, dtype=jnp.int32))
        return jnp.moveaxis(attended, 0, 1).reshape(query.shape)

    def _split(self, x: Float[Array, "b t e"]) -> Float[Array, "b t h q"]:
        return jnp.reshape(x, x.shape[:2] + (-1, self.head_dim))


def _seen(
    queries: Int[Array, "b t"], keys: Int[Array, "#b s"], window: int
) -> Bool[Array, "b t s"]:
    """Whether a query at one position sees a key at another."""
    distance = queries[:, :, None] - keys[:, None, :]
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def _write(
    cache: Float[Array, "b g s q"],
    new: Float[Array, "b t g q"],
    starts: Int[Array, " b"],
    *,
    prefill: bool,
) -> Float[Array, "b g s q"]:
    """Puts new entries at the positions from `starts` on."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    if prefill:
        return lax.dynamic_update_slice_in_dim(cache, new, 0, axis=2)
    # One scatter for all rows, in place where the cache is donated. A slice of each row, one after
    # another, takes as long, and 128 rows in 20 blocks half a minute to compile, not a second.
    return jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=1))(cache, new, starts)


def _attend_to_cache(
    query: Float[Array, "b t h q"],
    cache: KeyValueCache,
    positions: Int[Array, "b t"],
    window: int,
) -> Float[Array, "b t h q"]:
    """Attends to all positions of a cache that are filled, query positions included.

    Sums are in float32 (float64 for float64), whatever the cache is held in.
    """
    num_heads = cache.keys.shape[1]
    grouped = query.reshape(*query.shape[:2], num_heads, -1, query.shape[-1])
    # Queries that share a head of the cache form the rows of one product.
    rows = jnp.moveaxis(grouped, 1, 3).reshape(len(query), num_heads, -1, query.shape[-1])
    repeats = rows.shape[2] // query.shape[1]
    places = jnp.tile(positions, (1, repeats))
    dtype = layers.accumulation_dtype(query.dtype)
    rows = rows.astype(dtype) * query.shape[-1] ** -0.5
    attended = lax.platform_dependent(
        rows,
        cache.keys,
        cache.values,
        places,
        cpu=lambda *arrays: _attend_by_blocks(*arrays, window=window),
        default=lambda *arrays: _attend_at_once(*arrays, window=window),
    )
    attended = attended.reshape(*rows.shape[:2], repeats, *query.shape[1::2])
    return jnp.moveaxis(attended, 3, 1).reshape(query.shape).astype(query.dtype)


def _attend_at_once(
    query: Float[Array, "b g m q"],
    keys: Float[Array, "b g s q"],
    values: Float[Array, "b g s q"],
    places: Int[Array, "b m"],
    *,
    window: int,
) -> Float[Array, "b g m q"]:
    scores = jnp.einsum(
        "bgmq,bgsq->bgms",
        query.astype(keys.dtype),
        keys,
        preferred_element_type=query.dtype,
    )
    seen = _seen(places, jnp.arange(keys.shape[2])[None, :], window)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum(
        "bgms,bgsq->bgmq",
        weights.astype(values.dtype),
        values,
        preferred_element_type=query.dtype,
    )


def _attend_by_blocks(
    query: Float[Array, "b g m q"],
    keys: Float[Array, "b g s q"],
    values: Float[Array, "b g s q"],
    places: Int[Array, "b m"],
    *,
    window: int,
) -> Float[Array, "b g m q"]:
    """Visits the blocks of positions that a row sees, row by row, with a running softmax.

    Where a cache is short, as many rows go together as make a block.

    A block of keys and values is widened to the query's dtype while it lies in the cache of the
    processor: XLA's products of narrower types are slow there for so few queries.
    """
    num_rows, _, length, _ = keys.shape
    # As equal as can be: all of the last block is read.
    size = -(-length // -(-length // _CACHE_BLOCK))
    together = math.gcd(num_rows, 1 << (_CACHE_BLOCK // size).bit_length())

    def attend(row: Int[Array, ""]) -> Float[Array, "rows g m q"]:
        queries = lax.dynamic_slice_in_dim(query, row, together)
        at = lax.dynamic_slice_in_dim(places, row, together)

        def visit(block: Int[Array, ""] | int, carry: tuple[Array, Array, Array]) -> Any:
            greatest, total, summed = carry
            first = block * size
            start = jnp.minimum(first, length - size)  # the last block may begin earlier

            def read(cached: Array) -> Array:
                shape = (together, cached.shape[1], size, cached.shape[3])
                return lax.dynamic_slice(cached, (row, 0, start, 0), shape).astype(query.dtype)

            keys_at = start + jnp.arange(size, dtype=jnp.int32)
            seen = _seen(at, keys_at[None, :], window) & (keys_at >= first)[None, None, :]
            scores = jnp.einsum("rgmq,rgsq->rgms", queries, read(keys))
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
            greatest_now = jnp.maximum(greatest, scores.max(axis=-1, keepdims=True))
            # A query may see nothing of a block that another sees: its maximum is still -inf.
            reference = jnp.where(jnp.isfinite(greatest_now), greatest_now, 0)
            weights = jnp.exp(scores - reference)
            kept = jnp.exp(greatest - reference)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            summed = summed * kept + jnp.einsum("rgms,rgsq->rgmq", weights, read(values))
            return greatest_now, total, summed

        empty = jnp.zeros_like(queries[..., :1])
        start = (empty - jnp.inf, empty, jnp.zeros_like(queries))
        first = jnp.maximum(at.min() - window + 1, 0) // size if window else jnp.int32(0)
        _, total, summed = lax.fori_loop(first, at.max() // size + 1, visit, start)
        return summed / total

    attended = lax.map(attend, jnp.arange(0, num_rows, together, dtype=jnp.int32))
    return attended.reshape(query.shape)
