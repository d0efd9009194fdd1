"""What training minimises: cross entropy, and the auxiliary losses of sparse layers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umv2.config import LossConfig
from umv2.model.memory import retrieval
from umv2.model.transformer import ModelStats
from umv2.types import LayerStats


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


def auxiliary(
    stats: ModelStats, params: dict[str, Any], config: LossConfig, *, num_tokens: int
) -> Float[Array, ""]:
    """Returns the auxiliary losses of a batch of `num_tokens` times their coefficients.

    Every memory layer has its own balance loss (Eq. 18-20) and Tucker penalty (Eq. 17), summed over
    layers, so that their strength on one layer does not depend on the number of layers. The router
    losses of experts are means over layers, as in OLMoE. Those with coefficient 0 are not computed.
    """
    total = jnp.zeros(())
    sparse = stats.sparse
    if sparse is None:  # Config.validate: all coefficients are 0
        return total
    if config.balance_loss > 0:
        total += config.balance_loss * jnp.sum(sparse.balance_loss)
    if config.load_balance > 0:
        total += config.load_balance * load_balance(
            sparse, config.load_balance_scope, num_tokens=num_tokens
        )
    if config.router_z_loss > 0:
        total += config.router_z_loss * jnp.mean(sparse.router_z_loss)
    if config.tucker_penalty > 0:
        penalties = jax.vmap(lambda cores: retrieval.tucker_penalty(cores, config.tucker_margin))(
            params["sparse"]["cores"]
        )
        total += config.tucker_penalty * jnp.sum(penalties)
    return total


def load_balance(
    experts: LayerStats, scope: Literal["layer", "model"], *, num_tokens: int
) -> Float[Array, ""]:
    """Returns the load-balancing loss E sum_i f_i p_i of stacked mixtures of experts.

    f is the number of selections of an expert per token, p its mean probability (OLMoE, arXiv
    2409.02060, Eq. 2 up to its constant). `layer`: the mean of the layers' losses; `model`: f and p
    are averaged over layers before the product, as transformers does.
    """
    if scope == "layer":
        return jnp.mean(experts.balance_loss)
    probability = experts.router_probability
    share = experts.hits.astype(probability.dtype).mean(axis=0) / num_tokens
    return share.size * jnp.sum(share * probability.mean(axis=0))
