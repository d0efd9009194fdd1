"""The key-value cache of one block, and attention to its filled positions."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from umv2.model.attention.xla import visible
from umv2.types import accumulation_dtype, struct

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


def write(
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


def attend(
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
    dtype = accumulation_dtype(query.dtype)
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
    seen = visible(positions, jnp.arange(keys.shape[2])[None, :], window)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
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
            seen = visible(query_positions, key_positions[None, :], window)
            seen = seen & (key_positions >= first)[None, None, :]
            scores = jnp.einsum("rgmq,rgsq->rgms", queries, read(keys))
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
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
