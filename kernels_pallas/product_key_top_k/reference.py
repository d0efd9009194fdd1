"""Reference implementation of product-key top-k: full grids, differentiated by JAX.

It materializes the [T, n] scores and [T, s * s] grids of all tokens, so it is only for tests and
for reading.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype


def product_key_top_k_reference(
    query: Float[Array, "query_heads 2 query_ranks num_tokens key_dim"],
    keys: Float[Array, "num_heads 2 rank num_keys key_dim"],
    u: Float[Array, "num_heads rank"] | None,
    v: Float[Array, "num_heads rank"] | None,
    cores: Float[Array, "num_cores num_heads rank rank"] | None,
    *,
    top_m: int,
    shortlist: int,
) -> tuple[
    Float[Array, "num_tokens num_heads*{top_m} cores"], Int32[Array, "num_tokens num_heads*{top_m}"]
]:
    """Defines the semantics of `product_key_top_k`; arguments, result and dtype are the same."""
    num_heads, _, rank, num_keys, _ = keys.shape
    num_tokens = query.shape[3]
    dtype = accumulation_dtype(query, keys)
    query = jnp.broadcast_to(query, (num_heads, 2, rank, *query.shape[3:])).astype(dtype)
    by_key = jnp.einsum(
        "hsrtq,hsrnq->hstnr", query, keys.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )

    scores, addresses = [], []
    for head in range(num_heads):
        row_scores, column_scores = by_key[head]
        row_weights = jnp.ones(1, dtype) if u is None else u[head]
        column_weights = jnp.ones(1, dtype) if v is None else v[head]
        rows = _best((row_scores * row_weights[None, None]).sum(axis=-1), shortlist)
        columns = _best((column_scores * column_weights[None, None]).sum(axis=-1), shortlist)

        row_scores = jnp.take_along_axis(row_scores, rows[..., None], axis=1)[:, :, None]
        column_scores = jnp.take_along_axis(column_scores, columns[..., None], axis=1)[:, None]
        if cores is None:
            grid = row_scores + column_scores
        else:
            products = row_scores[..., None, :, None] * column_scores[..., None, None, :]
            grid = jnp.sum(products * cores[None, None, None, :, head], axis=(-1, -2))
        grid = grid.reshape(num_tokens, shortlist**2, -1)
        pairs = _best(grid.sum(axis=-1), top_m)
        scores.append(jnp.take_along_axis(grid, pairs[..., None], axis=1))
        row = jnp.take_along_axis(rows, pairs // shortlist, axis=1)
        column = jnp.take_along_axis(columns, pairs % shortlist, axis=1)
        addresses.append(row * num_keys + column)
    return jnp.concatenate(scores, axis=1), jnp.concatenate(addresses, axis=1)


def _best(scores: Float[Array, "t n"], k: int) -> Int32[Array, "t k"]:
    """The indices of the k best, best first: NaN before all numbers, ties to the lower index."""
    # lax.top_k also orders by the sign bit: it would put -0 after 0, and a negative NaN last.
    scores = jnp.where(scores == 0, 0, scores)
    scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
