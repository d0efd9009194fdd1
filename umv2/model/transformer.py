"""The decoder: a stack of blocks, each an attention, an FFN and, where placed, a sparse layer.

    a = x + Attention(RMSNorm_1(x))
    y = RMSNorm_2(a)
    out = a + FFN(y) + Sparse(y)

Blocks are stacked and scanned, so that compile time is flat in depth. Where sparse layers are not
in every block, the scan is over the repeating group of blocks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from umv2 import sharding
from umv2.config import ModelConfig
from umv2.model import initialization, layers
from umv2.model.attention import Attention, KeyValueCache
from umv2.model.memory import retrieval
from umv2.model.memory.layer import MemoryLayer
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.moe.layer import MixtureOfExperts
from umv2.types import LayerStats, struct

# Where nothing is shared, memory layers may have a store each (inference).
Stores = ValueStore | Sequence[ValueStore] | None
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
    cache: tuple[KeyValueCache, ...] | None


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
        position: Int[Array, "#b"] | int,
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
        store: Stores,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Sequence[KeyValueCache] | None = None,
        position: Int[Array, "#b"] | int = 0,
        logits_at: Int[Array, "b a"] | None = None,
    ) -> ModelOutput:
        """Predicts the next token.

        Args:
          tokens: ids in [0, vocab_size).
          store: the value tables, one store or one of each memory layer; None where there are no
            memory layers.
          segment_ids: positions attend only within equal ids; None: to everything before them.
          cache: of the positions before `position`, one of each block; None: there are none.
            Blocks are then not scanned, which would copy it.
          position: position of tokens[:, 0], the same in all rows or one of each; the number 0 says
            that the cache is empty.
          logits_at: columns of `tokens` whose predictions are wanted; None: all.

        Returns:
          Logits in float32, statistics, and the continued cache.
        """
        config = self.config
        # Not narrower than asked for, and float64 where parameters are (parity checks).
        dtype = jnp.dtype(config.compute_dtype)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = sharding.lookup(self.embedding[...], tokens).astype(dtype)
        if store is not None and config.memory.sharing != "none":
            store = sharding.defer_gradient_reduction(store)

        ffn_variances, sparse_stats = [], []
        caches: list[KeyValueCache] = []
        for segment in plan_segments(config.num_layers, config.placements):
            x, (ffn_variance, stats, new_caches) = self._run_segment(
                segment, x, store=store, mask=mask, cache=cache, position=position
            )
            ffn_variances.append(ffn_variance)
            caches.extend(new_caches)
            if segment.placements:
                sparse_stats.append(stats)
        x = self.final_norm(x)
        if logits_at is not None:
            x = sharding.take_positions(x, logits_at)
        head = self.embedding if config.tie_embeddings else self.head

        def predict(x: Array, head: Array) -> Array:
            accumulated = layers.accumulation_dtype(dtype)
            return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=accumulated)

        logits = layers.with_enough_rows(predict, x, sharding.gathered(head[...].astype(dtype)))
        return ModelOutput(
            logits=logits,
            stats=ModelStats(
                ffn_variance=jnp.concatenate(ffn_variances),
                sparse=_concatenate(sparse_stats) if sparse_stats else None,
            ),
            cache=None if cache is None else tuple(caches),
        )

    def empty_cache(self, batch_size: int, length: int) -> tuple[KeyValueCache, ...]:
        """Returns a cache for `length` positions of every block, in the compute dtype."""
        config = self.config
        shape = (batch_size, config.num_key_value_heads, length, config.head_dim)

        def entries() -> Float[Array, "b g s q"]:
            return sharding.zeros(shape, config.compute_dtype, "batch", "heads")

        return tuple(
            KeyValueCache(keys=entries(), values=entries()) for _ in range(config.num_layers)
        )

    def refresh(self) -> None:
        """Recomputes what sparse layers derive from their parameters once an optimizer step."""
        if hasattr(getattr(self, "sparse", None), "refresh"):
            self.sparse = jax.vmap(_refreshed)(self.sparse)

    def unstack(self) -> None:
        """Gives every block and sparse layer arrays of its own, so that using one copies none.

        For inference: what is not stacked is not scanned.
        """
        config = self.config
        self.blocks = nnx.List(layer_of(self.blocks, i) for i in range(config.num_layers))
        if config.placements:
            self.sparse = nnx.List(layer_of(self.sparse, i) for i in range(len(config.placements)))

    def _run_segment(
        self,
        segment: Segment,
        x: Float[Array, "b t d"],
        *,
        store: Stores,
        mask: Bool[Array, "b 1 t t"] | None,
        cache: Sequence[KeyValueCache] | None,
        position: Int[Array, "#b"] | int,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any, list[KeyValueCache]]]:
        """Runs the copies of one group of blocks, scanned or unrolled."""
        config = self.config
        period, count = segment.period, len(segment.placements)
        # What each block and each sparse layer has of its own, by name.
        of_blocks: dict[str, Any] = {"block": self.blocks}
        if cache is not None:
            of_blocks["cache"] = cache
        of_sparse: dict[str, Any] = {}
        shared = None
        if segment.placements:
            of_sparse["layer"] = self.sparse
            if store is not None:
                shared, windows = self._windows(store)
                of_sparse |= windows

        def run(x: Float[Array, "b t d"], group: tuple[Any, Any]) -> tuple[Any, Any]:
            blocks, sparse = group
            return self._run_group(
                segment, x, blocks, sparse, shared=shared, mask=mask, position=position
            )

        if config.scan_layers and cache is None and not isinstance(self.blocks, nnx.List):

            def body(x: Float[Array, "b t d"], copy: tuple[Any, Any]) -> tuple[Any, Any]:
                blocks, sparse = copy
                members = [layer_of(blocks, i) for i in range(period)]
                return run(x, (members, [layer_of(sparse, i) for i in range(count)]))

            stacked = (
                _group(of_blocks, segment.start, period, segment.repeats),
                _group(of_sparse, segment.sparse_start, count, segment.repeats),
            )
            x, outputs = jax.lax.scan(_rematerialised(body, config.remat), x, stacked)
            # [repeats, members of the group, ...] -> [members of the segment, ...]
            ffn_variance, stats, _ = jax.tree.map(lambda a: jax.lax.collapse(a, 0, 2), outputs)
            return x, (ffn_variance, stats, [])

        run = _rematerialised(run, config.remat)
        collected: list[Any] = []
        for copy in range(segment.repeats):
            first, first_sparse = segment.start + copy * period, segment.sparse_start + copy * count
            blocks = [
                {name: layer_of(part, first + i) for name, part in of_blocks.items()}
                for i in range(period)
            ]
            sparse = [
                {name: layer_of(part, first_sparse + i) for name, part in of_sparse.items()}
                for i in range(count)
            ]
            x, output = run(x, (blocks, sparse))
            collected.append(output)
        ffn_variances, stats, caches = zip(*collected, strict=True)
        return x, (
            jnp.concatenate(ffn_variances),
            _concatenate(list(stats)) if count else None,
            [one for group in caches for one in group],
        )

    def _run_group(
        self,
        segment: Segment,
        x: Float[Array, "b t d"],
        blocks: list[dict[str, Any]],
        sparse: list[dict[str, Any]],
        *,
        shared: ValueStore | None,
        mask: Bool[Array, "b 1 t t"] | None,
        position: Int[Array, "#b"] | int,
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any, list[KeyValueCache]]]:
        """Runs one group; a sparse layer's output waits from its read to its write block."""
        member = 0
        waiting: dict[int, list[Float[Array, "b t d"]]] = {}
        ffn_variances, sparse_stats, caches = [], [], []
        for index, parts in enumerate(blocks):
            block = parts["block"]
            residual, y, new_cache = block.attend(
                x, mask=mask, cache=parts.get("cache"), position=position
            )
            fed_forward = block.feed_forward(y)
            x = residual + fed_forward
            if member < len(sparse) and segment.placements[member][0] == index:
                window = _window(sparse[member], shared)
                sparse_output, stats = sparse[member]["layer"](y, store=window)
                waiting.setdefault(segment.placements[member][1], []).append(sparse_output)
                sparse_stats.append(stats)
                member += 1
            for sparse_output in waiting.pop(index, ()):
                x = x + sparse_output
            ffn_variances.append(jnp.var(fed_forward.astype(jnp.float32)))
            if new_cache is not None:
                caches.append(new_cache)
        stats = _stack_trees(sparse_stats) if sparse_stats else None
        return x, (jnp.stack(ffn_variances), stats, caches)

    def _windows(
        self, store: ValueStore | Sequence[ValueStore]
    ) -> tuple[ValueStore | None, dict[str, Any]]:
        """Returns the store that memory layers share, and what each has of its own.

        That is the first row of its window and, where nothing is shared, its table: a slice of the
        scanned input, so that its gradient is a slice too, and not a sum of whole stores.
        """
        memory, count = self.config.memory, len(self.config.placements)
        if not isinstance(store, ValueStore) or memory.sharing == "none":
            return None, {"table": store, "start": jnp.zeros(count, jnp.int32)}
        starts = retrieval.window_starts(count, memory.sharing, memory.share_group)
        return store, {"start": jnp.asarray(starts * memory.num_values, jnp.int32)}


def layer_of(stack: Any, index: int) -> Any:
    """Returns one member of a sequence of layers, or of what is stacked along its first axis."""
    if isinstance(stack, list | tuple | nnx.List):
        return stack[index]
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _window(parts: dict[str, Any], shared: ValueStore | None) -> StoreWindow | None:
    """Returns what one sparse layer sees of the value store, if there is one."""
    if "start" not in parts:
        return None
    return StoreWindow(store=shared or parts["table"], start=parts["start"])


def _stack(create: Callable[[Any], Any], key: Key[Array, ""], name: str, count: int) -> Any:
    """Creates `count` modules whose variables are stacked along a new first axis."""
    return jax.vmap(create)(jax.random.split(layers.named_key(key, name), count))


def _refreshed(layer: Any) -> Any:
    layer.refresh()
    return layer


def _group(tree: Any, start: int, size: int, repeats: int) -> Any:
    """Takes stacked members from `start` on as [repeats, size, ...]."""

    def take(leaf: Array) -> Array:
        leaf = leaf[start : start + size * repeats]
        return leaf.reshape(repeats, size, *leaf.shape[1:])

    return jax.tree.map(take, tree)


def _stack_trees(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _concatenate(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _rematerialised(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    if jax.config.jax_disable_jit:  # it would trace the body, where a print shows no numbers
        return body
    match remat:
        case "full":
            return jax.checkpoint(body)
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(body, policy=policy)
        case _:
            return body
