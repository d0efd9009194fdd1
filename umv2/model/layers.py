"""Dense building blocks: linear map, RMSNorm, SwiGLU, rotary embedding, and initialisation.

Parameters are float32; matrix products use the dtype of their input. Norms and rotations are
computed in float32 (float64 for float64 inputs), whatever the dtype of their input. Every linear
map, embeddings included, is initialised from a normal distribution with variance 2 / (5 h); the
output projections of residual branches are further scaled by 1 / sqrt(2 L) (UltraMemV2, arXiv
2508.18756, section 3.5).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2 import sharding
from umv2.model.parameter import Initializer
from umv2.types import accumulation_dtype

_FEW_ROWS = 8


def linear_std(hidden_size: int) -> float:
    """Returns the initial standard deviation of linear maps, sqrt(2 / (5 h))."""
    return math.sqrt(2 / (5 * hidden_size))


def residual_scale(num_layers: int) -> float:
    """Returns 1 / sqrt(2 L), the initial scale of the output projections of attention and FFN."""
    return 1 / math.sqrt(2 * num_layers)


def linear(
    x: Float[Array, "*b i"], weight: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    """Returns x @ weight (+ bias) in the dtype of x, accumulating in float32, gradients too."""
    y = with_enough_rows(sharding.linear, x, weight)
    if bias is None:
        return y
    # In float32, since the gradient of the bias is a sum over all tokens.
    return (y.astype(accumulation_dtype(x.dtype)) + _with_rank(bias, y.ndim)).astype(x.dtype)


def logits(x: Float[Array, "*b d"], head: Float[Array, "vocab d"]) -> Float[Array, "*b vocab"]:
    """Returns the inner products of x with the rows of the head, a matrix of the same dtype.

    Accumulates and returns float32 (float64 for float64).
    """
    dtype = accumulation_dtype(x.dtype)

    def product(x: Array, head: Array) -> Array:
        return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=dtype)

    return with_enough_rows(product, x, head)


def with_enough_rows(
    product: Callable[[Array, Array], Array], x: Float[Array, "*b i"], weight: Float[Array, "j k"]
) -> Float[Array, "*b o"]:
    """Returns product(x, weight), padding the rows of small bfloat16 inputs on CPU.

    There XLA's product with a 768 x 4992 matrix takes 5.6 ms for one row and 0.65 ms for eight: it
    uses the processor's bfloat16 matrix instructions only from a minimum number of rows.
    """
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.bfloat16 or rows >= _FEW_ROWS or sharding.on_mesh():
        return product(x, weight)

    def padded(x: Array, weight: Array) -> Array:
        flat = jnp.pad(x.reshape(1, rows, -1), ((0, 0), (0, _FEW_ROWS - rows), (0, 0)))
        return product(flat, weight)[0, :rows].reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, weight, cpu=padded, default=product)


def rms_norm(
    x: Float[Array, "*b d"], weight: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """Returns weight * x / sqrt(mean(x^2) + epsilon) over the last axis, in the dtype of x."""
    wide = x.astype(accumulation_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale * _with_rank(weight, x.ndim)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b d"], weight: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """Returns weight * (x - mean) / sqrt(variance + epsilon) + bias over the last axis."""
    wide = x.astype(accumulation_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    normalised = centred * scale * _with_rank(weight, x.ndim) + _with_rank(bias, x.ndim)
    return normalised.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), pairing the two halves of each head.

    Attributes:
      theta: base; the slowest pair makes one turn in about 2 pi theta positions.
      scaling: how to extend the context to `scale` times the training length. linear: divides
        positions by `scale` (arXiv 2306.15595); ntk: increases theta so that the slowest pair turns
        `scale` times slower and the fastest as before (arXiv 2309.00071, section 3.1).
      scale: context extension factor; 1 with scaling "none".
    """

    theta: float
    scaling: Literal["none", "linear", "ntk"] = "none"
    scale: float = 1.0

    def frequencies(self, half: int) -> np.ndarray:
        """Returns the rotation of each of `half` pairs per position, in radians."""
        theta = self.theta
        if self.scaling == "ntk" and half > 1:
            theta *= self.scale ** (half / (half - 1))
        frequencies = theta ** (-np.arange(half) / half)
        return frequencies / self.scale if self.scaling == "linear" else frequencies

    def rotate(
        self, x: Float[Array, "b t h q"], positions: Int[Array, "#b t"]
    ) -> Float[Array, "b t h q"]:
        """Rotates the pairs of every head by the angles of their positions."""
        return _rotate(self, x, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(
    rope: Rope, x: Float[Array, "b t h q"], positions: Int[Array, "#b t"]
) -> Float[Array, "b t h q"]:
    """Rotates pairs; its VJP rotates them back.

    JAX would differentiate the slices that pairs are read from, and keep float32 gradients of them.
    """
    return _rotate_by(rope, x, positions, 1)


def _rotate_by(rope: Rope, x: Array, positions: Array, direction: int) -> Array:
    dtype, half = accumulation_dtype(x.dtype), x.shape[-1] // 2
    frequencies = jnp.asarray(rope.frequencies(half), dtype)
    angles = positions[:, :, None].astype(dtype) * frequencies[None, None, :]
    cosine, sine = (f(angles)[:, :, None, None, :] for f in (jnp.cos, jnp.sin))
    signs = jnp.asarray([[-direction], [direction]], dtype)
    pairs = x.reshape(*x.shape[:-1], 2, half)
    others = jnp.flip(pairs, axis=-2)
    # Without slices and concatenation, this is a single loop over the elements.
    rotated = pairs.astype(dtype) * cosine + others.astype(dtype) * (sine * signs[None, None, None])
    return rotated.reshape(x.shape).astype(x.dtype)


def _rotate_fwd(rope: Rope, x: Array, positions: Array) -> tuple[Array, Array]:
    return _rotate(rope, x, positions), positions


def _rotate_bwd(rope: Rope, positions: Array, rotated_grad: Array) -> tuple[Array, None]:
    return _rotate_by(rope, rotated_grad, positions, -1), None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned weight (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, *, init: Initializer):
        self.weight = init.constant(size, 1.0)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis."""
        return rms_norm(x, self.weight[...], self.epsilon)


class SwiGLU(nnx.Module):
    """Gated feed-forward network: W_down (silu(W_gate x) * W_up x) (arXiv 2002.05202)."""

    def __init__(self, size: int, inner: int, *, std: float, down_std: float, init: Initializer):
        into: Any = {"axes": ("hidden", "ffn"), "group": "matrices"}
        out: Any = {"axes": ("ffn", "hidden"), "group": "matrices"}
        self.gate = init.normal("gate", (size, inner), std=std, **into)
        self.up = init.normal("up", (size, inner), std=std, **into)
        self.down = init.normal("down", (inner, size), std=down_std, **out)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the output in the dtype of x."""
        inner = jax.nn.silu(linear(x, self.gate[...])) * linear(x, self.up[...])
        return linear(inner, self.down[...])


def _with_rank(vector: Float[Array, " d"], rank: int) -> Float[Array, "*b d"]:
    """Adds leading axes of size 1, since implicit rank promotion would hide shape errors."""
    return jnp.expand_dims(vector, tuple(range(rank - 1)))
