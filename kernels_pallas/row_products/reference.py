"""Reference implementation of row products: one unblocked expression, differentiated by JAX.

It materializes the [T, K, D] rows of all tokens, so it is only for tests and for reading.
"""

import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype


def row_products_reference(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens num_selected"],
    inputs: Float[Array, "num_tokens dim"],
) -> Float[Array, "num_tokens num_selected"]:
    """Defines the semantics of `row_products`; arguments, result and dtype are the same."""
    dtype = accumulation_dtype(table, inputs)
    return jnp.sum(table[indices].astype(dtype) * inputs.astype(dtype)[:, None, :], axis=-1)
