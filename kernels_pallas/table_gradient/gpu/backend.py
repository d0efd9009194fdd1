"""Gradients of tables on Hopper and newer GPUs: a segmented sum of selections sorted by row.

A thread block of one warpgroup processes a slice of the sorted selections. It accumulates
weight x factor in registers while the row stays the same, then writes the row once. If the
selections of a row span several slices, each slice stores a partial sum, and a second kernel adds
the partial sums from left to right. So a row with very many selections is summed by many thread
blocks, without atomics, in an order that only depends on the slice size.

Factors are read again for every selection. There is one float32 row per token, [T, D]. As long as
they fit the 50 MB L2 cache, these reads take its bandwidth, not that of device memory: 32,768
tokens of 192 columns take half of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import L2_BYTES, accumulation_dtype, check, match_vma
from kernels_pallas.compat import gpu_kernel
from kernels_pallas.table_gradient.call import TableGradientCall, TableRows, Term
from kernels_pallas.table_gradient.gpu import fetch
from kernels_pallas.table_gradient.selections import sort_selections, unique_ids

_THREADS = 128  # threads of a warpgroup, over which the columns of a row are distributed
_UNROLLED = 8  # partial sums of other slices that are fetched together


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the sum over selections is partitioned into thread blocks.

    Attributes:
        slice_size: selections per thread block, a multiple of slice_rows.
        slice_rows: selections per step, a multiple of four; their factors share a barrier.
        slice_stages: steps whose factors are in flight or in use.
    """

    slice_size: int
    slice_rows: int
    slice_stages: int


def heuristic(num_selections: int, row_bytes: int) -> Blocks:
    """Blocks for factors whose rows have `row_bytes` bytes.

    Four thread blocks for each of 132 SMs, if slices of 32 to 256 selections allow it: longer
    slices leave fewer partial sums to add, but make the sum of a single row more serial. The ring
    has about 24 KB, so that seven or more thread blocks fit on an SM. Estimated, not measured.
    """
    size = max(32, min(256, num_selections // (4 * 132)))
    rows = 8 if 8 * row_bytes <= 12 * 2**10 else 4
    stages = max(2, min(8, 24 * 2**10 // (rows * row_bytes)))
    return Blocks(1 << (size.bit_length() - 1), rows, stages)


def _choose_blocks(
    num_selections: int, num_cores: int, factors: Any, num_rows: int, dtype: DTypeLike
) -> Blocks:
    """The tuned blocks for exactly these sizes if there are any, else those of `heuristic`."""
    num_tokens, dim = factors.shape
    blocks = heuristic(num_selections, 4 * dim)
    shape = {
        "num_selections": num_selections,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "dim": dim,
        "num_cores": num_cores,
    }
    key = tuned.Key.of("table_gradient", "pallas_gpu", "backward", shape, dtype)
    return tuned.lookup(blocks, key, platform="gpu") or blocks


def unsupported_reason(call: TableGradientCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    dim = call.factors.shape[1]
    known = call.dtype in (jnp.float32, jnp.bfloat16)
    size = dim * min(4, call.dtype.itemsize)
    needed = shared_bytes(dim)
    reasons = [
        *fetch.device_reasons(platform),
        (
            accumulation_dtype(call.weights, call.factors) != jnp.float32,
            "it accumulates in float32, not in float64",
        ),
        (not known, f"the gradient must be float32 or bfloat16, dtype is {call.dtype}"),
        (
            size % fetch.COPY_BYTES != 0,
            f"rows must be multiples of {fetch.COPY_BYTES} bytes, those of the table have {size}",
        ),
        (call.num_values == 0 or dim == 0, "the table is empty"),
        (0 in call.indices.shape, f"indices is empty, {call.indices.shape}"),
        (
            needed > fetch.SHARED_BYTES,
            f"rows of {dim} elements need {needed} bytes of shared memory, "
            f"only {fetch.SHARED_BYTES} are available",
        ),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def shared_bytes(dim: int) -> int:
    """The minimum shared memory of the kernel: two stages of four rows, and a single row."""
    sums = (2 * fetch.QUAD * 4 + 4) * (fetch.padded(dim) + fetch.COLUMNS)
    return sums + fetch.OTHER_SHARED_BYTES


def forward(call: TableGradientCall) -> Float[Array, "num_values dim"]:
    """Computes the dense gradient."""
    ids, order, _ = sort_selections(call.indices)
    return sum_by_row(ids, order, call.weights, call.factors, call.num_values, call.dtype)


def rows(call: TableGradientCall, max_rows: int) -> TableRows:
    """Computes the row-sparse gradient."""
    return row_sparse_gradients(call.indices, call.num_values, max_rows, [call.term])[0]


def dense_gradients(
    tables: Sequence[Any],
    indices: Int32[Array, "num_tokens num_selected"],
    terms: list[Term],
) -> list[Array]:
    """Computes the dense gradient of each table, in its dtype; sorts the selections once."""
    ids, order, _ = sort_selections(indices)
    return [
        sum_by_row(ids, order, term.weights, term.factors, table.shape[0], table.dtype)
        for table, term in zip(tables, terms, strict=True)
    ]


def row_sparse_gradients(
    indices: Int32[Array, "num_tokens num_selected"],
    num_values: int,
    max_rows: int,
    terms: list[Term],
) -> list[TableRows]:
    """Computes the row-sparse gradient of each table, in float32; sorts the selections once."""
    selections = sort_selections(indices)
    ids, num_rows = unique_ids(selections.ids, num_values, max_rows)
    rows, order = selections.rows, selections.order
    sums = [
        sum_by_row(rows, order, term.weights, term.factors, max_rows, jnp.float32) for term in terms
    ]
    return [TableRows(ids, num_rows, x) for x in sums]


def sum_by_row(
    rows: Int32[Array, "num_selections"],
    order: Int32[Array, "num_selections"],
    weights: Float[Array, "num_tokens num_selected num_cores"],
    factors: Float[Array, "num_tokens dim"],
    num_rows: int,
    dtype: DTypeLike,
    blocks: Blocks | None = None,
) -> Float[Array, "{num_rows} dim"]:
    """Sums weight x factor by row, in float32; the i-th slice of a factor has the i-th weight.

    Args:
        rows: the row of the result to which each selection adds, ascending: ids for a dense
            gradient, their ranks for a row-sparse one. Rows >= `num_rows` are dropped.
        order: index of each selection in the flattened weights.
        weights: of the selections, not sorted.
        factors: one row per token.
        num_rows: rows of the result.
        dtype: of the result.
        blocks: overrides the tuned or heuristic blocks.
    """
    blocks = blocks or _choose_blocks(rows.size, weights.shape[2], factors, num_rows, dtype)
    size, step = blocks.slice_size, blocks.slice_rows
    check(step > 0 and step % fetch.QUAD == 0, "slice_rows", step, "a multiple of 4")
    check(size > 0 and size % step == 0, "slice_size", size, f"a multiple of slice_rows = {step}")
    check(blocks.slice_stages > 0, "slice_stages", blocks.slice_stages, "at least 1")
    num_cores, dim = weights.shape[2], factors.shape[1]
    factors = factors.astype(jnp.float32)
    if num_rows == 0:
        return match_vma(jnp.zeros((0, dim), dtype), (rows, weights, factors))
    padding = (0, -rows.size % size)
    tokens = jnp.pad(order // weights.shape[1], padding)
    weights = jnp.pad(weights.astype(jnp.float32).reshape(-1, num_cores)[order], (padding, (0, 0)))
    rows = jnp.pad(rows, padding, constant_values=num_rows)

    def launch(rows: Array, tokens: Array, weights: Array, factors: Array) -> list[Array]:
        zeros = jnp.zeros((num_rows, dim), dtype)
        return [_add_rows(rows, tokens, weights, factors, zeros, blocks)]

    return fetch.call_kernels(launch, rows, tokens, weights, factors)[0]


def _add_rows(
    rows: Array, tokens: Array, weights: Array, factors: Array, zeros: Array, blocks: Blocks
) -> Array:
    """Sums weight x factor into the rows of `zeros`, in place."""
    num_slices = rows.size // blocks.slice_size
    dim = factors.shape[1]
    width = _padded(dim)
    part = jax.ShapeDtypeStruct((num_slices, width), jnp.float32)
    buffers, arrived = fetch.ring_scratch(
        [width], [jnp.float32], blocks.slice_rows, blocks.slice_stages
    )
    staged = plgpu.SMEM((width,), zeros.dtype)
    table = jax.new_ref(zeros)

    def sum_slices(*refs: Any) -> None:
        _sum_slice_kernel(*refs, blocks=blocks)

    def join_slices(*refs: Any) -> None:
        _join_slices_kernel(*refs, slice_size=blocks.slice_size)

    sums_cost, joins_cost = _costs(weights, factors, zeros, num_slices)
    heads, tails = gpu_kernel(
        sum_slices,
        kernel_name="value_aggregation_sum_slices",
        out_type=[part, part],
        scratch_types=[*buffers, arrived, staged],
        grid=(num_slices,),
        grid_names=("slice",),
        cost_estimate=sums_cost,
    )(rows, tokens, weights, factors, table)
    if num_slices == 1:
        return jax.freeze(table)
    gpu_kernel(
        join_slices,
        kernel_name="value_aggregation_join_slices",
        scratch_types=[staged],
        grid=(num_slices,),
        grid_names=("slice",),
        cost_estimate=joins_cost,
    )(rows, heads, tails, table)
    return jax.freeze(table)


def _costs(
    weights: Array, factors: Array, table: Array, num_slices: int
) -> tuple[pl.CostEstimate, pl.CostEstimate]:
    """The costs of both kernels, if no two selections have the same row.

    Factors are read from device memory once, or, if they take most of the L2 cache, for every
    selection.

    If some do, fewer rows are written, but some rows span slices: their partial sums are written,
    and the second kernel adds them. Either way, both kernels compare the ends of adjacent slices.
    """
    num_selections, num_cores = weights.shape
    dim = factors.shape[1]
    num_written = min(num_selections, table.shape[0])
    words = 2 + num_cores  # row, token and weights of a selection
    factor_reads = factors.shape[0] if factors.nbytes <= L2_BYTES // 2 else num_selections
    read = factor_reads * fetch.sector_bytes(dim, factors.dtype) + num_selections * 4 * words
    written = num_written * fetch.sector_bytes(dim, table.dtype)
    compared = 4 * 4 * num_slices  # the first row, the last one, and their neighbours
    sums = pl.CostEstimate(
        flops=2 * num_selections * dim,
        transcendentals=0,
        bytes_accessed=read + written + compared,
    )
    return sums, pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=compared)


def _sum_slice_kernel(
    # Inputs, in device memory.
    rows: Any,  # [slices * slice_size]
    tokens: Any,  # [slices * slice_size]
    weights: Any,  # [slices * slice_size, cores]
    factors: Any,  # [T, D]
    table: Any,  # [num_rows, D], written in place
    # Outputs: partial sums of rows that span slices, uninitialized where there are none.
    heads: Any,  # [slices, width]: sum of a row that began in an earlier slice
    tails: Any,  # [slices, width]: sum of a row that begins here and continues in the next slice
    # Scratch.
    buffer: Any,  # [stages, slice_rows, width]
    arrived: Any,
    staged: Any,  # [width]
    *,
    blocks: Blocks,
) -> None:
    """Sums the rows of a slice; see the module docstring."""
    index = lax.axis_index("slice")
    start = index * blocks.slice_size
    ends = _slice_ends(rows, index, blocks.slice_size)
    num_rows, dim = table.shape
    width, num_cores = staged.shape[0], weights.shape[1]
    zeros = _zeros(width)
    ring = fetch.Ring({"factors": factors}, {"factors": buffer}, arrived)
    steps = blocks.slice_size // blocks.slice_rows

    def token_of(step: Array) -> Callable[[Array], Array]:
        first = start + step * blocks.slice_rows
        return lambda place: tokens[first + place]

    def finish(row: Array, total: Array, is_first: Array) -> None:
        """Writes the sum of a row after its last selection in the slice."""
        is_head = is_first & ends.began_before

        @pl.when(is_head)
        def store_head() -> None:
            heads[index] = total

        @pl.when(~is_head & (row < num_rows))
        def write() -> None:
            _write_row(total, table.at[row], staged)

    def add_step(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, row, is_first = carry
        places = range(blocks.slice_rows)
        first = start + step * blocks.slice_rows
        next_rows = [rows[first + place] for place in places]
        step_weights = [[weights[first + place, i] for i in range(num_cores)] for place in places]
        stage = ring.wait(step)
        for place in places:
            is_new = next_rows[place] != row
            pl.when(is_new)(functools.partial(finish, row, total, is_first))
            factor = plgpu.load(buffer.at[stage, place], layout=_columns(width))
            product = _by_core(step_weights[place], width, dim // num_cores) * factor
            total = _where(is_new, zeros, total) + product
            row, is_first = next_rows[place], is_first & ~is_new
        later = step + blocks.slice_stages
        pl.when(later < steps)(lambda: ring.refill(later, token_of(later)))
        return total, row, is_first

    ahead = min(blocks.slice_stages, steps)
    lax.fori_loop(0, ahead, lambda step, _: ring.start(step, token_of(step)), None)
    total, row, is_first = lax.fori_loop(
        0, steps, add_step, (zeros, ends.first_row, jnp.bool_(True))
    )

    is_tail = ends.continues & ~(is_first & ends.began_before)

    @pl.when(is_tail)
    def store_tail() -> None:
        tails[index] = total

    pl.when(~is_tail)(lambda: finish(row, total, is_first))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _join_slices_kernel(
    # Inputs, in device memory.
    rows: Any,  # [slices * slice_size]
    heads: Any,  # [slices, width]
    tails: Any,  # [slices, width]
    table: Any,  # [num_rows, D], written in place
    # Scratch.
    staged: Any,  # [width]
    *,
    slice_size: int,
) -> None:
    """Writes the row that begins in a slice and continues in later ones, if there is one."""
    index = lax.axis_index("slice")
    ends = _slice_ends(rows, index, slice_size)
    num_slices, width = heads.shape
    num_rows, _ = table.shape
    zeros = _zeros(width)
    begins_here = ~ends.began_before | (ends.first_row != ends.last_row)

    def shares_row(other: Array) -> Array:
        first = rows[jnp.minimum(other, num_slices - 1) * slice_size]
        return (other < num_slices) & (first == ends.last_row)

    @pl.when(ends.continues & begins_here & (ends.last_row < num_rows))
    def join() -> None:
        def add(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            other, total = carry
            parts = []
            for ahead in range(_UNROLLED):
                head = plgpu.load(
                    heads.at[jnp.minimum(other + ahead, num_slices - 1)], layout=_columns(width)
                )
                parts.append(_where(shares_row(other + ahead), head, zeros))
            for part in parts:
                total += part
            return other + _UNROLLED, total

        tail = plgpu.load(tails.at[index], layout=_columns(width))
        _, total = lax.while_loop(lambda carry: shares_row(carry[0]), add, (index + 1, tail))
        _write_row(total, table.at[ends.last_row], staged)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True)
class _SliceEnds:
    """How a slice of selections connects to its neighbours."""

    first_row: Array
    last_row: Array
    began_before: Array  # whether the previous slice ends with first_row
    continues: Array  # whether the next slice begins with last_row


def _slice_ends(rows: Any, index: Array, slice_size: int) -> _SliceEnds:
    start, end = index * slice_size, (index + 1) * slice_size
    num_selections = rows.shape[0]
    first_row, last_row = rows[start], rows[end - 1]
    before, after = rows[jnp.maximum(start - 1, 0)], rows[jnp.minimum(end, num_selections - 1)]
    return _SliceEnds(
        first_row,
        last_row,
        (start > 0) & (before == first_row),
        (end < num_selections) & (after == last_row),
    )


def _write_row(total: Array, row: Any, staged: Any) -> None:
    """Starts to write a row to device memory, through `staged`, which has the padded width."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the previous row
    staged[...] = total.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, row.shape[0])], row)


def _by_core(weights: list[Array], width: int, core_dim: int) -> Array:
    """Broadcasts the weight of each core over the columns of its slice."""
    *others, by_column = weights
    position = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=_columns(width))
    for core, weight in reversed(list(enumerate(others))):
        by_column = jnp.where(position < (core + 1) * core_dim, weight, by_column)
    return by_column


def _where(condition: Array, row: Array, other: Array) -> Array:
    """Selects one of two rows; Mosaic GPU does not broadcast scalar conditions implicitly."""
    return jnp.where(lax.broadcast_in_dim(condition, row.shape, ()), row, other)


def _zeros(width: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((width,), jnp.float32), _columns(width))


def _columns(width: int) -> Any:
    """The layout of a row, strided over the threads of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((width,), vec_size=1)


def _padded(dim: int) -> int:
    return -(-dim // _THREADS) * _THREADS
