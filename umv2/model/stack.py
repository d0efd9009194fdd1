"""The stack of blocks, scanned so that compile time does not grow with depth.

If only some blocks have a memory layer, the scan is over the smallest repeating group of blocks;
blocks that do not repeat are unrolled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2 import kernels, sharding
from umv2.config import ModelConfig
from umv2.model.attention import KeyValueCache
from umv2.model.block import FeedForwardStats
from umv2.model.memory.store import Windows
from umv2.model.rematerialization import rematerialized
from umv2.model.slots import MemoryStats, Observe

# On one CPU, up to this many blocks are unrolled even if they could be scanned: a scan stacks what
# the backward pass needs, which takes memory bandwidth. A step of UltraMemV2 takes 0.206 s scanned
# and 0.183 s unrolled at `tiny`, 0.947 and 0.718 s at `cpu_small`; it compiles in 6.9 and 8.5 s.
MAX_UNROLLED_ON_CPU = 8


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` copies of a group of `period` blocks, starting at block `start`.

    `placements` are the (read, write) blocks of the group's memory layers, relative to the start of
    the group; `memory_start` is the index of the first memory layer of the first copy.
    """

    start: int
    period: int
    repeats: int
    memory_start: int
    placements: tuple[tuple[int, int], ...]


def plan_segments(num_layers: int, placements: tuple[tuple[int, int], ...]) -> tuple[Segment, ...]:
    """Splits the blocks into segments of repeating groups.

    A memory layer reads and writes within one group. At each position, takes the group whose copies
    cover the most blocks (the shortest if there are several), or, if none repeats, one copy of the
    shortest group.
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
                memory_start = sum(read < start for read, _ in placements)
                best = Segment(start, period, repeats, memory_start, members)
        assert best is not None  # the group of all remaining blocks always qualifies
        segments.append(best)
        start += best.period * best.repeats
    return tuple(segments)


class StackOutput(NamedTuple):
    """The residual stream after all blocks, the statistics, and the updated caches."""

    x: Float[Array, "b t d"]
    feed_forward: FeedForwardStats
    memory: MemoryStats | None
    caches: list[KeyValueCache]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Runs the blocks and memory layers of a model.

    Attributes:
      config: model configuration.
      blocks: the blocks, stacked along their leading axis or, at inference, as a list.
      memory: the memory layers, likewise; None if there are none.
      windows: windows of the value tables.
      segment_ids: positions attend only to positions with the same id; None: to all earlier ones.
      position: position of the first token.
      prefill: whether the caches are empty.
      observe: the statistics to compute.
    """

    config: ModelConfig
    blocks: Any
    memory: Any
    windows: Windows
    segment_ids: Int[Array, "b t"] | None
    position: Int[Array, "#b"] | int
    prefill: bool
    observe: Observe

    def __call__(
        self, x: Float[Array, "b t d"], cache: Sequence[KeyValueCache] | None
    ) -> StackOutput:
        """Applies all blocks. With a cache they are unrolled: a scan would copy the cache."""
        outputs = []
        for segment in plan_segments(self.config.num_layers, self.config.placements):
            output = self._run_segment(segment, x, cache)
            x = output.x
            outputs.append(output)
        memory = [output.memory for output in outputs if output.memory is not None]
        return StackOutput(
            x=x,
            feed_forward=_concatenate([output.feed_forward for output in outputs]),
            memory=_concatenate(memory) if memory else None,
            caches=[cache for output in outputs for cache in output.caches],
        )

    def _run_segment(
        self, segment: Segment, x: Float[Array, "b t d"], cache: Sequence[KeyValueCache] | None
    ) -> StackOutput:
        """Applies all copies of one group of blocks, scanned or unrolled."""
        config = self.config
        period, count = segment.period, len(segment.placements)
        # The per-block and per-memory-layer inputs, by name.
        block_inputs: dict[str, Any] = {"block": self.blocks}
        if cache is not None:
            block_inputs["cache"] = cache
        memory_inputs = {"layer": self.memory, "own": self.windows.own} if count else {}

        def run(x: Float[Array, "b t d"], group: tuple[Any, Any]) -> tuple[Any, Any]:
            return self._run_group(segment, x, *group)

        if self._scans(segment, cache):

            def body(x: Float[Array, "b t d"], copy: tuple[Any, Any]) -> tuple[Any, Any]:
                blocks, memory = copy
                members = [layer_of(blocks, i) for i in range(period)]
                return run(x, (members, [layer_of(memory, i) for i in range(count)]))

            stacked = (
                _group(block_inputs, segment.start, period, segment.repeats),
                _group(memory_inputs, segment.memory_start, count, segment.repeats),
            )
            with jax.named_scope("layers"):
                x, outputs = jax.lax.scan(rematerialized(body, config.remat), x, stacked)
            # [repeats, layers per group, ...] -> [layers of the segment, ...]
            feed_forward, memory, _ = jax.tree.map(lambda a: jax.lax.collapse(a, 0, 2), outputs)
            return StackOutput(x, feed_forward, memory, [])

        run = rematerialized(run, config.remat)
        collected: list[Any] = []
        for copy in range(segment.repeats):
            first, first_memory = segment.start + copy * period, segment.memory_start + copy * count
            blocks = [_member(block_inputs, first + i) for i in range(period)]
            members = [_member(memory_inputs, first_memory + i) for i in range(count)]
            x, output = run(x, (blocks, members))
            collected.append(output)
        feed_forward, memory, caches = zip(*collected, strict=True)
        return StackOutput(
            x,
            _concatenate(list(feed_forward)),
            _concatenate(list(memory)) if count else None,
            [cache for group in caches for cache in group],
        )

    def _scans(self, segment: Segment, cache: Sequence[KeyValueCache] | None) -> bool:
        """Returns whether the copies of a group are scanned, rather than unrolled."""
        if not self.config.scan_layers or cache is not None or isinstance(self.blocks, nnx.List):
            return False
        on_one_cpu = kernels.platform() == "cpu" and sharding.num_devices() == 1
        return not on_one_cpu or segment.period * segment.repeats > MAX_UNROLLED_ON_CPU

    def _run_group(
        self,
        segment: Segment,
        x: Float[Array, "b t d"],
        blocks: list[dict[str, Any]],
        memory: list[dict[str, Any]],
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any, list[KeyValueCache]]]:
        """Applies one group; a memory layer's output is held from its read to its write block."""
        member = 0
        pending: dict[int, list[Float[Array, "b t d"]]] = {}
        feed_forward, memory_stats, caches = [], [], []
        for index, parts in enumerate(blocks):
            block = parts["block"]
            with jax.named_scope("attention_block"):
                residual, y, cache = block.attend(
                    x,
                    segment_ids=self.segment_ids,
                    cache=parts.get("cache"),
                    position=self.position,
                    prefill=self.prefill,
                )
            with jax.named_scope("feed_forward"):
                x, stats = block.feed_forward(residual, y, observe=self.observe)
            if member < len(memory) and segment.placements[member][0] == index:
                window = self.windows.at(memory[member]["own"])
                layer = memory[member]["layer"]
                with jax.named_scope("memory"):
                    output, layer_stats = layer(y, window=window, observe=self.observe)
                pending.setdefault(segment.placements[member][1], []).append(output)
                memory_stats.append(layer_stats)
                member += 1
            with jax.named_scope("memory"):
                for output in pending.pop(index, ()):
                    x = x + output
            feed_forward.append(stats)
            if cache is not None:
                caches.append(cache)
        return x, (
            _stack_trees(feed_forward),
            _stack_trees(memory_stats) if memory_stats else None,
            caches,
        )


def layer_of(stack: Any, index: int) -> Any:
    """Returns one layer of a list of layers or of a stacked tree."""
    if isinstance(stack, list | tuple | nnx.List):
        return stack[index]
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _member(parts: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns the inputs of one block or memory layer."""
    return {
        name: _member(part, index) if isinstance(part, dict) else layer_of(part, index)
        for name, part in parts.items()
    }


def _group(tree: Any, start: int, size: int, repeats: int) -> Any:
    """Slices stacked layers from `start` on and reshapes them to [repeats, size, ...]."""

    def take(leaf: Array) -> Array:
        leaf = leaf[start : start + size * repeats]
        return leaf.reshape(repeats, size, *leaf.shape[1:])

    return jax.tree.map(take, tree)


def _stack_trees(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _concatenate(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
