"""Causal self-attention with rotary positions and a key-value cache."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from umv2 import parallel
from umv2.config import ModelConfig
from umv2.model import initialization, layers
from umv2.types import struct


@struct
class KeyValueCache:
    """Keys and values of the positions seen so far, of one layer or stacked over layers."""

    keys: Float[Array, "*l b s g q"]
    values: Float[Array, "*l b s g q"]


class Attention(nnx.Module):
    """Attention as in OLMoE (arXiv 2409.02060): RMSNorm on whole queries and keys, no biases.

    `num_key_value_heads` < `num_heads` gives grouped queries (arXiv 2305.13245).
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        size, key_value_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        std = initialization.linear_std(config.hidden_size)
        residual_std = std * initialization.residual_scale(config.num_layers)
        self.query = nnx.Param(layers.normal(key, "query", (size, size), std))
        self.key = nnx.Param(layers.normal(key, "key", (size, key_value_size), std))
        self.value = nnx.Param(layers.normal(key, "value", (size, key_value_size), std))
        self.output = nnx.Param(layers.normal(key, "output", (size, size), residual_std))
        if config.query_key_norm:
            self.query_norm = layers.RMSNorm(size, config.norm_epsilon)
            self.key_norm = layers.RMSNorm(key_value_size, config.norm_epsilon)
        self.normalised = config.query_key_norm
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.implementation: Literal["xla", "cudnn"] = config.attention

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b 1 t t"] | None = None,
        cache: KeyValueCache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], KeyValueCache | None]:
        """Attends to earlier positions.

        Args:
          x: normalised input.
          mask: True where a query may see a key, beside causality (packed documents).
          cache: keys and values of positions < `position`; x then continues them.
          position: position of x[:, 0].

        Returns:
          The projected output, and the cache with the positions of x written into it.
        """
        query, keys = layers.linear(x, self.query[...]), layers.linear(x, self.key[...])
        values = layers.linear(x, self.value[...])
        position = jnp.asarray(position, jnp.int32)
        if self.normalised:
            query, keys = self.query_norm(query), self.key_norm(keys)
        shares: tuple[Any, Any] = (
            (parallel.spec(query), None) if parallel.on_mesh() else (None, None)
        )
        if cache is not None and parallel.on_mesh():
            shares = (shares[0], jax.tree.map(parallel.spec, cache))
        attended, cache = parallel.map_per_device(
            self._attend, query, keys, values, mask, cache, position, out_specs=shares
        )
        return layers.linear(attended, self.output[...]), cache

    def _attend(
        self,
        query: Float[Array, "b t e"],
        keys: Float[Array, "b t f"],
        values: Float[Array, "b t f"],
        mask: Bool[Array, "b 1 t t"] | None,
        cache: KeyValueCache | None,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b t e"], KeyValueCache | None]:
        """Attends with the heads of one device."""
        shape = query.shape
        positions = position + jnp.arange(shape[1], dtype=jnp.int32)
        query = layers.rotate(self._split(query), positions, self.rope_theta)
        keys = layers.rotate(self._split(keys), positions, self.rope_theta)
        values = self._split(values)
        if cache is None:
            attended = jax.nn.dot_product_attention(
                query, keys, values, mask=mask, is_causal=True, implementation=self.implementation
            )
        else:
            cache = KeyValueCache(
                keys=_write(cache.keys, keys, position),
                values=_write(cache.values, values, position),
            )
            seen = jnp.arange(cache.keys.shape[1])[None, :] <= positions[:, None]
            attended = jax.nn.dot_product_attention(
                query,
                cache.keys.astype(query.dtype),
                cache.values.astype(query.dtype),
                mask=seen[None, None],
            )
        return attended.reshape(shape), cache

    def _split(self, x: Float[Array, "b t e"]) -> Float[Array, "b t h q"]:
        return jnp.reshape(x, x.shape[:2] + (-1, self.head_dim))


def _write(
    cache: Float[Array, "b s g q"], new: Float[Array, "b t g q"], position: Int[Array, ""] | int
) -> Float[Array, "b s g q"]:
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), position, axis=1)
