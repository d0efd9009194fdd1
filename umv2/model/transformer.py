"""The decoder: a stack of blocks of attention, an FFN and, in some blocks, a memory layer.

a = x + Attention(RMSNorm_1(x))
y = RMSNorm_2(a)
out = a + FFN(y) + Memory(y)
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2 import sharding
from umv2.config import LossConfig, ModelConfig
from umv2.model import layers
from umv2.model.attention import KeyValueCache
from umv2.model.block import Block, FeedForwardStats
from umv2.model.memory.store import Stores, ValueStore, windows
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import Initializer
from umv2.model.slots import MemoryStats, Observe, memory_layer
from umv2.model.stack import Stack, layer_of
from umv2.types import struct

NOTHING = Observe()


@struct
class ModelStats:
    """Statistics of every block's FFN and every memory layer in a forward pass."""

    feed_forward: FeedForwardStats
    memory: MemoryStats | None


@struct
class HiddenStates:
    """The input of the head at every position, the statistics, and the updated cache."""

    x: Float[Array, "b t d"]
    stats: ModelStats
    cache: tuple[KeyValueCache, ...] | None


@struct
class ModelOutput:
    """Result of a forward pass."""

    logits: Float[Array, "b t vocab"]
    stats: ModelStats
    cache: tuple[KeyValueCache, ...] | None


class Transformer(nnx.Module):
    """Decoder-only language model with memory layers.

    The parameters of blocks and of memory layers are stacked along their leading axis. The value
    store is an argument of the call, not a parameter of the model.
    """

    def __init__(self, config: ModelConfig, *, init: Initializer):
        vocabulary = (config.vocab_size, config.hidden_size)
        std = layers.linear_std(config.hidden_size)
        axes: Any = ("vocabulary", "hidden")
        self.embedding = init.normal(
            "embedding", vocabulary, std=std, axes=axes, group="embeddings"
        )
        if not config.tie_embeddings:
            self.head = init.normal("head", vocabulary, std=std, axes=axes, group="matrices")
        self.final_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon, init=init)
        self.blocks: Any = init.stack("blocks", config.num_layers, lambda i: Block(config, init=i))
        if config.placements:
            create = memory_layer(config)
            # Renaming this key would change the draws of existing seeds.
            self.memory: Any = init.stack(
                "sparse", len(config.placements), lambda i: create(config, init=i)
            )
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        store: Stores,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Sequence[KeyValueCache] | None = None,
        position: Int[Array, "#b"] | int = 0,
        prefill: bool = False,
        logits_at: Int[Array, "b a"] | None = None,
        observe: Observe = NOTHING,
    ) -> ModelOutput:
        """Computes next-token logits; for a loss, `hidden` saves storing them.

        Args:
          tokens: ids in [0, vocab_size).
          store: the value tables, as one store or one per memory layer; None if there are none.
          segment_ids: positions attend only to positions with the same id, which are contiguous;
            None: to all earlier positions.
          cache: key-value cache of the positions before `position`, one per block; None: no cache.
            With a cache the blocks are unrolled, since a scan would copy it.
          position: position of tokens[:, 0], either one for all rows or one per row.
          prefill: the cache is empty and `position` is 0, so tokens attend only to each other.
          logits_at: columns of `tokens` to compute logits for; None: all.
          observe: the statistics to compute; none by default.

        Returns:
          Logits in float32 (float64 for float64), statistics, and the updated cache.
        """
        hidden = self.hidden(
            tokens,
            store=store,
            segment_ids=segment_ids,
            cache=cache,
            position=position,
            prefill=prefill,
            observe=observe,
        )
        x = hidden.x if logits_at is None else sharding.take_positions(hidden.x, logits_at)
        with jax.named_scope("head"):
            logits = layers.logits(x, sharding.gathered(self.output_embedding.astype(x.dtype)))
        return ModelOutput(logits=logits, stats=hidden.stats, cache=hidden.cache)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        *,
        store: Stores,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Sequence[KeyValueCache] | None = None,
        position: Int[Array, "#b"] | int = 0,
        prefill: bool = False,
        observe: Observe = NOTHING,
    ) -> HiddenStates:
        """Computes the normalised residual stream after the last block, in the compute dtype.

        Its products with the rows of `output_embedding` are the logits. The arguments are those of
        `__call__`.
        """
        config = self.config
        stack = Stack(
            config=config,
            blocks=self.blocks,
            memory=getattr(self, "memory", None),
            windows=windows(store, config.memory, len(config.placements)),
            segment_ids=segment_ids,
            position=position,
            prefill=prefill,
            observe=observe,
        )
        with jax.named_scope("embedding"):
            x = sharding.lookup(self.embedding[...], tokens).astype(config.compute_dtype)
        output = stack(x, cache)
        with jax.named_scope("head"):
            x = self.final_norm(output.x)
        return HiddenStates(
            x=x,
            stats=ModelStats(feed_forward=output.feed_forward, memory=output.memory),
            cache=None if cache is None else tuple(output.caches),
        )

    @property
    def output_embedding(self) -> Float[Array, "vocab d"]:
        """The matrix of the head, which is the embedding if the model ties them."""
        return (self.embedding if self.config.tie_embeddings else self.head)[...]

    def empty_cache(self, batch_size: int, length: int) -> tuple[KeyValueCache, ...]:
        """Returns an empty cache of `length` positions for every block, in the compute dtype."""
        config = self.config
        shape = (batch_size, config.num_key_value_heads, length, config.head_dim)

        def entries() -> Float[Array, "b g s q"]:
            return sharding.zeros(shape, config.compute_dtype, "batch", "heads")

        return tuple(
            KeyValueCache(keys=entries(), values=entries()) for _ in range(config.num_layers)
        )

    def losses(
        self, stats: ModelStats, config: LossConfig, *, num_tokens: int
    ) -> dict[str, Float[Array, ""]]:
        """Returns the weighted auxiliary losses of all layers, by the name of their coefficient.

        Args:
          stats: statistics of a batch, as requested by `Observe.training(config)`.
          config: loss configuration; losses with coefficient 0 are not computed.
          num_tokens: number of tokens in the batch.
        """
        terms: dict[str, Float[Array, ""]] = {}
        if stats.memory is not None:
            terms |= self.memory.losses(stats.memory, config)
        if stats.feed_forward.router is not None:
            terms |= MixtureOfExperts.losses(
                stats.feed_forward.router, config, num_tokens=num_tokens
            )
        return terms

    def refresh(self) -> None:
        """Recomputes the buffers that memory layers derive from their parameters."""
        if self.config.placements:
            # Pass axis_size: a layer may have no arrays to infer it from.
            count = len(self.config.placements)
            self.memory = jax.vmap(_refreshed, axis_size=count)(self.memory)

    def serve(self) -> None:
        """Prepares the model for inference, in place.

        Unstacks blocks and memory layers, so that they run unrolled and without slicing copies, and
        lets each layer do once what is the same for all tokens.
        """
        config = self.config
        self.blocks = nnx.List(layer_of(self.blocks, i) for i in range(config.num_layers))
        for block in self.blocks:
            block.serve()
        if config.placements:
            self.memory = nnx.List(layer_of(self.memory, i) for i in range(len(config.placements)))
            for layer in self.memory:
                layer.serve()


def create_store(config: ModelConfig, *, init: Initializer) -> ValueStore | None:
    """Returns the value tables of a model, or None if its layers have none."""
    return memory_layer(config).create_store(config, init=init) if config.placements else None


def _refreshed(layer: Any) -> Any:
    layer.refresh()
    return layer
