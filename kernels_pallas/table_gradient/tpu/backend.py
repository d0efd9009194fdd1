"""Gradients of tables on TPU: the selections of each block of rows are accumulated in VMEM.

Once sorted by id, the selections of a block of rows are adjacent. The grid merges two ordered
sequences, blocks of rows and chunks of selections. Each step is a "visit" of a chunk to a block: it
adds the chunk's selections that belong to the block. A block is written to HBM once, after the last
selection of its rows. So nothing is read back, no two steps write the same rows, and sums follow
the order of the selections. The same pass writes zeros to rows without selections and converts to
the dtype of the table. A row-sparse gradient works the same way, with rows numbered without gaps.

    traffic     The factors, one row per token, are fetched into VMEM once, not once for each of the
                K selections of a token: [T, D] is small compared with the [T*K, D] products. If
                they do not fit, the columns are split into groups, with one sweep per group.
    layout      In VMEM a row of 128 * S columns takes S full sublanes, so that any row can be
                addressed and an addition takes one register for up to 1024 columns. Blocks are
                converted to the tiled layout of HBM, eight rows per register, when written.
    cost        In bundles of the compiler for v5e: 7 per selection of any width up to 1024, bound
                by the scalar unit; 1 to 3 per row of the result; about 250 per visit. Counted in
                the schedule, not measured on a chip.
    precision   All arithmetic is float32 on the VPU; the MXU is not used.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype, match_vma, tiled_bytes
from kernels_pallas.table_gradient.call import TableGradientCall, TableRows, Term
from kernels_pallas.table_gradient.selections import number_ids, unique_ids

_LANES, _SUBLANES = 128, 8
_UNROLL = 8
_TILE_ROWS = 16  # of a bfloat16 tile; a float32 tile has half as many
_FACTOR_BYTES = 40 * 2**20  # VMEM budget for the factors of one group of columns
_VMEM_BYTES = 56 * 2**20  # of 64 MiB on tpu7x; v5e, v5p and v6e have more


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of a grid step.

    Attributes:
        rows: rows of the result, a multiple of 16.
        chunk: selections, a multiple of 128.
        sublanes: sublanes per row, of 128 columns each; a power of two up to 8.
    """

    rows: int
    chunk: int
    sublanes: int


def heuristic(num_factors: int, dim: int) -> Blocks:
    """Blocks for factors of `num_factors` rows and `dim` columns.

    A visit costs as much as 30 selections, so a block and a chunk should hold many more than that.
    A block takes 2 MiB and is in VMEM three times. The visits of a million rows take at most 24 kB
    of SMEM. Estimated from the compiler's schedule, not measured.
    """
    needed = pl.cdiv(dim, _LANES)
    sublanes = min(_SUBLANES, 1 << (needed - 1).bit_length())
    while sublanes > 1 and _factor_bytes(num_factors, sublanes) > _FACTOR_BYTES:
        sublanes //= 2
    return Blocks(rows=4096 // sublanes, chunk=2048, sublanes=sublanes)


def _choose_blocks(
    num_selections: int, num_cores: int, factors: Any, num_rows: int, dtype: DTypeLike
) -> Blocks:
    """The tuned blocks for exactly these sizes if there are any, else those of `heuristic`."""
    num_tokens, dim = factors.shape
    blocks = heuristic(num_tokens, dim)
    shape = {
        "num_selections": num_selections,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "dim": dim,
        "num_cores": num_cores,
    }
    key = tuned.Key.of("table_gradient", "pallas_tpu", "backward", shape, dtype)
    return tuned.lookup(blocks, key, platform="tpu") or blocks


def _factor_bytes(num_factors: int, sublanes: int) -> int:
    return 4 * num_factors * sublanes * _LANES


def unsupported_reason(call: TableGradientCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    known = call.dtype in (jnp.float32, jnp.bfloat16)
    reasons = [
        (platform != "tpu", f"it compiles for TPU, not for {platform}"),
        (
            accumulation_dtype(call.weights, call.factors) != jnp.float32,
            "it accumulates in float32, not in float64",
        ),
        (not known, f"the gradient must be float32 or bfloat16, dtype is {call.dtype}"),
        (call.num_values == 0 or call.factors.shape[1] == 0, "the table is empty"),
        (0 in call.indices.shape, f"indices is empty, {call.indices.shape}"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def forward(call: TableGradientCall) -> Float[Array, "num_values dim"]:
    """Computes the dense gradient."""
    table = jax.ShapeDtypeStruct((call.num_values, call.factors.shape[1]), call.dtype)
    return dense_gradients([table], call.indices, [call.term])[0]


def rows(call: TableGradientCall, max_rows: int) -> TableRows:
    """Computes the row-sparse gradient."""
    return row_sparse_gradients(call.indices, call.num_values, max_rows, [call.term])[0]


def dense_gradients(
    tables: Sequence[Any],
    indices: Int32[Array, "num_tokens num_selected"],
    terms: list[Term],
) -> list[Array]:
    """Computes the dense gradient of each table, in its dtype; sorts the selections once."""

    def sums(indices: Array, terms: list[Term], dtypes: Sequence[DTypeLike]) -> list[Array]:
        ids, tokens, weights = _sort_selections(indices, terms)
        parts = zip(weights, terms, tables, dtypes, strict=True)
        return [
            sum_by_row(ids, tokens, columns, term.factors, table.shape[0], dtype)
            for columns, term, table, dtype in parts
        ]

    return _sum_over_parts(sums, indices, terms, [table.dtype for table in tables])


def row_sparse_gradients(
    indices: Int32[Array, "num_tokens num_selected"],
    num_values: int,
    max_rows: int,
    terms: list[Term],
) -> list[TableRows]:
    """Computes the row-sparse gradient of each table, in float32."""
    unique, num_rows = unique_ids(jnp.sort(indices.reshape(-1)), num_values, max_rows)
    num_selections = indices.size

    def sums(indices: Array, terms: list[Term], dtypes: Sequence[DTypeLike]) -> list[Array]:
        ids, tokens, weights = _sort_selections(indices, terms)
        if ids.size == num_selections:
            rows = number_ids(ids)
        else:  # ids beyond the capacity are larger than all of `unique`, and get row `max_rows`
            rows = jnp.searchsorted(unique, ids, method="sort").astype(jnp.int32)
        return [
            sum_by_row(rows, tokens, columns, term.factors, max_rows, dtype)
            for columns, term, dtype in zip(weights, terms, dtypes, strict=True)
        ]

    summed = _sum_over_parts(sums, indices, terms, [jnp.dtype(jnp.float32)] * len(terms))
    return [TableRows(unique, num_rows, x) for x in summed]


def _sum_over_parts(
    sums: Callable[[Array, list[Term], Sequence[DTypeLike]], list[Array]],
    indices: Int32[Array, "num_tokens num_selected"],
    terms: list[Term],
    dtypes: Sequence[DTypeLike],
) -> list[Array]:
    """Adds the sums of parts of the tokens, so few that their factors fit VMEM, in float32."""
    num_tokens = indices.shape[0]
    least = pl.cdiv(_factor_bytes(num_tokens, 1), _FACTOR_BYTES)
    if least == 1:
        return sums(indices, terms, dtypes)
    # Some more parts than needed, if they are equal: padding would copy the factors.
    equal = (parts for parts in range(least, 2 * least) if num_tokens % parts == 0)
    num_parts = next(equal, least)

    def split(array: Array) -> Array:
        """Splits tokens into parts; those that fill up the last one have weights of zero."""
        missing = -num_tokens % num_parts
        padded = jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(num_parts, -1, *array.shape[1:])

    wide = [jnp.dtype(jnp.float32)] * len(dtypes)

    def add(total: list[Array], part: tuple[Array, list[Term]]) -> tuple[list[Array], None]:
        indices, terms = part
        return jax.tree.map(jnp.add, total, sums(indices, terms, wide)), None

    parts = jax.tree.map(split, (indices, terms))
    first, first_terms = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: sums(first, first_terms, wide))
    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    total, _ = lax.scan(add, match_vma(zeros, parts), parts)
    return [array.astype(dtype) for array, dtype in zip(total, dtypes, strict=True)]


def _sort_selections(indices: Array, terms: list[Term]) -> tuple[Array, Array, list[list[Array]]]:
    """Sorts selections by id; returns ids, tokens, and the weights for each term and core.

    Equal ids are in order of k, then of tokens. The weights are operands of the sort because
    gathering them afterwards would take a TPU one step per selection. The position is a second sort
    key: a stable sort has one more operand and takes half as long again to compile.
    """
    position = lax.iota(jnp.int32, indices.size)
    weights = [column.reshape(-1) for term in terms for column in term.weights.T]
    columns = (indices.T.reshape(-1), position, *(x.astype(jnp.float32) for x in weights))
    ids, position, *in_order = lax.sort(columns, num_keys=2, is_stable=False)
    remaining = iter(in_order)
    by_term = [list(itertools.islice(remaining, term.weights.shape[2])) for term in terms]
    return ids, lax.rem(position, indices.shape[0]), by_term


def sum_by_row(
    rows: Int32[Array, "num_selections"],
    tokens: Int32[Array, "num_selections"],
    weights: list[Float[Array, "num_selections"]],
    factors: Float[Array, "num_tokens dim"],
    num_rows: int,
    dtype: DTypeLike,
    blocks: Blocks | None = None,
) -> Float[Array, "{num_rows} dim"]:
    """Sums weight x factor by row, in float32, and rounds to `dtype`, float32 or bfloat16.

    Args:
        rows: the row of the result to which each selection adds, ascending: ids for a dense
            gradient, their ranks for a row-sparse one. Rows >= `num_rows` are dropped.
        tokens: the token whose factor each selection uses.
        weights: of each selection, for each of the equal slices of a factor.
        factors: one row per token.
        num_rows: rows of the result.
        dtype: of the result.
        blocks: overrides the tuned or heuristic blocks.
    """
    num_factors, dim = factors.shape
    blocks = blocks or _choose_blocks(rows.size, len(weights), factors, num_rows, dtype)
    num_groups = pl.cdiv(dim, blocks.sublanes * _LANES)
    padding = num_groups * blocks.sublanes * _LANES - dim
    factors = jnp.pad(factors.astype(jnp.float32), ((0, 0), (0, padding)))
    factors = factors.reshape(num_factors, num_groups, blocks.sublanes, _LANES).swapaxes(0, 1)

    block_rows = min(blocks.rows, pl.cdiv(num_rows, _TILE_ROWS) * _TILE_ROWS)
    chunk = min(blocks.chunk, rows.size)
    visits = _Visits.of(rows, num_rows, block_rows, chunk)
    num_parts, num_visits = visits.blocks.shape
    operands = (
        visits._replace(blocks=visits.blocks.reshape(-1), chunks=visits.chunks.reshape(-1)),
        ((rows % block_rows)[None], tokens[None], [weight[None] for weight in weights]),
        factors,
    )

    def chunk_index(part: Array, group: Array, visit: Array, *prefetched: Any) -> Any:
        return 0, _Visits(*prefetched).chunks[part * num_visits + visit]

    def block_index(part: Array, group: Array, visit: Array, *prefetched: Any) -> Any:
        return _Visits(*prefetched).blocks[part * num_visits + visit], group

    per_selection = pl.BlockSpec((1, chunk), chunk_index, memory_space=pltpu.SMEM)
    group_shape = (1, num_factors, blocks.sublanes, _LANES)
    width = dim if num_groups == 1 else blocks.sublanes * _LANES
    operands = match_vma(operands)
    axis_type = jax.typeof(operands[-1]).manual_axis_type
    result = jax.ShapeDtypeStruct((num_rows, dim), dtype, manual_axis_type=axis_type)
    launch = pl.pallas_call(
        _row_sums_kernel(dim // len(weights), chunk),
        name="value_aggregation_row_sums",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(num_parts, num_groups, num_visits),
            in_specs=[
                *[per_selection] * (2 + len(weights)),
                # A single buffer: the block only changes with the group.
                pl.BlockSpec(
                    group_shape,
                    lambda part, group, *_: (group, 0, 0, 0),
                    pipeline_mode=pl.Buffered(1),
                ),
            ],
            out_specs=pl.BlockSpec((block_rows, width), block_index),
            scratch_shapes=[pltpu.VMEM((block_rows * blocks.sublanes, _LANES), jnp.float32)],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=_cost(operands, result),
    )
    # Pallas cannot batch prefetched scalars, so vmap becomes a loop of calls.
    return custom_batching.sequential_vmap(launch)(*jax.tree.leaves(operands))


def _cost(operands: tuple["_Visits", Any, Array], result: Any) -> pl.CostEstimate:
    """One sweep over the selections for each group of columns; the result is written once."""
    visits, per_selection, factors = operands
    num_groups = factors.shape[0]
    # With a single group, the factors stay in VMEM from the first part to the next.
    factor_reads = visits.counts.size if num_groups > 1 else 1
    swept = num_groups * tiled_bytes(*jax.tree.leaves(per_selection))
    return pl.CostEstimate(
        flops=2 * per_selection[0].size * result.shape[1],
        transcendentals=0,
        bytes_accessed=tiled_bytes(*visits, result) + swept + factor_reads * tiled_bytes(factors),
    )


class _Visits(NamedTuple):
    """The block of rows and the chunk of selections of each grid step.

    Blocks are split into two parts, for the two TensorCores of a device (v5p); a single core runs
    both in turn. Steps after the last visit of a part repeat its indices and do nothing.
    """

    counts: Int32[Array, "num_parts"]
    blocks: Int32[Array, "num_parts num_visits"]
    chunks: Int32[Array, "num_parts num_visits"]
    bounds: Int32[Array, "num_blocks+1"]

    @classmethod
    def of(cls, rows: Array, num_rows: int, block_rows: int, chunk: int) -> "_Visits":
        num_blocks, num_chunks = pl.cdiv(num_rows, block_rows), pl.cdiv(rows.size, chunk)
        starts = lax.iota(jnp.int32, num_blocks) * block_rows
        starts = jnp.concatenate([starts, jnp.full(1, num_rows, jnp.int32)])
        bounds = jnp.searchsorted(rows, starts).astype(jnp.int32)  # first selection of each block
        first = jnp.minimum(bounds[:-1] // chunk, num_chunks - 1)
        last = jnp.maximum((bounds[1:] - 1) // chunk, first)
        # Blocks without selections are also visited, to write zeros.
        ends = jnp.cumsum(last - first + 1, dtype=jnp.int32)
        begins = ends - (last - first + 1)

        num_parts = min(2, num_blocks)
        part_blocks = pl.cdiv(num_blocks, num_parts)
        part_begins = begins[::part_blocks, None]
        part_ends = jnp.concatenate([part_begins[1:], ends[-1:, None]])
        steps = lax.broadcasted_iota(jnp.int32, (num_parts, part_blocks + num_chunks - 1), 1)
        visits = jnp.minimum(part_begins + steps, part_ends - 1)
        blocks = jnp.searchsorted(begins, visits, side="right").astype(jnp.int32) - 1
        counts = (part_ends - part_begins)[:, 0]
        return cls(counts, blocks, first[blocks] + visits - begins[blocks], bounds)


def _row_sums_kernel(core_dim: int, chunk: int) -> Any:
    def kernel(*refs: Any) -> None:
        # prefetch  the visits, in SMEM
        # inputs    rows relative to their block, tokens and weights [1, chunk] in SMEM;
        #           factors [1, T, S, 128] in VMEM
        # outputs   a block of rows [B, columns] in VMEM
        # scratch   their sums [B * S, 128] in VMEM
        visits, (rows, tokens, *weights, factors, output, sums) = _Visits(*refs[:4]), refs[4:]
        part, group, visit = (pl.program_id(axis) for axis in range(3))
        num_visits = pl.num_programs(2)
        step = part * num_visits + visit
        count, block = visits.counts[part], visits.blocks[step]
        sublanes, (block_rows, width) = factors.shape[2], output.shape

        @pl.when((visit == 0) | (visits.blocks[jnp.maximum(step - 1, 0)] != block))
        def _zero() -> None:
            sums[...] = jnp.zeros_like(sums)

        offset = visits.chunks[step] * chunk
        first = jnp.maximum(visits.bounds[block] - offset, 0)
        last = jnp.minimum(visits.bounds[block + 1] - offset, chunk)
        shape = (sublanes, _LANES)
        line = lax.broadcasted_iota(jnp.int32, shape, 0) + group * sublanes
        column = line * _LANES + lax.broadcasted_iota(jnp.int32, shape, 1)
        in_core = [column >= core * core_dim for core in range(1, len(weights))]

        def lines_of(row: Array) -> Any:
            return pl.ds(pl.multiple_of(row * sublanes, sublanes), sublanes)

        def add(selection: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            previous, total = carry
            row = rows[0, selection]
            weight = jnp.full(shape, weights[0][0, selection])
            for mask, core_weight in zip(in_core, weights[1:], strict=True):
                weight = jnp.where(mask, core_weight[0, selection], weight)
            # Compare rows as vectors, because the scalar unit is the bottleneck. Store the partial
            # sum of the row every time, which is cheaper than detecting whether it is complete.
            here = jnp.full(shape, row)
            total = jnp.where(here == previous, total, 0.0)
            total += weight * factors[0, tokens[0, selection]]
            sums[lines_of(row), :] = total
            return here, total

        @pl.when((visit < count) & (first < last))
        def _add() -> None:
            row = rows[0, first]
            num_rounds = lax.div(last - first, jnp.int32(_UNROLL))

            def add_several(i: Array, carry: Any) -> Any:
                for j in range(_UNROLL):
                    carry = add(first + _UNROLL * i + j, carry)
                return carry

            carry = jnp.full(shape, row), sums[lines_of(row), :]
            carry = lax.fori_loop(0, num_rounds, add_several, carry)
            lax.fori_loop(first + _UNROLL * num_rounds, last, add, carry)

        next_step = jnp.minimum(step + 1, visits.blocks.shape[0] - 1)

        @pl.when((visit == count - 1) | ((visit < count) & (visits.blocks[next_step] != block)))
        def _put() -> None:
            def put_tile(i: Array, _: None) -> None:
                start = pl.multiple_of(i * _TILE_ROWS, _TILE_ROWS)
                for first_lane in range(0, width, _LANES):
                    lanes = slice(first_lane, min(width, first_lane + _LANES))
                    line = start * sublanes + first_lane // _LANES
                    tile = sums[pl.ds(line, _TILE_ROWS, stride=sublanes), :]
                    tile = tile[:, : lanes.stop - lanes.start]
                    output[pl.ds(start, _TILE_ROWS), lanes] = tile.astype(output.dtype)

            lax.fori_loop(0, block_rows // _TILE_ROWS, put_tile, None)

    kernel.__name__ = "_value_aggregation_row_sums_kernel"
    return kernel
