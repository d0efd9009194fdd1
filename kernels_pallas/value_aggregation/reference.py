"""Reference implementation of value aggregation: one unblocked expression, differentiated by JAX.

It materializes the [T, K, D_v] rows of all tokens, so it is only for tests and for reading.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype

Activation = Literal["gelu", "silu", "relu"]


def value_aggregation_reference(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens num_selected"],
    scores: Float[Array, "num_tokens num_selected num_cores"],
    *,
    pre_values: Float[Array, "num_values pre_value_dim"] | None = None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None = None,
    activation: Activation | None = None,
    slots: Int32[Array, "num_tokens num_selected"] | None = None,
    num_slots: int = 1,
) -> Float[Array, "num_tokens {num_slots}*value_dim"]:
    """Defines the semantics of `value_aggregation`; arguments, result and dtype are the same."""
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)
    weights = scores.astype(dtype)
    if pre_values is not None and pre_inputs is not None:
        pre_scores = jnp.sum(
            pre_values[indices].astype(dtype) * pre_inputs.astype(dtype)[:, None, :], axis=-1
        )
        weights *= _activate(pre_scores, activation)[:, :, None]

    slice_dim = values.shape[-1] // scores.shape[-1]
    weighted_rows = jnp.repeat(weights, slice_dim, axis=-1) * values[indices].astype(dtype)
    if slots is None:
        return weighted_rows.sum(axis=1)
    per_slot = [
        jnp.where((slots == slot)[:, :, None], weighted_rows, 0).sum(axis=1)
        for slot in range(num_slots)
    ]
    return jnp.concatenate(per_slot, axis=-1)


def _activate(x: Array, activation: Activation | None) -> Array:
    match activation:
        case None:
            return x
        case "gelu":
            return x * (1 + jax.scipy.special.erf(x / 2**0.5)) / 2
        case "silu":
            return x / (1 + jnp.exp(-x))
        case "relu":
            return jnp.where(x > 0, x, 0)
