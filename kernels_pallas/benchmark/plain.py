"""Naive implementations of the operators: no chunks, no custom derivatives.

They are the baseline of the benchmark. They may materialize all intermediate results, [T, K, D]
rows or [T, s * s] grids, and JAX derives their gradients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.value_aggregation.reference import Activation

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def value_aggregation(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None = None,
    pre_inputs: Array | None = None,
    slots: Array | None = None,
    activation: Activation | None = None,
    num_slots: int = 1,
) -> Array:
    """A gather and an einsum for each table."""
    weights = scores
    if pre_values is not None:
        pre_scores = jnp.einsum("tkp,tp->tk", pre_values[indices].astype(jnp.float32), pre_inputs)
        if activation is not None:
            pre_scores = _ACTIVATIONS[activation](pre_scores)
        weights = scores * pre_scores[:, :, None]
    rows = values[indices].astype(jnp.float32)
    rows = rows.reshape(*indices.shape, scores.shape[2], -1)
    if slots is None:
        output = jnp.einsum("tkc,tkcd->tcd", weights, rows)
    else:
        one_hot = jax.nn.one_hot(slots, num_slots, dtype=weights.dtype)
        output = jnp.einsum("tkc,tks,tkcd->tscd", weights, one_hot, rows)
    return output.reshape(indices.shape[0], -1)


def product_key_top_k(
    query: Array,
    keys: Array,
    u: Array | None,
    v: Array | None,
    cores: Array | None,
    top_m: int,
    shortlist: int,
) -> tuple[Array, Array]:
    """A product with all keys, `lax.top_k` on each side, then `lax.top_k` on the grid of pairs."""
    num_heads, _, rank, num_keys, _ = keys.shape
    query = jnp.broadcast_to(query, (num_heads, 2, rank, *query.shape[3:]))
    products = jnp.einsum("hsrtq,hsrnq->shtrn", query, keys, preferred_element_type=jnp.float32)
    sides: list[tuple[Array, Array]] = []
    for by_key, weights in zip(products, (u, v), strict=True):
        ranking = (
            by_key[:, :, 0] if weights is None else jnp.einsum("htrn,hr->htn", by_key, weights)
        )
        best = lax.top_k(lax.stop_gradient(ranking), shortlist)[1]
        sides.append((best, jnp.take_along_axis(by_key, best[:, :, None], axis=-1)))
    (rows, row_scores), (columns, column_scores) = sides

    if cores is None:
        grid = row_scores[:, :, 0, :, None] + column_scores[:, :, 0, None, :]
    else:
        rank_scores = jnp.einsum("htai,hab->htbi", row_scores, cores.sum(axis=0))
        # A sum of products: with so few ranks, a matrix product takes much longer.
        grid = jnp.sum(rank_scores[..., :, None] * column_scores[..., None, :], axis=2)
    pairs = lax.top_k(lax.stop_gradient(grid).reshape(*grid.shape[:2], -1), top_m)[1]
    i, j = pairs // shortlist, pairs % shortlist
    addresses = jnp.take_along_axis(rows, i, axis=-1) * num_keys
    addresses += jnp.take_along_axis(columns, j, axis=-1)
    row_scores = jnp.take_along_axis(row_scores, i[:, :, None], axis=-1)
    column_scores = jnp.take_along_axis(column_scores, j[:, :, None], axis=-1)
    if cores is None:
        scores = jnp.moveaxis(row_scores + column_scores, 2, 3)
    else:
        scores = jnp.einsum("htak,chab,htbk->htkc", row_scores, cores, column_scores)
    num_tokens = scores.shape[1]
    scores = jnp.moveaxis(scores, 0, 1).reshape(num_tokens, num_heads * top_m, -1)
    return scores, jnp.moveaxis(addresses, 0, 1).reshape(num_tokens, num_heads * top_m)
