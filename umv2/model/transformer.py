"""The decoder: a stack of blocks, each an attention, an FFN and, where placed, a sparse layer.

    a = x + Attention(RMSNorm_1(x))
    y = RMSNorm_2(a)
    out = a + FFN(y) + Sparse(y)

Blocks are stacked and scanned, so that compile time is flat in depth. Where sparse layers are not
in every block, the scan is over the repeating group of blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from umv2 import parallel
from umv2.config import ModelConfig
from umv2.model import initialization, layers, retrieval
from umv2.model.attention import Attention, KeyValueCache
from umv2.model.memory import MemoryLayer, StoreWindow, ValueStore
from umv2.model.moe import MixtureOfExperts
from umv2.types import LayerStats, struct

# Each is a module `(x, *, store) -> (y, LayerStats)`; y is added beside the FFN's output.
SPARSE_LAYERS: dict[str, type[nnx.Module]] = {"memory": MemoryLayer, "moe": MixtureOfExperts}


@struct
class ModelStats:
    """What a forward pass observed: of every block's FFN, and of every sparse layer."""

    ffn_variance: Float[Array, " blocks"]  # 0 where there is no FFN
    sparse: LayerStats | None


@struct
class ModelOutput:
    """Result of a forward pass."""

    logits: Float[Array, "b t vocab"]
    stats: ModelStats
    cache: KeyValueCache | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` copies of a group of `period` blocks, from block `start` on.

    `placements` are the (read, write) blocks of the group's sparse layers, relative to the group;
    `sparse_start` is the first copy's first sparse layer.
    """

    start: int
    period: int
    repeats: int
    sparse_start: int
    placements: tuple[tuple[int, int], ...]


def plan_segments(num_layers: int, placements: tuple[tuple[int, int], ...]) -> tuple[Segment, ...]:
    """Divides the blocks into runs of equal groups; no sparse layer reaches out of its group.

    From each position on, takes the group whose copies cover the most blocks (the shortest such
    group), or the shortest group alone where nothing repeats.
    """

    def group(start: int, period: int) -> tuple[tuple[int, int], ...] | None:
        inside = [pair for pair in placements if start <= pair[0] < start + period]
        reaching = [pair for pair in placements if start <= pair[1] < start + period]
        if start + period > num_layers or inside != reaching:
            return None
        return tuple((read - start, write - start) for read, write in inside)

    segments: list[Segment] = []
    start = 0
    while start < num_layers:
        best: Segment | None = None
        for period in range(1, num_layers - start + 1):
            members = group(start, period)
            if members is None:
                continue
            repeats = 1
            while group(start + repeats * period, period) == members:
                repeats += 1
            covered = period * repeats if repeats > 1 else 0
            if best is None or covered > best.period * best.repeats * (best.repeats > 1):
                sparse_start = sum(read < start for read, _ in placements)
                best = Segment(start, period, repeats, sparse_start, members)
        assert best is not None  # the group of all remaining blocks is closed
        segments.append(best)
        start += best.period * best.repeats
    return tuple(segments)


class Block(nnx.Module):
    """Attention and FFN (none of size 0) with their norms."""

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        std = initialization.linear_std(config.hidden_size)
        self.attention_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, key=layers.named_key(key, "attention"))
        self.ffn_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon)
        if config.ffn_size:
            self.ffn = layers.SwiGLU(
                config.hidden_size,
                config.ffn_size,
                std=std,
                down_std=std * initialization.residual_scale(config.num_layers),
                key=layers.named_key(key, "ffn"),
            )

    def attend(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b 1 t t"] | None,
        cache: KeyValueCache | None,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], KeyValueCache | None]:
        """Returns the residual stream after attention, the FFN's input, and the cache."""
        attended, cache = self.attention(
            self.attention_norm(x), mask=mask, cache=cache, position=position
        )
        residual = x + attended
        return residual, self.ffn_norm(residual), cache

    def feed_forward(self, y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the FFN's output, zero where there is none."""
        return self.ffn(y) if hasattr(self, "ffn") else jnp.zeros_like(y)


class Transformer(nnx.Module):
    """Decoder-only language model with sparse layers.

    Parameters of blocks and of sparse layers are stacked along their first axis. The value store
    is an argument of the call, not a parameter of the model.
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        std = initialization.linear_std(config.hidden_size)
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(layers.normal(key, "embedding", vocabulary, std))
        if not config.tie_embeddings:
            self.head = nnx.Param(layers.normal(key, "head", vocabulary, std))
        self.final_norm = layers.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.blocks = _stack(lambda k: Block(config, key=k), key, "blocks", config.num_layers)
        num_sparse = len(config.placements)
        if num_sparse:
            create: Any = SPARSE_LAYERS[config.family]
            self.sparse = _stack(lambda k: create(config, key=k), key, "sparse", num_sparse)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        store: ValueStore | None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KeyValueCache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> ModelOutput:
        """Predicts the next token at every position.

        Args:
          tokens: ids in [0, vocab_size).
          store: the value tables; None where there are no memory layers.
          segment_ids: positions attend only within equal ids; None: to everything before them.
          cache: of the positions before `position`, stacked over blocks; None: there are none.
          position: position of tokens[:, 0].

        Returns:
          Logits in float32, statistics, and the continued cache.
        """
        config = self.config
        # Not narrower than asked for, and float64 where parameters are (parity checks).
        dtype = jnp.dtype(config.compute_dtype)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = parallel.lookup(self.embedding[...], tokens).astype(dtype)
        if store is not None and config.memory.sharing != "none":
            store = parallel.summed_once(store)

        ffn_variances, sparse_stats, caches = [], [], []
        for segment in plan_segments(config.num_layers, config.placements):
            x, (ffn_variance, stats, new_cache) = self._run_segment(
                segment, x, store=store, mask=mask, cache=cache, position=position
            )
            ffn_variances.append(ffn_variance)
            caches.append(new_cache)
            if segment.placements:
                sparse_stats.append(stats)
        x = self.final_norm(x)
        head = self.embedding if config.tie_embeddings else self.head
        logits = jnp.einsum(
            "btd,vd->btv",
            x,
            parallel.gathered(head[...].astype(dtype)),
            preferred_element_type=layers.accumulation_dtype(dtype),
        )
        return ModelOutput(
            logits=logits,
            stats=ModelStats(
                ffn_variance=jnp.concatenate(ffn_variances),
                sparse=_concatenate(sparse_stats) if sparse_stats else None,
            ),
            cache=None if cache is None else _concatenate(caches),
        )

    def empty_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Returns a cache for `length` positions of every block, in the compute dtype."""
        config = self.config
        shape = (config.num_layers, batch_size, length, config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.compute_dtype)
        return KeyValueCache(keys=zeros, values=zeros)

    def refresh(self) -> None:
        """Recomputes what sparse layers derive from their parameters once an optimizer step."""
        if hasattr(getattr(self, "sparse", None), "refresh"):
            self.sparse = jax.vmap(_refreshed)(self.sparse)

    def _run_segment(
        self,
        segment: Segment,
        x: Float[Array, "b t d"],
        *,
        store: ValueStore | None,
        mask: Bool[Array, "b 1 t t"] | None,
        cache: KeyValueCache | None,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any, Any]]:
        """Runs the copies of one group of blocks, scanned or unrolled."""
        config = self.config
        blocks = slice(segment.start, segment.start + segment.period * segment.repeats)
        per_copy: dict[str, Any] = {"blocks": _group(self.blocks, blocks, segment.repeats)}
        if cache is not None:
            per_copy["cache"] = _group(cache, blocks, segment.repeats)
        if segment.placements:
            count = len(segment.placements)
            members = slice(segment.sparse_start, segment.sparse_start + count * segment.repeats)
            per_copy["sparse"] = _group(self.sparse, members, segment.repeats)
            if store is not None:
                store, windows = self._windows(store)
                per_copy |= _group(windows, members, segment.repeats)

        def body(x: Float[Array, "b t d"], copy: dict[str, Any]) -> tuple[Any, Any]:
            return self._run_group(segment, x, copy, store=store, mask=mask, position=position)

        body = _rematerialised(body, config.remat)
        if config.scan_layers:
            x, outputs = jax.lax.scan(body, x, per_copy)
        else:
            collected = []
            for index in range(segment.repeats):
                x, output = body(x, jax.tree.map(lambda leaf, i=index: leaf[i], per_copy))
                collected.append(output)
            outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
        # [repeats, members of the group, ...] -> [members of the segment, ...]
        return x, jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2), outputs)

    def _run_group(
        self,
        segment: Segment,
        x: Float[Array, "b t d"],
        copy: dict[str, Any],
        *,
        store: ValueStore | None,
        mask: Bool[Array, "b 1 t t"] | None,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any, Any]]:
        """Runs one group; a sparse layer's output waits from its read to its write block."""
        member = 0
        waiting: dict[int, list[Float[Array, "b t d"]]] = {}
        ffn_variances, sparse_stats, caches = [], [], []
        for index in range(segment.period):
            block = _member(copy["blocks"], index)
            old_cache = _member(copy["cache"], index) if "cache" in copy else None
            residual, y, new_cache = block.attend(x, mask=mask, cache=old_cache, position=position)
            fed_forward = block.feed_forward(y)
            x = residual + fed_forward
            if member < len(segment.placements) and segment.placements[member][0] == index:
                window = _window(copy, member, store)
                sparse_output, stats = _member(copy["sparse"], member)(y, store=window)
                waiting.setdefault(segment.placements[member][1], []).append(sparse_output)
                sparse_stats.append(stats)
                member += 1
            for sparse_output in waiting.pop(index, ()):
                x = x + sparse_output
            ffn_variances.append(jnp.var(fed_forward.astype(jnp.float32)))
            caches.append(new_cache)
        stats = _stack_trees(sparse_stats) if sparse_stats else None
        cache = _stack_trees(caches) if "cache" in copy else None
        return x, (jnp.stack(ffn_variances), stats, cache)

    def _windows(self, store: ValueStore) -> tuple[ValueStore | None, dict[str, Any]]:
        """Returns the store that memory layers share, and what each has of its own, stacked.

        That is the first row of its window and, where nothing is shared, its table: a slice of the
        scanned input, so that its gradient is a slice too, and not a sum of whole stores.
        """
        memory, count = self.config.memory, len(self.config.placements)
        if memory.sharing == "none":
            return None, {"table": store, "start": jnp.zeros(count, jnp.int32)}
        starts = retrieval.window_starts(count, memory.sharing, memory.share_group)
        return store, {"start": jnp.asarray(starts * memory.num_values, jnp.int32)}


def _window(copy: dict[str, Any], member: int, shared: ValueStore | None) -> StoreWindow | None:
    """Returns what one sparse layer of a group sees of the value store, if there is one."""
    if "start" not in copy:
        return None
    store = _member(copy["table"], member) if shared is None else shared
    return StoreWindow(store=store, start=copy["start"][member])


def _stack(create: Callable[[Any], Any], key: Key[Array, ""], name: str, count: int) -> Any:
    """Creates `count` modules whose variables are stacked along a new first axis."""
    return jax.vmap(create)(jax.random.split(layers.named_key(key, name), count))


def _refreshed(layer: Any) -> Any:
    layer.refresh()
    return layer


def _group(tree: Any, members: slice, repeats: int) -> Any:
    """Takes a range of stacked members as [repeats, members of one group, ...]."""

    def take(leaf: Array) -> Array:
        leaf = leaf[members]
        return leaf.reshape(repeats, -1, *leaf.shape[1:])

    return jax.tree.map(take, tree)


def _member(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack_trees(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _concatenate(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _rematerialised(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    match remat:
        case "full":
            return jax.checkpoint(body)
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(body, policy=policy)
        case _:
            return body
