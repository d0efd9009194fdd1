"""The health of memory layers and routers, as a run reports it."""

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
    found = {"memory": stats.memory, "router": stats.feed_forward.router}
    return {
        name: slot.hits
        for name, slot in found.items()
        if slot is not None and slot.hits is not None
    }


def without_hits(stats: ModelStats) -> ModelStats:
    """Leaves out the hits, which the state accumulates: they are large."""

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
    """Returns what to watch of every layer that chooses; small enough to send to the host.

    Args:
      config: of the model.
      stats: of a step; its hits are not read.
      usage: hits of each row ("memory") and expert ("router") since the last log.
      weights: of the model.

    Returns:
      For each memory layer: coverage, the fraction of its rows that were hit; uniform_kl, nats from
      the uniform distribution to that of the hits; output_std and, where blocks have an FFN,
      output_to_ffn_std; top_score and last_score, means of the first and last selected score; what
      the layer itself adds (`MemorySlot.health`). For each router the same under names that begin
      with "expert_", and its balance_loss and router_z_loss.
    """
    health: dict[str, Array] = {}
    ffn_variance = stats.feed_forward.ffn_variance if config.ffn_size else None
    if stats.memory is not None:
        blocks = np.array([write for _, write in config.placements])
        beside = None if ffn_variance is None else ffn_variance[blocks]
        health |= _of_selection(stats.memory, usage.get("memory"), beside)
        health |= weights.model(config).memory.health()
    if (router := stats.feed_forward.router) is not None:
        found = _of_selection(router, usage.get("router"), ffn_variance)
        health |= {f"expert_{name}": values for name, values in found.items()}
        health |= {"balance_loss": router.balance_loss, "router_z_loss": router.z_loss}
    return health


def _of_selection(
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


def fetched(health: Mapping[str, Array]) -> dict[str, float]:
    """Fetches health arrays as a flat record: 'coverage/layer_1' is the first memory layer's."""
    return {
        f"{name}/layer_{index}": float(value)
        for name, values in jax.device_get(dict(health)).items()
        for index, value in enumerate(values, start=1)
    }


def describe(stats: ModelStats) -> str:
    """Says every statistic of every block and memory layer, from the first on, in one line."""
    return "; ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}:"
        f" {', '.join(f'{value:.3g}' for value in np.asarray(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim == 1
    )
