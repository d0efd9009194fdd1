"""Rows of tables on their way through a streaming multiprocessor of a GPU, in Pallas Mosaic GPU.

A row is copied by one bulk copy (`cp.async.bulk`) from device to shared memory, where a ring of
buffers keeps many on their way. From there a warpgroup takes four rows at a time, a quad, one a
warp: a sum along a row is a matter of the 32 lanes of one warp, and what is added up over rows
stays in registers until the end. Rows that are no multiple of 64 elements wide have padding in
shared memory, which is never read as a number: it costs no traffic.
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
from kernels_pallas.common import vary_alike

QUAD = 4  # rows, one for each warp of a warpgroup
COLUMNS = 64  # of a tile: two neighbours for each lane
COPY_BYTES = 16  # a bulk copy moves a multiple of them
SHARED_BYTES = 227 * 2**10  # that a block may have
OTHER_SHARED_BYTES = 8 * 2**10  # barriers, scratch of reductions, alignment
_COMPUTE_CAPABILITY = 9  # Hopper

# [QUAD, COLUMNS] has a row a warp; [QUAD] and [COLUMNS] are what is left of it along an axis.
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
    """Whether a platform or the attached device does without bulk copies, and the words for it."""
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
    """9 of "9.0"; 0 of what is no NVIDIA GPU."""
    major = capability.split(".", maxsplit=1)[0]
    return int(major) if major.isdigit() else 0


class Columns(NamedTuple):
    """The part of a row that a tile holds; `width` of its columns belong to the row."""

    start: int
    width: int

    @property
    def slice(self) -> Any:
        """The columns of the tile, with padding, in shared memory."""
        return pl.ds(self.start, COLUMNS)

    def before(self, column: int) -> Array:
        """Which columns of a tile stand before a column of the row: [QUAD, COLUMNS]."""
        shape = (QUAD, COLUMNS)
        position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
        return position < column - self.start


def columns_of(width: int) -> Iterator[Columns]:
    """The tiles of a row, from left to right."""
    for start in range(0, width, COLUMNS):
        yield Columns(start, min(COLUMNS, width - start))


def padded(width: int) -> int:
    """The width of a row in shared memory."""
    return -(-width // COLUMNS) * COLUMNS


def copy_in(source: Any, target: Any, arrived: Any) -> None:
    """Starts the copy of a row to shared memory, which `arrived` will tell of."""
    # Only a copy that is known to lie in bounds is a bulk copy; others go through a descriptor.
    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    plgpu.copy_gmem_to_smem(source, target.at[pl.ds(0, source.shape[0])], arrived, oob_mode=mode)


class Ring(NamedTuple):
    """Buffers in shared memory for the rows of `stages` steps, and which of them have arrived."""

    tables: Mapping[str, Any]  # in device memory
    buffers: Mapping[str, Any]  # for each table, [stages, rows, padded width]
    arrived: Any  # barriers, one a stage

    def start(self, step: Array, row_of: Callable[[Array], Array]) -> None:
        """Starts the copies of a step; its i-th row comes from row `row_of(i)` of every table."""
        stages, rows, _ = next(iter(self.buffers.values())).shape
        stage = lax.rem(step, stages)

        def start_rows_of_warp(warp: Array) -> None:
            places = [QUAD * quad + warp for quad in range(rows // QUAD)]
            # All ids are read before the first copy starts: they travel together.
            sources = [row_of(place) for place in places]
            for place, source in zip(places, sources, strict=True):
                for name, table in self.tables.items():
                    target = self.buffers[name].at[stage, place]
                    copy_in(table.at[source], target, self.arrived.at[stage])

        plgpu.warp_map(start_rows_of_warp)

    def refill(self, step: Array, row_of: Callable[[Array], Array]) -> None:
        """Starts the copies of a step to a stage that has been read."""
        # Copies are made by another unit: what was read must be so before they overwrite it.
        plgpu.commit_smem()
        self.start(step, row_of)

    def wait(self, step: Array) -> Array:
        """Waits until the rows of a step are there; returns their stage."""
        stages, *_ = next(iter(self.buffers.values())).shape
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(self.arrived.at[stage])
        return stage

    def tile(self, name: str, stage: Array, quad: int, columns: Columns) -> Array:
        """Columns of the four rows of a quad, float32: [QUAD, COLUMNS]."""
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
    """A tile to add to: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(jnp.zeros((QUAD, COLUMNS), jnp.float32), _TILE)


def load_row_of_tile(row: Any, columns: Columns) -> Array:
    """Columns of a row in shared memory: [COLUMNS]."""
    return plgpu.load(row.at[columns.slice], layout=_ROW_OF_TILE)


def load_column_of_tile(column: Any) -> Array:
    """Four numbers, one for each row of a quad, from anywhere: [QUAD]."""
    return plgpu.load(column, layout=_COLUMN_OF_TILE, optimized=False)


def across_rows(row: Array) -> Array:
    """[COLUMNS] for each row of a quad: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (QUAD, COLUMNS), (1,)), _TILE)


def across_columns(column: Array) -> Array:
    """[QUAD] for each column of a tile: [QUAD, COLUMNS]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(column, (QUAD, COLUMNS), (0,)), _TILE)


def row_positions() -> Array:
    """The row of each element of a tile: [QUAD, COLUMNS]."""
    return plgpu.broadcasted_iota(jnp.int32, (QUAD, COLUMNS), 0, layout=_TILE)


def call_kernels(function: Callable[..., Sequence[Array]], *operands: Array) -> list[Array]:
    """Calls a function that launches kernels, so that vmap and `jax.shard_map` know what to do.

    vmap becomes a loop of calls, because Pallas cannot map over the references that a kernel
    writes in place. Within `shard_map`, the code of a single warp (`warp_map`) refuses arrays that
    vary over manual axes, though no kernel here communicates: the function is traced as if they
    did not vary, and its results vary as the operands do.
    """

    @custom_batching.sequential_vmap
    def call(*operands: Array) -> list[Array]:
        alike = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
        traced = jax.make_jaxpr(function)(*alike)
        return vary_alike(jax.extend.core.jaxpr_as_fun(traced)(*operands), operands)

    return call(*vary_alike(list(operands)))
