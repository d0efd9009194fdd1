"""Gradients of tables in plain XLA operations, for every platform.

The dense gradient is a scatter-add in chunks of tokens, in token order; the row-sparse one is
summed from selections sorted by id.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import match_vma, scan_chunks
from kernels_pallas.table_gradient.call import TableGradientCall, TableRows
from kernels_pallas.table_gradient.selections import factor_rows, sort_selections, unique_ids


def unsupported_reason(call: TableGradientCall, platform: str) -> str | None:
    """Returns None: this implementation supports every call."""
    del call, platform
    return None


@jax.named_scope("table_gradient")
def forward(call: TableGradientCall) -> Float[Array, "num_values dim"]:
    """Computes the dense gradient, `chunk_size` tokens at a time."""
    dtype, dim = call.accumulation_dtype, call.factors.shape[1]
    num_cores = call.weights.shape[2]

    def accumulate(gradient: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        indices, weights, factors = chunk
        by_core = factors.astype(dtype).reshape(-1, 1, num_cores, dim // num_cores)
        products = weights.astype(dtype)[..., None] * by_core
        return scatter_add_rows(gradient, indices, products.reshape(*indices.shape, dim)), None

    per_token = (call.indices, call.weights, call.factors)
    zeros = match_vma(jnp.zeros((call.num_values, dim), dtype), per_token)
    gradient = scan_chunks(accumulate, zeros, per_token, call.chunk_size)[0]
    return gradient.astype(call.dtype)


def rows(call: TableGradientCall, max_rows: int) -> TableRows:
    """Computes the row-sparse gradient."""
    selections = sort_selections(call.indices)
    ids, num_rows = unique_ids(selections.ids, call.num_values, max_rows)
    weights = call.weights.astype(call.accumulation_dtype)
    factors = call.factors.astype(call.accumulation_dtype)
    chunk = call.chunk_size * call.indices.shape[1]
    sums = sum_by_row(selections.rows, selections.order, weights, factors, None, max_rows, chunk)
    return TableRows(ids, num_rows, sums)


@jax.named_scope("table_gradient")
def scatter_add_rows(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens num_selected"],
    rows: Float[Array, "num_tokens num_selected dim"],
) -> Float[Array, "num_values dim"]:
    """Scatter-adds rows to a table, in place where XLA can."""
    return table.at[indices].add(rows, mode="promise_in_bounds", wrap_negative_indices=False)


@jax.named_scope("table_gradient")
def sum_by_row(
    rows: Int32[Array, "num_selections"],
    order: Int32[Array, "num_selections"],
    weights: Float[Array, "num_tokens num_selected num_cores"],
    factors: Float[Array, "num_factors dim"],
    slots: Int32[Array, "num_tokens num_selected"] | None,
    num_rows: int,
    chunk_size: int,
) -> Float[Array, "{num_rows} dim"]:
    """Sums weight x factor by row, in plain XLA, in the dtype of the weights.

    If rows are numbered without gaps, each chunk of selections writes a contiguous window of the
    result, which only overlaps the windows of its neighbours.

    Args:
        rows: the row of the result to which each selection adds, ascending: ids for a dense
            gradient, `Selections.rows` for a row-sparse one. Rows >= `num_rows` are dropped.
        order: index of each selection in the flattened weights.
        weights: of the selections, not sorted.
        factors: one row per token; with slots, one row per token and slot, slot-minor.
        slots: of the selections, not sorted.
        num_rows: rows of the result.
        chunk_size: number of selections to process at once.
    """
    num_tokens, num_selected, num_cores = weights.shape
    weights = weights.reshape(-1, num_cores)
    dim, num_slots = factors.shape[1], factors.shape[0] // max(1, num_tokens)
    factors = factors.astype(weights.dtype).reshape(-1, num_cores, dim // num_cores)

    def add(sums: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        rows, order = chunk
        factor = factors[factor_rows(order, slots, num_selected, num_slots)]
        products = (weights[order][:, :, None] * factor).reshape(-1, dim)
        return sums.at[rows].add(products, mode="drop", indices_are_sorted=True), None

    zeros = match_vma(jnp.zeros((num_rows, dim), weights.dtype), (rows, weights, factors))
    return scan_chunks(add, zeros, (rows, order), chunk_size)[0]
