"""The health of memory layers and experts, as a run reports it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umv2.model.transformer import ModelStats


def health_arrays(
    stats: ModelStats,
    usage: Int[Array, "l choices"] | None,
    params: dict[str, Any],
    *,
    write_blocks: Sequence[int],
) -> dict[str, Float[Array, " l"]]:
    """Returns what to watch of every sparse layer; light, and small enough to send to the host.

    Args:
      stats: of a step; its hits are not read.
      usage: hits of each visible row, or expert, since the last log; None for a dense model.
      params: of the model.
      write_blocks: block, from 0, beside whose FFN each sparse layer's output is added.

    Returns:
      For each sparse layer, nothing for a dense model: coverage, share of rows or experts hit;
      uniform_kl, nats from the uniform distribution to that of the hits; output_std and, where
      blocks have an FFN, output_to_ffn_std; top_score and last_score, means of the first and last
      selected score; for memory layers with Tucker scoring lambda_1 and lambda_2, singular values
      of the summed cores, averaged over heads; for experts balance_loss and router_z_loss.
    """
    sparse = stats.sparse
    if sparse is None or usage is None:
        return {}
    hits = usage.astype(jnp.float32)
    share = hits / jnp.maximum(hits.sum(axis=-1, keepdims=True), 1.0)
    health = {
        "coverage": jnp.mean(usage > 0, axis=-1),
        "uniform_kl": jax.scipy.special.rel_entr(share, 1 / usage.shape[-1]).sum(axis=-1),
        "output_std": jnp.sqrt(sparse.output_variance),
        "top_score": sparse.top_score,
        "last_score": sparse.last_score,
    }
    if "ffn" in params["blocks"]:
        ffn_variance = stats.ffn_variance[jnp.asarray(write_blocks)]
        health["output_to_ffn_std"] = jnp.sqrt(sparse.output_variance / ffn_variance)
    if "router" in params["sparse"]:
        health |= {"balance_loss": sparse.balance_loss, "router_z_loss": sparse.router_z_loss}
    if "cores" in params["sparse"]:
        core = params["sparse"]["cores"].sum(axis=1)  # [l, c, h, r, r] over cores
        singular = jnp.linalg.svd(core, compute_uv=False).mean(axis=1)
        for i in range(min(2, singular.shape[-1])):
            health[f"lambda_{i + 1}"] = singular[:, i]
    return health


def fetched_health(health: Mapping[str, Array]) -> dict[str, float]:
    """Fetches health arrays as a flat record: 'coverage/layer_1' is the first sparse layer's."""
    return {
        f"{name}/layer_{index}": float(value)
        for name, values in jax.device_get(dict(health)).items()
        for index, value in enumerate(values, start=1)
    }


def describe_stats(stats: ModelStats) -> str:
    """Says every statistic of every block and sparse layer, from the first on, in one line."""
    return "; ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}:"
        f" {', '.join(f'{value:.3g}' for value in np.asarray(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim == 1
    )
