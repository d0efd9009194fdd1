"""What training minimises: cross entropy, and the auxiliary losses of memory layers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umv2.config import LossConfig
from umv2.model import retrieval
from umv2.model.transformer import ModelStats


def cross_entropy(
    logits: Float[Array, "b t vocab"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns sums over tokens, each times its weight: nats, squared log-partition, and weight.

    The log-partition of a token is the logsumexp of its logits; its square times a coefficient is
    the z-loss (arXiv 2204.02311).
    """
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it fuses with the logsumexp, its gradient is no scatter, and it
    # holds whichever axis is divided over devices.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[-1]), 2)
    of_target = jnp.sum(jnp.where(targets[..., None] == vocabulary, logits, 0), axis=-1)
    nll = log_partition - of_target
    return (
        jnp.sum(nll * weights),
        jnp.sum(jnp.square(log_partition) * weights),
        jnp.sum(weights),
    )


def auxiliary(stats: ModelStats, params: dict[str, Any], config: LossConfig) -> Float[Array, ""]:
    """Returns the auxiliary losses times their coefficients, summed over memory layers.

    Every layer has its own balance loss (Eq. 18-20) and Tucker penalty (Eq. 17), so that their
    strength on one layer does not depend on the number of layers. Those with coefficient 0 are not
    computed.
    """
    total = jnp.zeros(())
    if config.balance_loss > 0:
        assert stats.memory is not None  # Config.validate
        total += config.balance_loss * jnp.sum(stats.memory.balance_loss)
    if config.tucker_penalty > 0:
        penalties = jax.vmap(lambda cores: retrieval.tucker_penalty(cores, config.tucker_margin))(
            params["memory"]["cores"]
        )
        total += config.tucker_penalty * jnp.sum(penalties)
    return total
