"""Activations of pre-scores, for XLA and in operations that Pallas lowers on every platform."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.common import check
from kernels_pallas.value_aggregation.reference import Activation

# exp(x^2 / 2) * P(normal < -x) for 0 <= x < 15 is t * polynomial(t), t = 1 / (1 + _TAIL_SCALE * x).
# Fitted by iteratively reweighted least squares to equalize the relative error: 3.2e-8. Evaluated
# in float32, the normal distribution function is within 1.9e-7.
_TAIL_SCALE = 0.35
_TAIL_COEFFICIENTS = (
    0.139621254,
    0.139864416,
    0.119814837,
    0.105577697,
    -0.0232712618,
    0.159404438,
    -0.255912511,
    0.144066187,
    -0.0291650732,
)


def activate(x: Array, activation: Activation | None) -> Array:
    """Applies the activation to pre-scores, to full precision; "gelu" is exact (erf).

    Raises:
        ValueError: there is no activation of that name.
    """
    check_activation(activation)
    match activation:
        case None:
            return x
        case "gelu":
            return _gelu(x)
        case "silu":
            return jax.nn.silu(x)
        case "relu":
            return jax.nn.relu(x)


def check_activation(activation: Any) -> None:
    """Checks the name of an activation.

    Raises:
        ValueError: there is no activation of that name.
    """
    known = (None, *get_args(Activation))
    check(activation in known, "activation", repr(activation), f"one of {known}")


def activation_and_slope(x: Array, activation: Activation | None) -> tuple[Array, Array]:
    """The activation of pre-scores and its derivative, to about float32 precision."""
    match activation:
        case None:
            return x, jnp.ones_like(x)
        case "gelu":
            probability, density = _normal(x)
            return x * probability, probability + x * density
        case "silu":
            sigmoid = 1 / (1 + jnp.exp(-x))
            return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
        case "relu":
            return jnp.maximum(x, 0), (x > 0).astype(jnp.float32)


def _normal(x: Array) -> tuple[Array, Array]:
    """CDF and density of the standard normal distribution, without erf: Mosaic GPU has none."""
    bell = jnp.exp(-x * x / 2)
    t = 1 / (1 + _TAIL_SCALE * jnp.abs(x))
    polynomial = jnp.full_like(x, _TAIL_COEFFICIENTS[-1])
    for coefficient in reversed(_TAIL_COEFFICIENTS[:-1]):
        polynomial = polynomial * t + coefficient
    tail = bell * t * polynomial
    return jnp.where(x < 0, tail, 1 - tail), bell / math.sqrt(2 * math.pi)


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The derivative Phi(x) + x phi(x), written out: that of erf fails in shard_map in jax 0.12."""
    (x,), (tangent,) = primals, tangents
    density = jnp.exp(-jnp.square(x) / 2) / math.sqrt(2 * math.pi)
    slope = jax.lax.erfc(-x * math.sqrt(0.5)) / 2 + x * density
    return _gelu(x), tangent * slope
