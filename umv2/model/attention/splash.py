"""Attention by JAX's splash attention kernels on TPUs, which keep no scores in memory.

Queries, keys and values are passed with positions along the lanes: heads are narrower than the 128
lanes of a tile, and would be padded there. The compiler then keeps that layout through the rotation
back to the projections.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umv2.model.attention.shapes import Shapes

RESIDUALS = "splash_attention"  # the outputs and normalizers, for rematerialization policies

_LANES = 128
_MULTIPLE = 16  # of the width of a head: rows of a tile of bfloat16
_DTYPES = ("bfloat16", "float32")
# Queries and keys of a block. A block with a masked corner is computed whole, so large blocks waste
# products; but the backward pass writes the gradient of the queries once for each block of keys.
_FORWARD_BLOCK = 1024
_BACKWARD_QUERIES, _BACKWARD_KEYS = 1024, 2048
_COMPUTED_KEYS = 512  # of a block of keys, at once


def unsupported_reason(shapes: Shapes) -> str | None:
    """Returns why splash attention does not support a call, or None."""
    if shapes.platform != "tpu":
        return f"runs on TPUs, not on {shapes.platform}"
    if str(shapes.dtype) not in _DTYPES:
        return f"takes {' or '.join(_DTYPES)}, not {shapes.dtype}"
    if shapes.length % _LANES:
        return f"takes lengths that are multiples of {_LANES}, not {shapes.length}"
    if shapes.head_dim % _MULTIPLE:
        return f"takes heads whose width is a multiple of {_MULTIPLE}, not {shapes.head_dim}"
    return None


def attend(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"] | None,
    shapes: Shapes,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h q"]:
    """Calls the kernels; see `implementations.attend`. Tests interpret them on a CPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    kernel = _kernel(query.shape[2], shapes.length, shapes.window, interpret)
    # In float32: the rounded scale would shift all scores by the same factor.
    query = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    mapped = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))
    heads_first = (jnp.swapaxes(array, 1, 2) for array in (query, keys, values))
    return jnp.swapaxes(mapped(*heads_first, segments), 1, 2)


def _kernel(num_heads: int, length: int, window: int, interpret: bool) -> Any:
    """Returns the kernel of one sequence; blocks that the mask hides are skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    block = functools.partial(_block, length)
    by_position = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=block(_FORWARD_BLOCK),
        block_kv=block(_FORWARD_BLOCK),
        block_kv_compute=block(_COMPUTED_KEYS),
        block_q_dkv=block(_BACKWARD_QUERIES),
        block_kv_dkv=block(_BACKWARD_KEYS),
        block_kv_dkv_compute=block(_COMPUTED_KEYS),
        use_fused_bwd_kernel=True,
        q_layout=by_position,
        k_layout=by_position,
        v_layout=by_position,
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def _block(length: int, limit: int) -> int:
    """Returns the largest multiple of the lanes that divides the length, up to a limit."""
    sizes = range(min(limit, length), 0, -_LANES)
    return next(size for size in sizes if length % size == 0)
