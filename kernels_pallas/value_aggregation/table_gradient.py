"""Gradient of a table from the weights of its selections: sort once, then add neighbours."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.common import scan_chunks


def sort_selections(indices: Array) -> tuple[Array, Array]:
    """Ids in rising order, and their positions in the flattened indices; equal ids keep order."""
    flat = indices.reshape(-1)
    ids, order = lax.sort_key_val(flat, lax.iota(jnp.int32, flat.size))
    return ids, order


def table_gradient(
    table: Array,
    selections: tuple[Array, Array],
    weights: Float[Array, "num_tokens top_m num_cores"],
    factors: Float[Array, "num_tokens dim"],
    chunk_size: int,
) -> Array:
    """Sums weight x factor, the i-th slice of a factor having the i-th weight, by selected row."""
    _, top_m, num_cores = weights.shape
    weights = weights.reshape(-1, num_cores)
    factors = factors.astype(jnp.float32).reshape(factors.shape[0], num_cores, -1)

    def add(grad: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        ids, order = chunk
        rows = weights[order][:, :, None] * factors[order // top_m]
        rows = rows.reshape(ids.size, table.shape[1])
        sums = grad.at[ids].add(rows, mode="promise_in_bounds", indices_are_sorted=True)
        return sums, None

    grad, _ = scan_chunks(add, jnp.zeros_like(table, jnp.float32), selections, chunk_size * top_m)
    return grad.astype(table.dtype)
