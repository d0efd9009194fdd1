"""Health metrics of memory layers and routers, as logged during training."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umv2.config import ModelConfig
from umv2.model.slots import MemoryStats, RouterStats
from umv2.model.transformer import ModelStats
from umv2.model.weights import Weights

Usage = Mapping[str, Int[Array, "l choices"]]


def hits(stats: ModelStats) -> dict[str, Int[Array, "l choices"]]:
    """Returns how often each layer selected each of its choices, by slot."""
    slots = {"memory": stats.memory, "router": stats.feed_forward.router}
    return {
        name: slot.hits
        for name, slot in slots.items()
        if slot is not None and slot.hits is not None
    }


def without_hits(stats: ModelStats) -> ModelStats:
    """Drops the hits, which are large, and which the train state accumulates."""

    def strip[S: (MemoryStats, RouterStats)](slot: S) -> S:
        return slot if slot.hits is None else dataclasses.replace(slot, hits=slot.hits[:, :0])

    memory, router = stats.memory, stats.feed_forward.router
    if memory is not None:
        stats = dataclasses.replace(stats, memory=strip(memory))
    if router is not None:
        feed_forward = dataclasses.replace(stats.feed_forward, router=strip(router))
        stats = dataclasses.replace(stats, feed_forward=feed_forward)
    return stats


def arrays(
    config: ModelConfig, stats: ModelStats, usage: Usage, weights: Weights
) -> dict[str, Float[Array, " l"]]:
    """Returns the health metrics of memory layers and routers; small enough to send to the host.

    Args:
      config: model configuration.
      stats: statistics of a step; the hits are not read.
      usage: hits of each row ("memory") and expert ("router") since the last log.
      weights: weights of the model.

    Returns:
      For each memory layer: coverage, the fraction of its rows that were hit; uniform_kl, the KL
      divergence of the distribution of hits from the uniform one, in nats; output_std and, if
      blocks have an FFN, output_to_ffn_std; top_score and last_score, the means of the first and
      last selected score; and the layer's own metrics (`MemorySlot.health`). For each router: the
      same with the prefix "expert_", and its balance_loss and router_z_loss.
    """
    health: dict[str, Array] = {}
    ffn_variance = stats.feed_forward.ffn_variance if config.ffn_size else None
    if stats.memory is not None:
        blocks = np.array([write for _, write in config.placements])
        parallel_ffn_variance = None if ffn_variance is None else ffn_variance[blocks]
        health |= _selection_health(stats.memory, usage.get("memory"), parallel_ffn_variance)
        health |= weights.model(config).memory.health()
    if (router := stats.feed_forward.router) is not None:
        of_experts = _selection_health(router, usage.get("router"), ffn_variance)
        health |= {f"expert_{name}": values for name, values in of_experts.items()}
        health |= {"balance_loss": router.balance_loss, "router_z_loss": router.z_loss}
    return health


def _selection_health(
    stats: MemoryStats | RouterStats,
    usage: Int[Array, "l choices"] | None,
    ffn_variance: Float[Array, " l"] | None,
) -> dict[str, Float[Array, " l"]]:
    health: dict[str, Array] = {}
    if usage is not None:
        counts = usage.astype(jnp.float32)
        fraction = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
        health["coverage"] = jnp.mean(usage > 0, axis=-1)
        health["uniform_kl"] = jax.scipy.special.rel_entr(fraction, 1 / usage.shape[-1]).sum(
            axis=-1
        )
    if stats.output_variance is not None:
        health["output_std"] = jnp.sqrt(stats.output_variance)
        if ffn_variance is not None:
            health["output_to_ffn_std"] = jnp.sqrt(stats.output_variance / ffn_variance)
    if stats.top_score is not None and stats.last_score is not None:
        health |= {"top_score": stats.top_score, "last_score": stats.last_score}
    return health


def fetch(health: Mapping[str, Array]) -> dict[str, float]:
    """Fetches health arrays to the host as a flat record with keys such as 'coverage/layer_1'."""
    return {
        f"{name}/layer_{index}": float(value)
        for name, values in jax.device_get(dict(health)).items()
        for index, value in enumerate(values, start=1)
    }


def describe(stats: ModelStats) -> str:
    """Formats the statistics of all blocks and memory layers, in order, on one line."""
    return "; ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}:"
        f" {', '.join(f'{value:.3g}' for value in np.asarray(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim == 1
    )
