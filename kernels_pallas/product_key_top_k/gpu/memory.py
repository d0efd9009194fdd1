"""Sizes of a launch of the Hopper kernel, and what lies where in the shared memory of a block."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import padded
from kernels_pallas.product_key_top_k import xla
from kernels_pallas.product_key_top_k.call import TopKCall
from kernels_pallas.product_key_top_k.gpu.select import LANES, TOKENS

BLOCK_KEYS = 64  # rows of a product of the matrix units
_TILE_ROWS = 8  # of the tiles in which they read their operands
_RESERVED_BYTES = 4 * 2**10  # for barriers, alignment and what Mosaic keeps


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut."""

    tokens: int  # of a block, a multiple of 8
    cluster: int  # blocks that read each key together: 1, 2, 4 or 8
    stages: int  # buffers of keys of each warpgroup
    columns: int  # of the keys in a buffer, one of `Plan.widths`
    key_depth: int  # of the lists of keys in each lane
    pair_depth: int  # of the lists of pairs in each lane

    @property
    def groups(self) -> int:
        """Warpgroups of a block."""
        return self.tokens // TOKENS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a launch, and what follows from them."""

    num_heads: int
    rank: int
    num_tokens: int
    num_keys: int
    key_dim: int
    num_cores: int  # 0: additive scores
    top_m: int
    shortlist: int
    dtype: Any
    with_chosen: bool

    @classmethod
    def of(cls, call: TopKCall, with_chosen: bool = True) -> "Plan":
        """The sizes of a call of `product_key_top_k`, with or without S of the chosen keys."""
        query, keys, cores = call.query, call.keys, call.cores
        num_heads, _, rank, num_keys, key_dim = keys.shape
        num_cores = 0 if cores is None else cores.shape[0]
        is_half = query.dtype == keys.dtype == jnp.bfloat16
        dtype = jnp.dtype(jnp.bfloat16 if is_half else jnp.float32)
        return cls(
            num_heads=num_heads,
            rank=rank,
            num_tokens=query.shape[3],
            num_keys=num_keys,
            key_dim=key_dim,
            num_cores=num_cores,
            top_m=call.top_m,
            shortlist=call.shortlist,
            dtype=dtype,
            with_chosen=with_chosen,
        )

    @property
    def additive(self) -> bool:
        """Whether a score is the sum of those of its keys."""
        return self.num_cores == 0

    @property
    def num_parts(self) -> int:
        """Numbers of bfloat16 that make up one of query or keys."""
        return 1 if self.dtype == jnp.bfloat16 else 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of keys that a buffer may have: a part of the key dim, no more than 128 bytes."""
        widths = (64, 32) if self.dtype == jnp.bfloat16 else (32,)
        return tuple(width for width in widths if self.padded_dim % width == 0) or (16,)

    @property
    def padded_dim(self) -> int:
        """Key dim as the kernel sees it; float32 is split into its parts by whole rows of lanes."""
        return padded(self.key_dim, 16 if self.dtype == jnp.bfloat16 else LANES)

    @property
    def padded_keys(self) -> int:
        """Keys of a side and rank as the kernel sees them; see `first_row`."""
        least = BLOCK_KEYS + _TILE_ROWS  # so that the blocks of a rank are no more than there is
        in_tiles = 2 * self.num_heads * self.rank * self.num_keys % _TILE_ROWS == 0
        if in_tiles and self.num_keys >= least:
            return self.num_keys
        return padded(max(self.num_keys, least), _TILE_ROWS // 2)

    @property
    def num_blocks(self) -> int:
        """Blocks of keys of one rank, which start up to 7 keys early."""
        return pl.cdiv(self.padded_keys + _TILE_ROWS - 1, BLOCK_KEYS)

    @property
    def key_rows(self) -> int:
        """Rows of S of one rank, a block of keys after the other."""
        return self.num_blocks * BLOCK_KEYS

    def first_row(self, head: Array, side: int, rank: Any) -> tuple[Array, Array]:
        """Row of the first block among the keys of all heads, sides and ranks, and keys before it.

        Keys are copied in whole tiles of 8 rows, wherever those of a side and rank begin. Blocks
        that would end beyond the last key of all begin earlier.
        """
        first_key = ((head * 2 + side) * self.rank + rank) * self.padded_keys
        aligned = lax.div(first_key, _TILE_ROWS) * _TILE_ROWS
        latest = 2 * self.num_heads * self.rank * self.padded_keys - self.key_rows
        first = pl.multiple_of(jnp.minimum(aligned, latest), _TILE_ROWS)
        return first, first_key - first

    @property
    def list_size(self) -> int:
        """Places for a shortlist: whole rows of lanes."""
        return padded(self.shortlist, LANES)

    @property
    def reach(self) -> int:
        """Row i of the staircase, from 1, has reach / i columns."""
        return self.top_m * (1 if self.additive else xla.TUCKER_REACH)

    @property
    def num_inside(self) -> int:
        """Pairs of the staircase; 0 if it is not worth while."""
        inside = sum(min(self.shortlist, self.reach // i) for i in range(1, self.shortlist + 1))
        return inside if inside <= xla.MOST_INSIDE * self.shortlist**2 else 0

    @property
    def score_rows(self) -> int:
        """Rows of the buffer for S of one side, and for the candidates after that."""
        # 32 are read or written at once, however few are left.
        return max(self.rank * self.key_rows, padded(self.num_inside, LANES)) + LANES

    def shared_bytes(self, blocks: Blocks) -> int:
        """Shared memory of a block."""
        scores = 4 * self.score_rows * (blocks.tokens + 2)
        lists = 4 * blocks.tokens * 2 * (1 + self.rank) * self.list_size
        places = 4 * blocks.tokens * padded(self.top_m, LANES)
        ring = blocks.stages * (BLOCK_KEYS + blocks.tokens) * blocks.columns * self.dtype.itemsize
        parts = 0
        if self.num_parts > 1:
            parts = 2 * (BLOCK_KEYS + self.num_parts * blocks.tokens) * blocks.columns
        return scores + lists + places + blocks.groups * (ring + parts) + _RESERVED_BYTES

    def places(self) -> Array:
        """Of each candidate inside the staircase its place in the grid, row by row."""
        rows = range(1, self.shortlist + 1)
        size = self.shortlist
        places = [
            np.arange(min(size, self.reach // i), dtype=np.int32) + (i - 1) * size for i in rows
        ]
        flat = np.concatenate(places)[: self.num_inside]
        return jnp.asarray(np.pad(flat, (0, padded(len(flat) + 1, LANES) - len(flat))))


class Scratch:
    """The memory of a block, as `types` lists it."""

    def __init__(
        self,
        keys: Any,
        query: Any,
        arrived: Any,
        free: Any,
        begun: Any,
        together: Any,
        scores: Any,
        lists: Any,
        places: Any,
        flags: Any,
        key_part: Any = None,
        query_parts: Any = None,
    ) -> None:
        self.keys, self.query, self.together = keys, query, together
        self.arrived, self.free, self.begun = arrived, free, begun
        self.scores, self.lists, self.places, self.flags = scores, lists, places, flags
        self.key_part, self.query_parts = key_part, query_parts

    @staticmethod
    def types(plan: Plan, blocks: Blocks) -> list[Any]:
        """What the constructor takes, in that order."""
        groups, tokens, columns = blocks.groups, blocks.tokens, blocks.columns
        ring, swizzled = (groups, blocks.stages), _swizzled(columns, plan.dtype)
        # A query in float32 is read row by row, so it lies row by row.
        query_transforms = swizzled if plan.num_parts == 1 else ()
        types = [
            plgpu.SMEM((*ring, BLOCK_KEYS, columns), plan.dtype, transforms=swizzled),
            plgpu.SMEM((*ring, tokens, columns), plan.dtype, transforms=query_transforms),
            # Barriers: keys and query have arrived in a buffer; all blocks of the cluster are done
            # with it; they all begin a side; the warpgroups of this block are all as far.
            plgpu.Barrier(num_arrivals=2, num_barriers=groups * blocks.stages),
            plgpu.ClusterBarrier(collective_axes=("peer",), num_barriers=groups * blocks.stages),
            plgpu.ClusterBarrier(collective_axes=("peer",), num_barriers=groups),
            plgpu.Barrier(num_arrivals=groups),
            # Two columns more, to spread a column over the banks of the memory.
            plgpu.SMEM((plan.score_rows, tokens + 2), jnp.int32),
            plgpu.SMEM((2, 1 + plan.rank, tokens, plan.list_size), jnp.int32),
            plgpu.SMEM((tokens, padded(plan.top_m, LANES)), jnp.int32),
            plgpu.SMEM((groups, TOKENS), jnp.int32),
        ]
        if plan.num_parts == 1:
            return types
        halves = _swizzled(columns, jnp.bfloat16)
        query_shape = (groups, plan.num_parts, tokens, columns)
        return [
            *types,
            plgpu.SMEM((groups, BLOCK_KEYS, columns), jnp.bfloat16, transforms=halves),
            plgpu.SMEM(query_shape, jnp.bfloat16, transforms=halves),
        ]

    def of(self, group: Array) -> "Mine":
        """What belongs to the four tokens of a warpgroup."""
        tokens = pl.ds(group * TOKENS, TOKENS)
        return Mine(self.scores, self.lists, self.places.at[tokens], self.flags.at[group], tokens)


@dataclasses.dataclass(frozen=True)
class Mine:
    """What belongs to the four tokens of a warpgroup."""

    all_scores: Any
    all_lists: Any
    places: Any
    flags: Any
    tokens: Any

    def scores(self, first_row: Any) -> Any:
        """32 rows of the scores of these tokens, [4, 32]."""
        return self.all_scores.at[pl.ds(first_row, LANES), self.tokens].T

    def list(self, side: int, word: int) -> Any:
        """Numbers (word 0) or S of a rank (word 1 + rank) of the shortlist, [4, list_size]."""
        return self.all_lists.at[side, word, self.tokens]


def _swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """How rows of that many columns lie in shared memory for the matrix units."""
    mosaic: Any = plgpu  # whose transforms mypy takes for abstract classes
    row_bytes = columns * jnp.dtype(dtype).itemsize
    return mosaic.TilingTransform((_TILE_ROWS, columns)), mosaic.SwizzleTransform(row_bytes)
