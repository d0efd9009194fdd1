"""Attention in plain XLA: the reference, for every platform, length and dtype.

On a CPU, sequences that are not long are read in blocks (`cpu.py`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from umv2.model.attention import cpu
from umv2.model.attention.shapes import Shapes

# Sequences longer than `_LONG` are processed in chunks of `_QUERY_CHUNK` queries: the full score
# matrix of 32K positions would not fit in device memory.
_QUERY_CHUNK = 1024
_LONG = 4096


def unsupported_reason(shapes: Shapes) -> str | None:
    """Returns None: every call is supported."""
    del shapes
    return None


def attend(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"] | None,
    shapes: Shapes,
) -> Float[Array, "b t h q"]:
    """Computes all scores of a query at once; see `implementations.attend`."""
    window, length = shapes.window, query.shape[1]
    if length <= _LONG and shapes.platform == "cpu":
        return cpu.attend(query, keys, values, segment_ids, window)
    if length <= _LONG or length % _QUERY_CHUNK:
        return jax.nn.dot_product_attention(
            query,
            keys,
            values,
            mask=None if segment_ids is None else _same_segment(segment_ids, segment_ids),
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
        )

    @jax.checkpoint
    def attend_chunk(start: Int[Array, ""]) -> Float[Array, "b chunk h q"]:
        def chunk(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, _QUERY_CHUNK, 1)

        positions = start + jnp.arange(_QUERY_CHUNK, dtype=jnp.int32)
        seen = visible(positions[None, :], jnp.arange(length)[None, :], window)[:, None]
        if segment_ids is not None:
            seen = seen & _same_segment(chunk(segment_ids), segment_ids)
        return jax.nn.dot_product_attention(chunk(query), keys, values, mask=seen)

    attended = lax.map(attend_chunk, jnp.arange(0, length, _QUERY_CHUNK, dtype=jnp.int32))
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


def visible(
    queries: Int[Array, "b t"], keys: Int[Array, "#b s"], window: int
) -> Bool[Array, "b t s"]:
    """Returns the causal (and sliding-window) mask for the given query and key positions."""
    distance = queries[:, :, None] - keys[:, None, :]
    causal = distance >= 0
    return causal & (distance < window) if window else causal


def _same_segment(queries: Int[Array, "b t"], keys: Int[Array, "b s"]) -> Bool[Array, "b 1 t s"]:
    return queries[:, None, :, None] == keys[:, None, None, :]
