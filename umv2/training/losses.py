"""The cross-entropy loss. Auxiliary losses are defined by the layers (`Transformer.losses`).

The logits of a microbatch would be its largest array by far. They are computed for a chunk of
tokens at a time and reduced at once, and so is their gradient: the forward pass also computes the
gradients of the hidden states and the head, which the backward pass scales ("fused linear cross
entropy", as in arXiv 2410.10989). Thus each logit is computed once: three products with the head
per step, where recomputing logits in the backward pass would take a fourth.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from umv2 import kernels, sharding
from umv2.model import layers
from umv2.types import accumulation_dtype

# Of one chunk on one device. Every chunk reads and writes the head's gradient once: for 50304 ids
# and 2048 columns, a chunk of 2048 tokens moves half as many bytes for it as for its logits.
MAX_LOGITS_BYTES = 2**29


def cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "vocab d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns weighted sums over tokens: the loss, and the cross entropy in nats.

    The loss of a token is its cross entropy plus the z-loss, `z_loss` times the square of its
    log-partition, the logsumexp of its logits (arXiv 2204.02311). Only the loss has a gradient, and
    only with respect to `hidden` and `head`.

    Products are in the dtype of `hidden`. Sums, logits and the head's gradient are in float32
    (float64 for float64). The head is gathered once, and its gradient is reduced once.

    Args:
      hidden: input of the head.
      head: parameter whose rows give the logits (`Transformer.output_embedding`), sharded as it is
        stored.
      targets: ids of the tokens to predict.
      weights: weight of each token; 0 leaves a token out.
      z_loss: coefficient of the z-loss.
    """
    loss, nats = _loss(hidden, head, targets, weights, z_loss)
    return loss, jax.lax.stop_gradient(nats)


class _Tokens(NamedTuple):
    """Tokens of one device, in chunks along the leading axis, or of one chunk."""

    hidden: Float[Array, "*n t d"]
    targets: Int[Array, "*n t"]
    weights: Float[Array, "*n t"]


class _Layout(NamedTuple):
    """Mesh axes that shard the tokens, the vocabulary, and each dimension of the stored head."""

    tokens: tuple[str, ...]
    vocabulary: tuple[str, ...]
    head: tuple[tuple[str, ...], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(
    hidden: Array, head: Array, targets: Array, weights: Array, z_loss: float
) -> tuple[Array, Array]:
    def per_device(tokens: _Tokens, head: Array, layout: _Layout) -> tuple[Array, Array]:
        def sums(chunk: _Tokens) -> tuple[Array, Array]:
            return _Chunk(chunk, head, layout.vocabulary).sums(z_loss)

        return _total(jax.lax.map(sums, _chunks(tokens, head)), layout)

    out_specs = (PartitionSpec(), PartitionSpec())
    return _map_devices(per_device, _Tokens(hidden, targets, weights), head, out_specs)


def _loss_forward(
    hidden: Array, head: Array, targets: Array, weights: Array, z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def per_device(tokens: _Tokens, head: Array, layout: _Layout) -> Any:
        def step(head_grad: Array, tokens: _Tokens) -> tuple[Array, Any]:
            chunk = _Chunk(tokens, head, layout.vocabulary)
            hidden_grad, own_head_grad = chunk.gradients(z_loss)
            return head_grad + own_head_grad, (chunk.sums(z_loss), hidden_grad)

        zeros = jnp.zeros(head.shape, accumulation_dtype(head.dtype))
        zeros = kernels.match_vma((zeros, head), layout.tokens)[0]
        head_grad, (sums, hidden_grad) = jax.lax.scan(step, zeros, _chunks(tokens, head))
        hidden_grad = hidden_grad.reshape(-1, head.shape[-1])[: tokens.targets.size]
        return (
            _total(sums, layout),
            hidden_grad.reshape(tokens.hidden.shape),
            sharding.reduce_to_shards(head_grad, layout.head, over=layout.tokens),
        )

    specs = (sharding.spec(hidden), sharding.spec(head)) if sharding.on_mesh() else (None, None)
    out_specs = ((PartitionSpec(), PartitionSpec()), *specs)
    sums, hidden_grad, head_grad = _map_devices(
        per_device, _Tokens(hidden, targets, weights), head, out_specs
    )
    return sums, (hidden_grad, head_grad.astype(head.dtype))


def _loss_backward(
    z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    del z_loss
    hidden_grad, head_grad = ((grad * cotangents[0]).astype(grad.dtype) for grad in gradients)
    return hidden_grad, head_grad, None, None


_loss.defvjp(_loss_forward, _loss_backward)


class _Chunk:
    """The logits of some tokens, for this device's part of the vocabulary."""

    def __init__(self, tokens: _Tokens, head: Float[Array, "vocab d"], over: tuple[str, ...]):
        self.tokens, self.head, self.over = tokens, head, over
        self.logits = layers.logits(tokens.hidden, head)
        # A masked sum instead of a gather: it fuses with the logsumexp.
        ids = jax.lax.broadcasted_iota(tokens.targets.dtype, (1, len(head)), 1)
        first = jax.lax.axis_index(over) * len(head)
        self.is_target = tokens.targets[:, None] == ids + first.astype(ids.dtype)
        largest = jax.lax.pmax(self.logits.max(axis=-1, keepdims=True), over)
        self.log_partition = jnp.log(self._sum(jnp.exp(self.logits - largest))) + largest[:, 0]

    def sums(self, z_loss: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the weighted sums of the loss and of the cross entropy."""
        nats = self.log_partition - self._sum(jnp.where(self.is_target, self.logits, 0))
        loss = nats + z_loss * jnp.square(self.log_partition)
        weights = self.tokens.weights
        return jnp.sum(loss * weights), jnp.sum(nats * weights)

    def gradients(self, z_loss: float) -> tuple[Float[Array, "t d"], Float[Array, "vocab d"]]:
        """Returns the gradients of the loss by hidden states and, from these tokens, the head."""
        hidden, dtype = self.tokens.hidden, self.logits.dtype
        probability = jnp.exp(self.logits - self.log_partition[:, None])
        slope = 1 + 2 * z_loss * self.log_partition  # of the loss by the log-partition
        grad = self.tokens.weights[:, None] * (slope[:, None] * probability - self.is_target)
        grad = grad.astype(hidden.dtype)
        hidden_grad = jnp.einsum("tv,vd->td", grad, self.head, preferred_element_type=dtype)
        head_grad = jnp.einsum("tv,td->vd", grad, hidden, preferred_element_type=dtype)
        return jax.lax.psum(hidden_grad.astype(hidden.dtype), self.over), head_grad

    def _sum(self, x: Float[Array, "t vocab"]) -> Float[Array, " t"]:
        """Sums over the vocabulary of all devices."""
        return jax.lax.psum(x.sum(axis=-1), self.over)


def _map_devices(
    per_device: Callable[..., Any], tokens: _Tokens, head: Array, out_specs: Any
) -> Any:
    """Calls `per_device` on the tokens of each device and the head in their dtype, gathered."""
    gathered = sharding.gathered(head.astype(tokens.hidden.dtype))
    layout = _Layout(
        tokens=sharding.sharded_axes(tokens.hidden, axis=0),
        vocabulary=sharding.sharded_axes(gathered, axis=0),
        head=tuple(sharding.sharded_axes(head, axis) for axis in range(head.ndim)),
    )
    function = functools.partial(per_device, layout=layout)
    return sharding.shard_map(function, tokens, gathered, out_specs=out_specs)


def _chunks(tokens: _Tokens, head: Float[Array, "vocab d"]) -> _Tokens:
    """Splits the tokens of one device into chunks of equal size, padded with tokens of weight 0.

    Their number is a power of 2, so that the usual numbers of tokens need no padding.
    """
    num_tokens, itemsize = tokens.targets.size, accumulation_dtype(head.dtype).itemsize
    wanted = -(-num_tokens * len(head) * itemsize // MAX_LOGITS_BYTES)
    number = 1 << (wanted - 1).bit_length()
    size = -(-num_tokens // number)

    def split(array: Array, *columns: int) -> Array:
        flat = array.reshape(num_tokens, *columns)
        padding = [(0, number * size - num_tokens)] + [(0, 0)] * len(columns)
        return jnp.pad(flat, padding).reshape(number, size, *columns)

    return _Tokens(
        split(tokens.hidden, head.shape[1]), split(tokens.targets), split(tokens.weights)
    )


def _total(sums: tuple[Array, Array], layout: _Layout) -> tuple[Array, Array]:
    """Sums over the chunks of all devices."""
    loss, nats = (jax.lax.psum(chunks.sum(), layout.tokens) for chunks in sums)
    return loss, nats
