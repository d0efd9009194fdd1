"""Sizes of a launch of the Hopper kernel, and the shared-memory layout of a thread block."""

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

BLOCK_KEYS = 64  # rows of a wgmma product
_TILE_ROWS = 8  # rows of the tiles in which wgmma reads its operands
_RESERVED_BYTES = 4 * 2**10  # for barriers, alignment and Mosaic's own use


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is partitioned."""

    tokens: int  # tokens per thread block, a multiple of 8
    cluster: int  # thread blocks that share each read of the keys: 1, 2, 4 or 8
    stages: int  # buffers of keys per warpgroup
    columns: int  # columns of keys per buffer, one of `Plan.widths`
    key_depth: int  # length of the list of keys of each lane
    pair_depth: int  # length of the list of pairs of each lane

    @property
    def groups(self) -> int:
        """Warpgroups per thread block."""
        return self.tokens // TOKENS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a launch, and derived sizes."""

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
        """Whether the score of a pair is the sum of the scores of its keys."""
        return self.num_cores == 0

    @property
    def num_parts(self) -> int:
        """Number of bfloat16 parts into which query and keys are split."""
        return 1 if self.dtype == jnp.bfloat16 else 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Allowed columns per buffer of keys: divisors of the key dim, at most 128 bytes."""
        widths = (64, 32) if self.dtype == jnp.bfloat16 else (32,)
        return tuple(width for width in widths if self.padded_dim % width == 0) or (16,)

    @property
    def padded_dim(self) -> int:
        """Key dim in the kernel; splitting float32 into parts needs a multiple of the lanes."""
        return padded(self.key_dim, 16 if self.dtype == jnp.bfloat16 else LANES)

    @property
    def padded_keys(self) -> int:
        """Keys of a side and rank in the kernel; see `first_row`."""
        minimum = BLOCK_KEYS + _TILE_ROWS  # so that the blocks of a rank do not exceed all keys
        in_tiles = 2 * self.num_heads * self.rank * self.num_keys % _TILE_ROWS == 0
        if in_tiles and self.num_keys >= minimum:
            return self.num_keys
        return padded(max(self.num_keys, minimum), _TILE_ROWS // 2)

    @property
    def num_blocks(self) -> int:
        """Blocks of keys of one rank, the first of which may start up to 7 keys early."""
        return pl.cdiv(self.padded_keys + _TILE_ROWS - 1, BLOCK_KEYS)

    @property
    def key_rows(self) -> int:
        """Rows of S of one rank."""
        return self.num_blocks * BLOCK_KEYS

    def first_row(self, head: Array, side: int, rank: Any) -> tuple[Array, Array]:
        """First row to copy for a head, side and rank, and how many keys to skip from there.

        Rows index the keys of all heads, sides and ranks. Keys are copied in full tiles of 8 rows,
        even if those of a side and rank start within a tile. Blocks that would end after the last
        key of all start earlier.
        """
        first_key = ((head * 2 + side) * self.rank + rank) * self.padded_keys
        aligned = lax.div(first_key, _TILE_ROWS) * _TILE_ROWS
        latest = 2 * self.num_heads * self.rank * self.padded_keys - self.key_rows
        first = pl.multiple_of(jnp.minimum(aligned, latest), _TILE_ROWS)
        return first, first_key - first

    @property
    def list_size(self) -> int:
        """Padded length of a shortlist, a multiple of the lanes."""
        return padded(self.shortlist, LANES)

    @property
    def reach(self) -> int:
        """The reach of the staircase: row i, from 1, has reach / i columns."""
        return self.top_m * (1 if self.additive else xla.TUCKER_REACH)

    @property
    def num_inside(self) -> int:
        """Number of pairs inside the staircase; 0 if the staircase does not pay off."""
        inside = sum(min(self.shortlist, self.reach // i) for i in range(1, self.shortlist + 1))
        return inside if inside <= xla.MAX_INSIDE_FRACTION * self.shortlist**2 else 0

    @property
    def score_rows(self) -> int:
        """Rows of the buffer for S of one side, which the candidate pairs reuse."""
        # Reads and writes always take 32 rows, so pad for the last one.
        return max(self.rank * self.key_rows, padded(self.num_inside, LANES)) + LANES

    def shared_bytes(self, blocks: Blocks) -> int:
        """Shared memory of a thread block."""
        scores = 4 * self.score_rows * (blocks.tokens + 2)
        lists = 4 * blocks.tokens * 2 * (1 + self.rank) * self.list_size
        places = 4 * blocks.tokens * padded(self.top_m, LANES)
        ring = blocks.stages * (BLOCK_KEYS + blocks.tokens) * blocks.columns * self.dtype.itemsize
        parts = 0
        if self.num_parts > 1:
            parts = 2 * (BLOCK_KEYS + self.num_parts * blocks.tokens) * blocks.columns
        return scores + lists + places + blocks.groups * (ring + parts) + _RESERVED_BYTES

    def places(self) -> Array:
        """The row-major index in the grid of each candidate inside the staircase."""
        rows = range(1, self.shortlist + 1)
        size = self.shortlist
        places = [
            np.arange(min(size, self.reach // i), dtype=np.int32) + (i - 1) * size for i in rows
        ]
        flat = np.concatenate(places)[: self.num_inside]
        return jnp.asarray(np.pad(flat, (0, padded(len(flat) + 1, LANES) - len(flat))))


class Scratch:
    """The scratch refs of a thread block, in the order of `types`."""

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
        """The types of the constructor's arguments, in order."""
        groups, tokens, columns = blocks.groups, blocks.tokens, blocks.columns
        ring, swizzled = (groups, blocks.stages), _swizzled(columns, plan.dtype)
        # A float32 query is read row by row, so it is not swizzled.
        query_transforms = swizzled if plan.num_parts == 1 else ()
        types = [
            plgpu.SMEM((*ring, BLOCK_KEYS, columns), plan.dtype, transforms=swizzled),
            plgpu.SMEM((*ring, tokens, columns), plan.dtype, transforms=query_transforms),
            # Barriers: keys and query have arrived in a buffer; all thread blocks of the cluster
            # have consumed it; all of them begin a side; all warpgroups of this thread block have
            # reached the same point.
            plgpu.Barrier(num_arrivals=2, num_barriers=groups * blocks.stages),
            plgpu.ClusterBarrier(collective_axes=("peer",), num_barriers=groups * blocks.stages),
            plgpu.ClusterBarrier(collective_axes=("peer",), num_barriers=groups),
            plgpu.Barrier(num_arrivals=groups),
            # Two extra columns, to avoid bank conflicts when reading a column.
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

    def of(self, group: Array) -> "GroupScratch":
        """The scratch of the four tokens of a warpgroup."""
        tokens = pl.ds(group * TOKENS, TOKENS)
        return GroupScratch(
            self.scores, self.lists, self.places.at[tokens], self.flags.at[group], tokens
        )


@dataclasses.dataclass(frozen=True)
class GroupScratch:
    """The scratch of the four tokens of a warpgroup."""

    all_scores: Any
    all_lists: Any
    places: Any
    flags: Any
    tokens: Any

    def scores(self, first_row: Any) -> Any:
        """A ref to 32 rows of the scores of these tokens, [4, 32]."""
        return self.all_scores.at[pl.ds(first_row, LANES), self.tokens].T

    def list(self, side: int, word: int) -> Any:
        """A ref to indices (word 0) or S of a rank (word 1 + rank) of the shortlist: [4, size]."""
        return self.all_lists.at[side, word, self.tokens]


def _swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """The transforms of wgmma operands in shared memory with this many columns."""
    mosaic: Any = plgpu  # mypy takes its transforms for abstract classes
    row_bytes = columns * jnp.dtype(dtype).itemsize
    return mosaic.TilingTransform((_TILE_ROWS, columns)), mosaic.SwizzleTransform(row_bytes)
