"""Reference implementation of the gradient of a table: one scatter-add of all products.

It materializes the [T, K, D] products of all tokens, so it is only for tests and for reading.
"""

import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype


def table_gradient_reference(
    indices: Int32[Array, "num_tokens num_selected"],
    weights: Float[Array, "num_tokens num_selected num_cores"],
    factors: Float[Array, "num_tokens dim"],
    *,
    num_values: int,
) -> Float[Array, "{num_values} dim"]:
    """Defines the semantics of `table_gradient`; the result has the accumulation dtype."""
    dtype = accumulation_dtype(weights, factors)
    by_column = jnp.repeat(weights, factors.shape[1] // weights.shape[2], axis=2).astype(dtype)
    products = by_column * factors.astype(dtype)[:, None, :]
    return jnp.zeros((num_values, factors.shape[1]), dtype).at[indices].add(products)
