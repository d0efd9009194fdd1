"""What the gradient of a table means: one scatter of all products.

It holds the [T, K, D] products of all tokens at once, so it is for tests and reading only.
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
    """Defines `table_gradient`, in the accumulation dtype."""
    dtype = accumulation_dtype(weights, factors)
    by_column = jnp.repeat(weights, factors.shape[1] // weights.shape[2], axis=2).astype(dtype)
    products = by_column * factors.astype(dtype)[:, None, :]
    return jnp.zeros((num_values, factors.shape[1]), dtype).at[indices].add(products)
