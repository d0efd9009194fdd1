"""Activations of pre-scores with their derivatives, in operations that Pallas lowers everywhere."""

import math

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.value_aggregation.reference import Activation


def activation_and_slope(x: Array, activation: Activation | None) -> tuple[Array, Array]:
    """The activation of pre-scores and its derivative."""
    match activation:
        case None:
            return x, jnp.ones_like(x)
        case "gelu":
            probability = (1 + lax.erf(x * math.sqrt(0.5))) / 2
            density = jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
            return x * probability, probability + x * density
        case "silu":
            sigmoid = 1 / (1 + jnp.exp(-x))
            return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
        case "relu":
            return jnp.maximum(x, 0), (x > 0).astype(jnp.float32)
