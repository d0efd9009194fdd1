"""The pipeline of value aggregation on a GPU: one thread block per token, or per split of a token.

The selections of a token are processed in steps of a few selections. Their rows are prefetched into
a ring in shared memory: while a step is computed, four selections at a time, the copies of later
steps are in flight.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuned
from kernels_pallas.common import check
from kernels_pallas.compat import gpu_kernel, gpu_store
from kernels_pallas.table_gradient.gpu import fetch
from kernels_pallas.table_gradient.gpu.fetch import QUAD, Columns, columns_of
from kernels_pallas.value_aggregation.call import AggregationCall
from kernels_pallas.value_aggregation.cost import cost_estimate


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel partitions its work.

    Attributes:
        rows: selections per step, a multiple of four; their rows share a barrier.
        stages: steps whose rows are in flight or in use.
        splits: thread blocks among which the selections of a token are split.
    """

    rows: int
    stages: int
    splits: int


class Kernel:
    """Shapes, blocks and the pipeline of the forward and the backward kernel."""

    def __init__(self, pass_name: tuned.Pass, call: AggregationCall, blocks: Blocks) -> None:
        self.pass_name: tuned.Pass = pass_name
        self.call = call
        values, pre_values, pre_inputs = call.values, call.pre_values, call.pre_inputs
        self.num_tokens, self.num_selected, self.num_cores = call.scores.shape
        self.value_dim = values.shape[1]
        self.core_dim = self.value_dim // self.num_cores
        self.pre_value_dim = 0 if pre_values is None else pre_values.shape[1]
        # Pad to at least one quad of selections; the padding is masked out.
        padding = ((0, 0), (0, max(0, QUAD - self.num_selected)))
        self.ids = jnp.pad(call.indices, padding, mode="edge")
        self.scores = jnp.pad(call.scores.astype(jnp.float32), (*padding, (0, 0)))
        self.padded_selected = self.ids.shape[1]

        check(blocks.rows > 0 and blocks.rows % QUAD == 0, "rows", blocks.rows, "a multiple of 4")
        check(blocks.stages > 0, "stages", blocks.stages, "at least 1")
        self.rows = min(blocks.rows, self.padded_selected // QUAD * QUAD)
        self.stages = blocks.stages
        self.steps = pl.cdiv(self.padded_selected, self.rows)
        # The last step overlaps the one before, so both must belong to the same split.
        self.is_ragged = self.steps * self.rows != self.num_selected
        self.splits = max(1, min(blocks.splits, self.steps // 2 if self.is_ragged else self.steps))

        self.tables = {"values": values}
        self.token_rows: dict[str, Array] = {}
        if pre_values is not None and pre_inputs is not None:
            self.tables["pre_values"] = pre_values
            self.token_rows["pre_inputs"] = pre_inputs.astype(jnp.float32)

    def selections(self, *trailing: int) -> jax.ShapeDtypeStruct:
        """An output with one entry per selection: [T, K, ...]."""
        return _output((self.num_tokens, self.padded_selected, *trailing))

    def run(
        self,
        name: str,
        compute: Callable[["Quad", list[Array]], list[Array]],
        inputs: dict[str, Array],
        sums_dim: int,
        outputs: dict[str, jax.ShapeDtypeStruct],
    ) -> tuple[Array | None, dict[str, Array]]:
        """Calls `compute(quad, sums)` for every four selections, their rows in shared memory.

        Args:
            name: of the kernel.
            compute: returns the updated sums over a token's selections; stores other outputs.
            inputs: further inputs with one row per token, besides the pre-inputs.
            sums_dim: width of the sums; 0 if there are none.
            outputs: outputs with entries per selection, by name.

        Returns:
            The sums, [T, sums_dim], and the outputs by name.
        """
        token_rows = self.token_rows | inputs
        operands = {"ids": self.ids, "scores": self.scores} | token_rows | self.tables
        results = dict(outputs)
        if sums_dim:
            results["sums"] = _output((self.splits, self.num_tokens, sums_dim))
        buffers, arrived = fetch.ring_scratch(
            [table.shape[1] for table in self.tables.values()],
            [table.dtype for table in self.tables.values()],
            self.rows,
            self.stages,
        )
        scratch = {
            f"{table}_ring": buffer for table, buffer in zip(self.tables, buffers, strict=True)
        }
        scratch["arrived"] = arrived
        for row, array in token_rows.items():
            scratch[f"{row}_row"] = plgpu.SMEM((fetch.padded(array.shape[1]),), jnp.float32)
        if token_rows:
            scratch["rows_arrived"] = plgpu.Barrier(num_arrivals=len(token_rows))
        if sums_dim:
            scratch["sums_row"] = plgpu.SMEM((fetch.padded(sums_dim),), jnp.float32)

        def kernel(*refs: Any) -> None:
            names = (*operands, *results, *scratch)
            self._pipeline(
                dict(zip(names, refs, strict=True)), tuple(token_rows), compute, sums_dim
            )

        kernel.__name__ = f"_{name}_kernel"
        launch = gpu_kernel(
            kernel,
            kernel_name=name,
            out_type=list(results.values()),
            scratch_types=list(scratch.values()),
            # Only the last grid dimension may exceed 65535.
            grid=(self.splits, self.num_tokens),
            grid_names=("split", "token"),
            cost_estimate=cost_estimate(
                self.pass_name, self.call, self._bytes_accessed(token_rows, list(results.values()))
            ),
        )
        arrays = dict(zip(results, fetch.call_kernels(launch, *operands.values()), strict=True))
        sums = arrays.pop("sums", None)
        if sums is not None:
            sums = sums[0] if self.splits == 1 else jnp.sum(sums, axis=0)
        return sums, {key: array[:, : self.num_selected] for key, array in arrays.items()}

    def _pipeline(
        self,
        refs: dict[str, Any],
        token_rows: tuple[str, ...],
        compute: Callable[["Quad", list[Array]], list[Array]],
        sums_dim: int,
    ) -> None:
        token = lax.axis_index("token")
        split = lax.axis_index("split")
        first, end = (part * self.steps // self.splits for part in (split, split + 1))
        ring = fetch.Ring(
            {name: refs[name] for name in self.tables},
            {name: refs[f"{name}_ring"] for name in self.tables},
            refs["arrived"],
        )

        def first_selection(step: Array) -> Array:
            return jnp.minimum(step * self.rows, self.padded_selected - self.rows)

        def row_of(step: Array) -> Callable[[Array], Array]:
            start = first_selection(step)
            return lambda row: refs["ids"][token, start + row]

        for name in token_rows:
            fetch.copy_in(refs[name].at[token], refs[f"{name}_row"], refs["rows_arrived"])
        ahead = jnp.minimum(first + self.stages, end)
        lax.fori_loop(first, ahead, lambda step, _: ring.start(step, row_of(step)), None)
        if token_rows:
            plgpu.barrier_wait(refs["rows_arrived"])
        rows = {
            name: [
                fetch.load_row_of_tile(refs[f"{name}_row"], columns)
                for columns in columns_of(refs[name].shape[1])
            ]
            for name in token_rows
        }

        def step_of_token(step: Array, sums: list[Array]) -> list[Array]:
            quads = range(self.rows // QUAD)
            places = [first_selection(step) + quad * QUAD for quad in quads]
            # Load the scores from device memory before waiting for the rows, to overlap the two.
            scores = [
                [
                    fetch.load_column_of_tile(refs["scores"].at[token, pl.ds(place, QUAD), core])
                    for core in range(self.num_cores)
                ]
                for place in places
            ]
            stage = ring.wait(step)
            # Only selections from `counted` to num_selected are new in this step.
            counted = step * self.rows if self.is_ragged else None
            for quad in quads:
                selected = (token, places[quad], counted, scores[quad])
                sums = compute(Quad(self, refs, ring, rows, stage, quad, *selected), sums)
            later = step + self.stages
            pl.when(later < end)(lambda: ring.refill(later, row_of(later)))
            return sums

        zeros = [fetch.zeros_tile() for _ in columns_of(sums_dim)]
        sums = lax.fori_loop(first, end, step_of_token, zeros)
        if not sums_dim:
            return
        for total, columns in zip(sums, columns_of(sums_dim), strict=True):
            refs["sums_row"][columns.slice] = jnp.sum(total, axis=0)
        plgpu.commit_smem()
        target = refs["sums"].at[split, token]
        plgpu.copy_smem_to_gmem(refs["sums_row"].at[pl.ds(0, sums_dim)], target)
        # Wait until the copy has read shared memory; the end of the kernel completes the writes.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _bytes_accessed(self, token_rows: dict[str, Array], results: list[Any]) -> int:
        """Every step fetches its rows, ids and scores; every split the rows of its token."""
        selections = self.num_tokens * self.steps * self.rows
        rows = sum(fetch.sector_bytes(x.shape[1], x.dtype) for x in self.tables.values())
        per_selection = rows + 4 + 4 * self.num_cores
        written = sum(4 * math.prod(result.shape) for result in results)
        return (
            selections * per_selection
            + self.splits * sum(x.nbytes for x in token_rows.values())
            + written
        )


class Quad(NamedTuple):
    """Four selections of a token whose rows have arrived, one per warp."""

    kernel: Kernel
    refs: dict[str, Any]
    ring: fetch.Ring
    rows: dict[str, list[Array]]  # of the token, in tiles
    stage: Array
    place: int  # index of the quad in its step
    token: Array
    selection: Array  # the first of the four
    counted: Array | None  # the first new selection, if the step may overlap the one before
    scores: list[Array]  # [QUAD] for each core

    def tile(self, table: str, columns: Columns) -> Array:
        """Columns of the selected rows of a table: [QUAD, COLUMNS]."""
        return self.ring.tile(table, self.stage, self.place, columns)

    def dot(self, table: str, row: str, start: int = 0, end: int | None = None) -> Array:
        """Inner products of the selected rows with a row of the token, columns start to end."""
        width = self.kernel.tables[table].shape[1]
        end = width if end is None else end
        products = fetch.zeros_tile()
        for columns, part in zip(columns_of(width), self.rows[row], strict=True):
            if columns.start >= end or columns.start + columns.width <= start:
                continue
            product = self.tile(table, columns) * fetch.across_rows(part)
            if columns.start < start:
                product = jnp.where(columns.before(start), 0.0, product)
            if columns.start + fetch.COLUMNS > end:
                product = jnp.where(columns.before(end), product, 0.0)
            products += product
        return jnp.sum(products, axis=1)

    def valid(self, tile: Array) -> Array:
        """Masks the rows of selections that an earlier step has counted or that are padding."""
        if self.counted is None:
            return tile
        selection = self.selection + fetch.row_positions()
        is_valid = (selection >= self.counted) & (selection < self.kernel.num_selected)
        return jnp.where(is_valid, tile, 0.0)

    def put(self, output: str, numbers: Array, *trailing: int) -> None:
        """Writes one entry for each of the four selections."""
        selections = pl.ds(self.selection, QUAD)
        target = self.refs[output].at[self.token, selections, *trailing]
        gpu_store(target, numbers, optimized=False)  # 16 bytes; each warp writes 4


def _output(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def by_core(weights: list[Array], columns: Columns, core_dim: int) -> Array:
    """Broadcasts the weight [QUAD] of each core over the columns of its slice: [QUAD, COLUMNS]."""
    first = columns.start // core_dim
    last = (columns.start + columns.width - 1) // core_dim
    by_column = fetch.across_columns(weights[last])
    for core in reversed(range(first, last)):
        before = columns.before((core + 1) * core_dim)
        by_column = jnp.where(before, fetch.across_columns(weights[core]), by_column)
    return by_column


def row_bytes(*tables: Any) -> int:
    """Bytes fetched per selection."""
    present = [table for table in tables if table is not None]
    return sum(table.shape[1] * table.dtype.itemsize for table in present)
