"""Causal self-attention with rotary positions and a key-value cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2 import sharding
from umv2.config import ModelConfig
from umv2.model import layers
from umv2.model.attention import cache as key_value_cache
from umv2.model.attention import implementations
from umv2.model.attention.cache import KeyValueCache
from umv2.model.parameter import Initializer


class Attention(nnx.Module):
    """Attention as in OLMoE (arXiv 2409.02060): QK-norm over all heads jointly, no biases.

    `num_key_value_heads` < `num_heads` gives grouped-query attention (arXiv 2305.13245), and
    `window` > 0 sliding-window attention (arXiv 2004.05150).
    """

    def __init__(self, config: ModelConfig, *, init: Initializer):
        size, key_value_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        std = layers.linear_std(config.hidden_size)
        residual_std = std * layers.residual_scale(config.num_layers)
        into: Any = {"axes": ("hidden", "heads"), "group": "matrices"}
        self.query = init.normal("query", (size, size), std=std, **into)
        self.key = init.normal("key", (size, key_value_size), std=std, **into)
        self.value = init.normal("value", (size, key_value_size), std=std, **into)
        self.output = init.normal(
            "output", (size, size), std=residual_std, axes=("heads", "hidden"), group="matrices"
        )
        if config.query_key_norm:
            self.query_norm = layers.RMSNorm(size, config.norm_epsilon, init=init)
            self.key_norm = layers.RMSNorm(key_value_size, config.norm_epsilon, init=init)
        self.normalised = config.query_key_norm
        self.head_dim = config.head_dim
        self.rope = layers.Rope(config.rope_theta, config.rope_scaling, config.rope_scale)
        self.window = config.attention_window
        self.implementation = config.attention

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KeyValueCache | None = None,
        position: Int[Array, "#b"] | int = 0,
        prefill: bool = False,
    ) -> tuple[Float[Array, "b t d"], KeyValueCache | None]:
        """Applies causal self-attention.

        Args:
          x: normalised input.
          segment_ids: positions attend only to positions with the same id (packed documents), which
            are contiguous; None: to all earlier positions.
          cache: keys and values of the positions before `position`, which x continues.
          position: position of x[:, 0], either one for all rows or one per row.
          prefill: the cache is empty; it is written from position 0 and not read.

        Returns:
          The projected output, and the cache updated with the positions of x.
        """
        query, keys = layers.linear(x, self.query[...]), layers.linear(x, self.key[...])
        values = layers.linear(x, self.value[...])
        if self.normalised:
            query, keys = self.query_norm(query), self.key_norm(keys)
        starts = jnp.broadcast_to(jnp.asarray(position, jnp.int32), x.shape[:1])
        specs: tuple[Any, Any] = (None, None)
        if sharding.on_mesh():
            starts = sharding.shard_batch_like(starts, x)
            specs = (sharding.spec(query), jax.tree.map(sharding.spec, cache))
        attended, cache = sharding.shard_map(
            lambda *arrays: self._attend(*arrays, prefill=prefill),
            query,
            keys,
            values,
            segment_ids,
            cache,
            starts,
            out_specs=specs,
            check_vma=False,  # for the kernels; all differentiated arguments are sharded
        )
        return layers.linear(attended, self.output[...]), cache

    def _attend(
        self,
        query: Float[Array, "b t e"],
        keys: Float[Array, "b t f"],
        values: Float[Array, "b t f"],
        segment_ids: Int[Array, "b t"] | None,
        cache: KeyValueCache | None,
        starts: Int[Array, " b"],
        *,
        prefill: bool,
    ) -> tuple[Float[Array, "b t e"], KeyValueCache | None]:
        """Computes attention for the heads of one device."""
        shape = query.shape
        positions = starts[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None, :]
        query = self.rope.rotate(self._split(query), positions)
        keys = self.rope.rotate(self._split(keys), positions)
        values = self._split(values)
        if cache is not None:
            cache = KeyValueCache(
                keys=key_value_cache.write(cache.keys, keys, starts, prefill=prefill),
                values=key_value_cache.write(cache.values, values, starts, prefill=prefill),
            )
        with jax.named_scope("attention"):
            if cache is None or prefill:
                attended = implementations.attend(
                    query, keys, values, segment_ids, self.window, self.implementation
                )
            else:
                attended = key_value_cache.attend(query, cache, positions, self.window)
        return attended.reshape(shape), cache

    def _split(self, x: Float[Array, "b t e"]) -> Float[Array, "b t h q"]:
        return jnp.reshape(x, x.shape[:2] + (-1, self.head_dim))
