"""Gradients of tables from the selections in order of their ids: sort once, then add neighbours.

A selection contributes weight x factor to the row of its id, the i-th slice of a factor having the
i-th weight. Factors are rows of the output's gradient or of the pre-inputs, one for each token (and
slot); neither the [T*K, D] contributions nor, where a gradient is row-sparse, [N, D] are formed.

What sorting is worth on CPU, where the dense gradient of "xla" does without: the whole backward
pass in milliseconds, medians of 13 interleaved runs on 2 cores shared with other jobs, float32,
T = 2048, K = 32, 129,600 rows, uniform ids (51,000 different ones):

    D_p + D_v                            192 + 192    0 + 384
    dense, scattered as they come              496        309
    dense, scattered in order of ids           495        262
    row-sparse                                 366        175
    row-sparse, then one write a row           740        372

So sorting gains a dense gradient nothing certain, and one write a row loses it a fifth to a half.
Row-sparse, a gradient takes 0.74 and 0.57 of the time of a dense one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import scan_chunks, vary_alike


class Selections(NamedTuple):
    """Selections in rising order of their ids; those of equal ids keep the order of tokens.

    Attributes:
        ids: of the selected rows, rising.
        order: where each selection stands in the flattened [T, K] arrays.
        rows: how many different smaller ids there are: the row of an id in a row-sparse gradient.
    """

    ids: Int32[Array, "num_selections"]
    order: Int32[Array, "num_selections"]
    rows: Int32[Array, "num_selections"]


class RowGradients(NamedTuple):
    """Gradients of the arguments of `value_aggregation`, those of the tables row by row.

    Rows r < num_rows are the gradients of row ids[r] of the tables; all other rows of the tables
    have none. The rest of `ids` is num_values, out of bounds, and of `values` and `pre_values` zero
    so that `table.at[ids].add(values, mode="drop")` needs no mask. num_rows > len(ids) tells that
    max_rows was too small: then the rows of the largest ids are missing.
    """

    ids: Int32[Array, "max_rows"]
    num_rows: Int32[Array, ""]
    values: Float[Array, "max_rows value_dim"]
    pre_values: Float[Array, "max_rows pre_value_dim"] | None
    scores: Float[Array, "num_tokens top_m num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None


class Term(NamedTuple):
    """What the gradient of a table is made of: a selection adds weight x factor to its row."""

    weights: Float[Array, "num_tokens top_m num_cores"]
    factors: Float[Array, "num_tokens dim"]


def sort_selections(indices: Int32[Array, "num_tokens top_m"]) -> Selections:
    """Sorts the selections of all tokens by id."""
    flat = indices.reshape(-1)
    ids, order = lax.sort_key_val(flat, lax.iota(jnp.int32, flat.size))
    return Selections(ids, order, number_ids(ids))


def number_ids(ids: Int32[Array, "num_selections"]) -> Int32[Array, "num_selections"]:
    """How many different smaller ids there are, for each of the sorted ids."""
    return jnp.cumsum(_starts(ids), dtype=jnp.int32) - 1


def unique_ids(
    ids: Int32[Array, "num_selections"], num_values: int, max_rows: int
) -> tuple[Int32[Array, "{max_rows}"], Int32[Array, ""]]:
    """The `max_rows` smallest different ids, `num_values` where there are fewer; how many exist."""
    starts = _starts(ids)
    # A sort rather than a scatter, which accelerators take an element at a time.
    unique = jnp.sort(jnp.where(starts, ids, num_values), stable=False)[:max_rows]
    padding = jnp.full(max_rows - unique.size, num_values, jnp.int32)
    return jnp.concatenate([unique, padding]), jnp.sum(starts, dtype=jnp.int32)


def _starts(ids: Array) -> Array:
    """Which of the sorted ids are the first of their kind."""
    return jnp.concatenate([jnp.ones_like(ids[:1], bool), ids[1:] != ids[:-1]])


def factor_rows(
    order: Int32[Array, "num_selections"],
    slots: Int32[Array, "num_tokens top_m"] | None,
    top_m: int,
    num_slots: int,
) -> Int32[Array, "num_selections"]:
    """The row of the factors, [T * num_slots, D], that each selection multiplies."""
    tokens = order // top_m
    return tokens if slots is None else tokens * num_slots + slots.reshape(-1)[order]


def sum_by_row(
    rows: Int32[Array, "num_selections"],
    order: Int32[Array, "num_selections"],
    weights: Float[Array, "num_tokens top_m num_cores"],
    factors: Float[Array, "num_factors dim"],
    slots: Int32[Array, "num_tokens top_m"] | None,
    num_rows: int,
    chunk_size: int,
) -> Float[Array, "{num_rows} dim"]:
    """Sums weight x factor by row, in plain XLA, in the dtype of the weights.

    Rows are contiguous where they are numbered without gaps, so that each chunk adds to a window of
    the result that it shares with its neighbours alone.

    Args:
        rows: where each selection adds, rising: the ids for a dense gradient, `Selections.rows` for
            a row-sparse one. Selections of rows from `num_rows` on are left out.
        order: which selection that is.
        weights: of the selections, not sorted.
        factors: with slots, those of the slots of a token lie one after the other.
        slots: of the selections, not sorted.
        num_rows: rows of the result.
        chunk_size: how many selections are taken at a time.
    """
    num_tokens, top_m, num_cores = weights.shape
    weights = weights.reshape(-1, num_cores)
    dim, num_slots = factors.shape[1], factors.shape[0] // max(1, num_tokens)
    factors = factors.astype(weights.dtype).reshape(-1, num_cores, dim // num_cores)

    def add(sums: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        rows, order = chunk
        factor = factors[factor_rows(order, slots, top_m, num_slots)]
        products = (weights[order][:, :, None] * factor).reshape(-1, dim)
        return sums.at[rows].add(products, mode="drop", indices_are_sorted=True), None

    zeros = vary_alike(jnp.zeros((num_rows, dim), weights.dtype), (rows, weights, factors))
    return scan_chunks(add, zeros, (rows, order), chunk_size)[0]
