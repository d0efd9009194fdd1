"""Causal attention for CPUs: blocks of queries against the keys that they may see.

`jax.nn.dot_product_attention` computes all t x t scores there, masks half of them, and transposes
them between products. Here heads are the batch of every product, in the layout that it reads and
writes, and a block of queries multiplies only the keys up to its end. Medians of 22 runs on 2
cores, forward and backward with the projections, float32, milliseconds:

    batch x length, heads x width    dot_product_attention   blocks of 256    128     64     32
    8 x 256, 4 x 32                                   25.5            16.0   14.4   12.2   14.0
    16 x 256, 4 x 48                                  77.3            60.6   60.6   56.7   67.0
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umv2.types import accumulation_dtype

_BLOCK = 64
_MAX_BLOCKS = 8  # each adds to the size of the program


def attend(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"] | None,
    window: int,
) -> Float[Array, "b t h q"]:
    """Attends to the positions up to each query's own, like `jax.nn.dot_product_attention`.

    Products and sums are in float32 (float64 for float64).

    Args:
      query: queries; `h` is a multiple of `g`, and consecutive heads share keys and values.
      keys: keys.
      values: values.
      segment_ids: positions attend only to positions with the same id; None: to all earlier ones.
      window: number of positions a query attends to, its own included; 0: all.
    """
    batch, length, num_heads, width = query.shape
    groups, wide = keys.shape[2], accumulation_dtype(query.dtype)
    grouped = query.astype(wide).reshape(batch, length, groups, num_heads // groups, width)
    pooled = _attend(
        jnp.transpose(grouped, (0, 2, 3, 1, 4)) * width**-0.5,
        jnp.swapaxes(keys.astype(wide), 1, 2),
        jnp.swapaxes(values.astype(wide), 1, 2),
        segment_ids,
        window,
    )
    return jnp.transpose(pooled, (0, 3, 1, 2, 4)).reshape(query.shape).astype(query.dtype)


class _Block(NamedTuple):
    """Queries [start, stop) and the keys [first, stop) that at least one of them may see."""

    first: int
    start: int
    stop: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.stop)


class _Forward(NamedTuple):
    """Results of one block: outputs, exp(scores - their maximum), and 1 / the sums of those."""

    pooled: Float[Array, "b g m rows q"]
    weights: Float[Array, "b g m rows s"]
    scale: Float[Array, "b g m rows 1"]


def _blocks(length: int, window: int) -> list[_Block]:
    size = max(_BLOCK, -(-length // _MAX_BLOCKS))
    starts = range(0, length, size)
    stops = [min(start + size, length) for start in starts]
    firsts = [max(0, start - window + 1) if window else 0 for start in starts]
    return [_Block(*block) for block in zip(firsts, starts, stops, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    query: Float[Array, "b g m t q"],
    keys: Float[Array, "b g t q"],
    values: Float[Array, "b g t q"],
    segment_ids: Int[Array, "b t"] | None,
    window: int,
) -> Float[Array, "b g m t q"]:
    """Attends with scaled queries; its gradient reuses the weights of the forward pass."""
    return _attend_forward(query, keys, values, segment_ids, window)[0]


def _attend_forward(
    query: Array, keys: Array, values: Array, segment_ids: Array | None, window: int
) -> tuple[Array, Any]:
    results = []
    for block in _blocks(query.shape[3], window):
        scores = jnp.einsum(
            "bgmtq,bgsq->bgmts", query[:, :, :, block.queries], keys[:, :, block.keys]
        )
        distance = np.arange(block.start, block.stop)[:, None] - np.arange(block.first, block.stop)
        visible = distance >= 0
        if window:
            visible &= distance < window
        seen = jnp.asarray(visible)[None, None, None]
        if segment_ids is not None:
            own, others = segment_ids[:, block.queries], segment_ids[:, block.keys]
            seen = seen & (own[:, :, None] == others[:, None, :])[:, None, None]
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        scale = 1 / weights.sum(axis=-1, keepdims=True)
        pooled = jnp.einsum("bgmts,bgsq->bgmtq", weights, values[:, :, block.keys]) * scale
        results.append(_Forward(pooled, weights, scale))
    pooled = jnp.concatenate([result.pooled for result in results], axis=3)
    return pooled, (query, keys, values, results)


def _attend_backward(window: int, residuals: Any, pooled_grad: Array) -> tuple[Any, ...]:
    query, keys, values, results = residuals
    query_grad = []
    keys_grad, values_grad = jnp.zeros_like(keys), jnp.zeros_like(values)
    for block, forward in zip(_blocks(query.shape[3], window), results, strict=True):
        grad = pooled_grad[:, :, :, block.queries] * forward.scale
        weights_grad = jnp.einsum("bgmtq,bgsq->bgmts", grad, values[:, :, block.keys])
        # The gradient of the softmax subtracts the mean of weights_grad under the weights.
        mean = (grad * forward.pooled).sum(axis=-1, keepdims=True)
        scores_grad = forward.weights * (weights_grad - mean)
        query_grad.append(jnp.einsum("bgmts,bgsq->bgmtq", scores_grad, keys[:, :, block.keys]))
        keys_grad = keys_grad.at[:, :, block.keys].add(
            jnp.einsum("bgmts,bgmtq->bgsq", scores_grad, query[:, :, :, block.queries])
        )
        values_grad = values_grad.at[:, :, block.keys].add(
            jnp.einsum("bgmts,bgmtq->bgsq", forward.weights, grad)
        )
    return jnp.concatenate(query_grad, axis=3), keys_grad, values_grad, None


_attend.defvjp(_attend_forward, _attend_backward)
