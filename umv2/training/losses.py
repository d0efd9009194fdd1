"""The cross-entropy loss. Auxiliary losses are defined by the layers (`Transformer.losses`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b t vocab"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns weighted sums over tokens: cross entropy in nats, squared log-partition, and weight.

    The log-partition of a token is the logsumexp of its logits; its square times a coefficient is
    the z-loss (arXiv 2204.02311).
    """
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: it fuses with the logsumexp, its gradient needs no scatter,
    # and it works whichever axis is sharded.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[-1]), 2)
    of_target = jnp.sum(jnp.where(targets[..., None] == vocabulary, logits, 0), axis=-1)
    nll = log_partition - of_target
    return (
        jnp.sum(nll * weights),
        jnp.sum(jnp.square(log_partition) * weights),
        jnp.sum(weights),
    )
