"""Pipelined fetches of table rows on a GPU, in Pallas Mosaic GPU.

One bulk copy (`cp.async.bulk`) per row moves it from device memory into a ring of buffers in shared
memory, which keeps many rows in flight. A warpgroup loads four rows at a time, a quad, one per
warp: a reduction along a row only involves the 32 lanes of one warp, and sums over rows stay in
registers until the end. Rows whose width is not a multiple of 64 elements are padded in shared
memory; the padding is never copied, and its contents never affect a result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch
from kernels_pallas.common import match_vma

QUAD = 4  # rows, one for each warp of a warpgroup
COLUMNS = 64  # columns of a tile: two adjacent ones per lane
COPY_BYTES = 16  # a bulk copy moves a multiple of this
_SECTOR_BYTES = 32  # of device memory
SHARED_BYTES = 227 * 2**10  # maximum per thread block
OTHER_SHARED_BYTES = 8 * 2**10  # barriers, scratch of reductions, alignment
_COMPUTE_CAPABILITY = 9  # Hopper

# [QUAD, COLUMNS] has one row per warp; [COLUMNS] and [QUAD] are its reductions along an axis.
_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((QUAD, COLUMNS), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
_ROW_OF_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((COLUMNS,), (2,))),
    warp_dims=(plgpu.Replicated(QUAD),),
    lane_dims=(-2,),
    vector_dim=-1,
)
_COLUMN_OF_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((QUAD,), (1,))),
    warp_dims=(-2,),
    lane_dims=(plgpu.Replicated(32),),
    vector_dim=-1,
)


def device_reasons(platform: str) -> list[tuple[bool, str]]:
    """Conditions under which the device does not support bulk copies, with the reasons in words."""
    capability = dispatch.compute_capability()
    too_old = capability is not None and _major(capability) < _COMPUTE_CAPABILITY
    return [
        (platform != "gpu", f"it compiles for GPU, not for {platform}"),
        (
            too_old,
            f"it needs compute capability 9.0 (Hopper) or more, the device has {capability}",
        ),
    ]


def _major(capability: str) -> int:
    """The major version: 9 for "9.0"; 0 if the device is not an NVIDIA GPU."""
    major = capability.split(".", maxsplit=1)[0]
    return int(major) if major.isdigit() else 0


class Columns(NamedTuple):
    """The columns of a row that a tile holds; only the first `width` belong to the row."""

    start: int
    width: int

    @property
    def slice(self) -> Any:
        """The slice of the tile in shared memory, including padding."""
        return pl.ds(self.start, COLUMNS)

    def before(self, column: int) -> Array:
        """Mask of the columns of a tile before a given column of the row: [QUAD, COLUMNS]."""
        shape = (QUAD, COLUMNS)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
        return position < column - self.start


def columns_of(width: int) -> Iterator[Columns]:
    """The tiles of a row, from left to right."""
    for start in range(0, width, COLUMNS):
        yield Columns(start, min(COLUMNS, width - start))


def padded(width: int) -> int:
    """The padded width of a row in shared memory."""
    return -(-width // COLUMNS) * COLUMNS


def sector_bytes(width: int, dtype: Any) -> int:
    """Bytes that reading a row moves: it spans full sectors wherever in the table it is."""
    return pl.cdiv(width * jnp.dtype(dtype).itemsize, _SECTOR_BYTES) * _SECTOR_BYTES


def copy_in(source: Any, target: Any, arrived: Any) -> None:
    """Starts the copy of a row to shared memory, which signals the barrier `arrived`."""
    # Only copies that are known to be in bounds become bulk copies; others need a descriptor.
    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    plgpu.copy_gmem_to_smem(source, target.at[pl.ds(0, source.shape[0])], arrived, oob_mode=mode)


class Ring(NamedTuple):
    """A ring of shared-memory buffers for the rows of `stages` steps, with a barrier per stage."""

    tables: Mapping[str, Any]  # in device memory
    buffers: Mapping[str, Any]  # for each table, [stages, rows, padded width]
    arrived: Any  # barriers, one per stage

    def start(self, step: Array, row_of: Callable[[Array], Array]) -> None:
        """Starts the copies of a step; its i-th row comes from row `row_of(i)` of every table."""
        stages, rows, _ = next(iter(self.buffers.values())).shape
        stage = lax.rem(step, stages)

        def start_rows_of_warp(warp: Array) -> None:
            places = [QUAD * quad + warp for quad in range(rows // QUAD)]
            # Read all ids before starting the first copy, so that the loads overlap.
            sources = [row_of(place) for place in places]
            for place, source in zip(places, sources, strict=True):
                for name, table in self.tables.items():
                    target = self.buffers[name].at[stage, place]
                    copy_in(table.at[source], target, self.arrived.at[stage])

        plgpu.warp_map(start_rows_of_warp)

    def refill(self, step: Array, row_of: Callable[[Array], Array]) -> None:
        """Starts the copies of a step into a stage that has been consumed."""
        # Copies run on the async proxy: order prior reads before the copies overwrite them.
        plgpu.commit_smem()
        self.start(step, row_of)

    def wait(self, step: Array) -> Array:
        """Waits until the rows of a step have arrived; returns their stage."""
        stages, *_ = next(iter(self.buffers.values())).shape
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(self.arrived.at[stage])
        return stage

    def tile(self, name: str, stage: Array, quad: int, columns: Columns) -> Array:
        """Loads columns of the four rows of a quad as float32: [QUAD, COLUMNS]."""
        buffer = self.buffers[name].at[stage, pl.ds(QUAD * quad, QUAD), columns.slice]
        return plgpu.load(buffer, layout=_TILE).astype(jnp.float32)


def ring_scratch(
    widths: Sequence[int], dtypes: Sequence[Any], rows: int, stages: int
) -> tuple[list[Any], Any]:
    """The buffers of a ring for rows of these widths, and its barriers."""
    buffers = [
        plgpu.SMEM((stages, rows, padded(width)), dtype)
        for width, dtype in zip(widths, dtypes, strict=True)
    ]
    return buffers, plgpu.Barrier(num_arrivals=rows * len(buffers), num_barriers=stages)


def zeros_tile() -> Array:
    """A tile of zeros: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(jnp.zeros((QUAD, COLUMNS), jnp.float32), _TILE)


def load_row_of_tile(row: Any, columns: Columns) -> Array:
    """Loads columns of a row in shared memory: [COLUMNS]."""
    return plgpu.load(row.at[columns.slice], layout=_ROW_OF_TILE)


def load_column_of_tile(column: Any) -> Array:
    """Loads four numbers, one for each row of a quad, from shared or device memory: [QUAD]."""
    return plgpu.load(column, layout=_COLUMN_OF_TILE, optimized=False)


def across_rows(row: Array) -> Array:
    """Broadcasts [COLUMNS] over the rows of a quad: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (QUAD, COLUMNS), (1,)), _TILE)


def across_columns(column: Array) -> Array:
    """Broadcasts [QUAD] over the columns of a tile: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(column, (QUAD, COLUMNS), (0,)), _TILE)


def row_positions() -> Array:
    """The row index of each element of a tile: [QUAD, COLUMNS]."""
    return plgpu.broadcasted_iota(jnp.int32, (QUAD, COLUMNS), 0, layout=_TILE)


def call_kernels(function: Callable[..., Sequence[Array]], *operands: Array) -> list[Array]:
    """Calls a function that launches kernels, with support for vmap and `jax.shard_map`.

    vmap becomes a loop of calls, because Pallas cannot batch refs that a kernel updates in place.
    Inside `shard_map`, `warp_map` rejects arrays that vary over manual axes, although no kernel
    here communicates. So the function is traced as if its operands did not vary, and its results
    are then marked as varying over the same axes as the operands.
    """

    @custom_batching.sequential_vmap
    def call(*operands: Array) -> list[Array]:
        unvarying = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
        traced = jax.make_jaxpr(function)(*unvarying)
        return match_vma(jax.extend.core.jaxpr_as_fun(traced)(*operands), operands)

    return call(*match_vma(list(operands)))
