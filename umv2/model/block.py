"""A decoder block: attention, and the FFN that the configuration selects."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2.config import ModelConfig
from umv2.model import layers
from umv2.model.attention import Attention, KeyValueCache
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import Initializer
from umv2.model.slots import Observe, RouterStats
from umv2.types import struct


@struct
class FeedForwardStats:
    """Statistics of the FFN of one block on one batch; a scan over blocks stacks them on axis 0.

    `ffn_variance` is the variance of the SwiGLU's output: 0 for a block without a SwiGLU, None if
    not requested.
    """

    ffn_variance: Float[Array, "*l"] | None
    router: RouterStats | None


class Block(nnx.Module):
    """Attention and FFN, each with its norm.

    `ffn` is a SwiGLU: the dense FFN, or the shared expert of a block with a mixture of experts,
    `moe`.
    """

    def __init__(self, config: ModelConfig, *, init: Initializer):
        std = layers.linear_std(config.hidden_size)
        self.attention_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon, init=init)
        self.attention = Attention(config, init=init.child("attention"))
        self.ffn_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon, init=init)
        if config.ffn_size:
            self.ffn = layers.SwiGLU(
                config.hidden_size,
                config.ffn_size,
                std=std,
                down_std=std * layers.residual_scale(config.num_layers),
                init=init.child("ffn"),
            )
        if config.ffn == "moe":
            self.moe = MixtureOfExperts(config, init=init.child("moe"))

    def attend(
        self,
        x: Float[Array, "b t d"],
        *,
        segment_ids: Int[Array, "b t"] | None,
        cache: KeyValueCache | None,
        position: Int[Array, "#b"] | int,
        prefill: bool,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], KeyValueCache | None]:
        """Returns the residual stream after attention, the FFN's input, and the cache."""
        attended, cache = self.attention(
            self.attention_norm(x),
            segment_ids=segment_ids,
            cache=cache,
            position=position,
            prefill=prefill,
        )
        residual = x + attended
        return residual, self.ffn_norm(residual), cache

    def feed_forward(
        self, residual: Float[Array, "b t d"], y: Float[Array, "b t d"], *, observe: Observe
    ) -> tuple[Float[Array, "b t d"], FeedForwardStats]:
        """Returns the residual stream after the FFN, and the requested statistics."""
        variance = jnp.zeros(()) if observe.health else None
        router = None
        if hasattr(self, "ffn"):
            output = self.ffn(y)
            residual = residual + output
            if observe.health:
                variance = jnp.var(output.astype(jnp.float32))
        if hasattr(self, "moe"):
            with jax.named_scope("experts"):
                output, router = self.moe(y, observe=observe)
            residual = residual + output
        return residual, FeedForwardStats(ffn_variance=variance, router=router)

    def serve(self) -> None:
        """Prepares the block for inference, in place: does once what is the same for all tokens."""
        if hasattr(self, "moe"):
            self.moe.serve()
