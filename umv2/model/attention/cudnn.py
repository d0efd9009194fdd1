"""Attention by cuDNN on GPUs, which keeps no scores in memory.

cuDNN masks the future and, with a window, the distant past. For packed documents the public
interface takes only a mask of [batch, 1, t, t] entries, so documents are told apart by further
features of queries and keys instead: the bits of a document's number and their complements, such
that the products of equal bits are zero and each different bit adds a large negative score. Scores
within a document keep their value exactly; the others become weights of exactly zero.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umv2.model.attention.shapes import Shapes

PRIMITIVES = ("dot_product_attention_fwd_wrapper",)  # JAX's, for rematerialization policies

_MULTIPLE = 8  # of the width of a head
# Added to the score of a key for each bit in which its document differs, after scaling: exp of it
# is 0 in float32, whatever the other scores are.
_PENALTY = 2.0**12


def unsupported_reason(shapes: Shapes) -> str | None:
    """Returns why cuDNN does not support a call, or None."""
    if shapes.platform != "gpu":
        return f"runs on GPUs, not on {shapes.platform}"
    if shapes.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {shapes.dtype}"
    capability = tuple(map(int, (shapes.compute_capability or "8.0").split(".")))
    if capability < (8, 0):
        return f"needs compute capability 8.0, not {shapes.compute_capability}"
    limit = 256 if capability >= (9, 0) else 128
    features = _document_features(shapes.length) if shapes.packed else 0
    if shapes.head_dim % _MULTIPLE or shapes.head_dim + features > limit:
        also = f" with {features} more for documents," if features else ""
        return (
            f"takes heads of a width that is a multiple of {_MULTIPLE} and,{also} at most {limit},"
            f" not {shapes.head_dim}"
        )
    return None


def attend(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"] | None,
    shapes: Shapes,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "b t h q"]:
    """Calls cuDNN; see `implementations.attend`. Tests name another implementation of JAX's."""
    window, width = shapes.window, query.shape[-1]
    scale: float = width**-0.5
    if segment_ids is not None:
        query, keys, values = _with_documents(query, keys, values, segment_ids, scale)
    attended = jax.nn.dot_product_attention(
        query,
        keys,
        values,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return attended[..., :width]


def _document_bits(length: int) -> int:
    return max(1, (length - 1).bit_length())


def _document_features(length: int) -> int:
    """Returns the features that tell documents apart, padded so that the width stays a multiple."""
    return -(-2 * _document_bits(length) // _MULTIPLE) * _MULTIPLE


def _with_documents(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"],
    scale: float,
) -> tuple[Float[Array, "b t h e"], Float[Array, "b t g e"], Float[Array, "b t g e"]]:
    """Appends the features of each position's document to queries and keys, and zeros to values."""
    length, features = query.shape[1], _document_features(query.shape[1])
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    number = jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    shifts = jnp.arange(_document_bits(length), dtype=jnp.int32)
    bits = (number[:, :, None] >> shifts[None, None, :]) & 1
    query_bits = jnp.concatenate([bits, 1 - bits], axis=-1)
    # A power of two, which is exact in bfloat16.
    penalty = 2.0 ** math.ceil(math.log2(_PENALTY / scale))
    key_bits = jnp.concatenate([1 - bits, bits], axis=-1) * -penalty

    def extended(array: Array, more: Array) -> Array:
        more = jnp.pad(more, ((0, 0), (0, 0), (0, features - more.shape[-1])))[:, :, None, :]
        more = jnp.broadcast_to(more, (*array.shape[:3], features)).astype(array.dtype)
        return jnp.concatenate([array, more], axis=-1)

    zeros = jnp.zeros((*segment_ids.shape, 0), query.dtype)
    return extended(query, query_bits), extended(keys, key_bits), extended(values, zeros)
