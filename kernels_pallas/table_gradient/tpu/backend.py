"""Gradients of tables on TPU: selections are added up in VMEM, where a row of a table has its sum.

Sorted by id, the selections of a block of rows lie side by side. The grid walks over blocks and
over chunks of selections, both in order, as one walks along two rulers: a visit adds what its chunk
holds for its block, and a block goes to HBM once, when the last selection of its rows is added. So
nothing is read back, nobody writes where another does, sums have the order of the selections and no
block is carried over into another; rows that nobody selected are written as zeros by the same pass,
in the dtype of the table. Of a row-sparse gradient the rows are numbered without gaps: the same.

    traffic     The factors, a row a token, are fetched into VMEM once, not once for each of the K
                selections of a token: [T, D] is small beside the [T*K, D] products. Where they do
                not fit, the columns are cut into groups that are swept one after the other.
    layout      In VMEM a row of 128 * S columns is S sublanes of its own, so that any row can be
                addressed and an addition costs one register up to 1024 columns. Blocks are turned
                into the tiles of HBM, eight rows a register, as they leave.
    cost        The compiler's bundles for v5e: 7 for a selection, which the scalar unit bounds, of
                any width up to 1024; 1 to 3 for a row of the result; about 250 for a visit. Counted
                in its schedule, not measured on a chip.
    precision   float32 on the vector unit; the matrix unit is not used.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import accumulation_dtype, vary_alike
from kernels_pallas.table_gradient.call import TableGradientCall, TableRows, Term
from kernels_pallas.table_gradient.selections import number_ids, unique_ids

_LANES, _SUBLANES = 128, 8
_UNROLL = 8
_TILE_ROWS = 16  # of a bfloat16 tile; a float32 tile has half as many
_FACTOR_BYTES = 40 * 2**20  # of VMEM, for the factors of one group of columns
_VMEM_BYTES = 56 * 2**20  # of 64 MiB on tpu7x; v5e, v5p and v6e have more


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a step of the grid holds.

    Attributes:
        rows: of the result, a multiple of 16.
        chunk: selections, a multiple of 128.
        sublanes: of 128 columns each; a power of two up to 8.
    """

    rows: int
    chunk: int
    sublanes: int


def heuristic(num_factors: int, dim: int) -> Blocks:
    """Blocks for factors of `num_factors` rows of `dim` columns.

    A visit costs as much as 30 selections, so a block and a chunk should hold many more. A block
    has 2 MiB, and is in VMEM three times; the visits of a million rows take at most 24 kB of SMEM.
    Reasoned from the compiler's schedule, not measured.
    """
    needed = pl.cdiv(dim, _LANES)
    sublanes = min(_SUBLANES, 1 << (needed - 1).bit_length())
    while sublanes > 1 and _factor_bytes(num_factors, sublanes) > _FACTOR_BYTES:
        sublanes //= 2
    return Blocks(rows=4096 // sublanes, chunk=2048, sublanes=sublanes)


def _choose_blocks(
    num_selections: int, num_cores: int, factors: Any, num_rows: int, dtype: DTypeLike
) -> Blocks:
    """Measured blocks, where there are some for these very sizes, else those of `heuristic`."""
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


def too_many_tokens(num_tokens: int) -> tuple[bool, str]:
    """Whether the factors of so many tokens do not fit, and the words for it."""
    needed = _factor_bytes(num_tokens, 1)
    reason = f"{num_tokens} tokens need {needed} bytes of VMEM, there are {_FACTOR_BYTES}"
    return needed > _FACTOR_BYTES, reason


def unsupported_reason(call: TableGradientCall, platform: str) -> str | None:
    """Returns why this implementation cannot take a call of these shapes and dtypes, or None."""
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
        too_many_tokens(call.indices.shape[0]),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def forward(call: TableGradientCall) -> Float[Array, "num_values dim"]:
    """Computes the dense gradient."""
    ids, tokens, (weights,) = _sort_selections(call.indices, [call.term])
    return sum_by_row(ids, tokens, weights, call.factors, call.num_values, call.dtype)


def rows(call: TableGradientCall, max_rows: int) -> TableRows:
    """Computes the same row by row."""
    return rows_of_tables(call.indices, call.num_values, max_rows, [call.term])[0]


def of_tables(
    tables: Sequence[Any],
    indices: Int32[Array, "num_tokens num_selected"],
    terms: list[Term],
) -> list[Array]:
    """The gradient of each table, in its own dtype, from what it is a sum of; sorted once."""
    ids, tokens, weights = _sort_selections(indices, terms)
    return [
        sum_by_row(ids, tokens, columns, term.factors, table.shape[0], table.dtype)
        for columns, term, table in zip(weights, terms, tables, strict=True)
    ]


def rows_of_tables(
    indices: Int32[Array, "num_tokens num_selected"],
    num_values: int,
    max_rows: int,
    terms: list[Term],
) -> list[TableRows]:
    """The same in float32, row by row."""
    ids, tokens, weights = _sort_selections(indices, terms)
    rows = number_ids(ids)
    sums = [
        sum_by_row(rows, tokens, columns, term.factors, max_rows, jnp.float32)
        for columns, term in zip(weights, terms, strict=True)
    ]
    ids, num_rows = unique_ids(ids, num_values, max_rows)
    return [TableRows(ids, num_rows, x) for x in sums]


def _sort_selections(indices: Array, terms: list[Term]) -> tuple[Array, Array, list[list[Array]]]:
    """Rising ids of all selections; for each the token and, for each term and core, the weight.

    Equal ids are in order of k, then of tokens. Weights travel through the sort because to gather
    them afterwards would take a TPU a step for each. The position is a second key because a stable
    sort has one more column and takes the compiler half as long again.
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
        rows: where each selection adds, rising: the ids for a dense gradient, their numbers for a
            row-sparse one. Selections of rows from `num_rows` on are left out.
        tokens: whose factor each selection multiplies.
        weights: of each selection, for each of the equal slices of a factor.
        factors: a row a token.
        num_rows: rows of the result.
        dtype: of the result.
        blocks: in place of the measured ones, or those of `heuristic`.
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
    operands = vary_alike(operands)
    launch = pl.pallas_call(
        _row_sums_kernel(dim // len(weights), chunk),
        name="value_aggregation_row_sums",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(num_parts, num_groups, num_visits),
            in_specs=[
                *[per_selection] * (2 + len(weights)),
                # One buffer: it changes with the group alone.
                pl.BlockSpec(
                    group_shape,
                    lambda part, group, *_: (group, 0, 0, 0),
                    pipeline_mode=pl.Buffered(1),
                ),
            ],
            out_specs=pl.BlockSpec((block_rows, width), block_index),
            scratch_shapes=[pltpu.VMEM((block_rows * blocks.sublanes, _LANES), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (num_rows, dim),
            dtype,
            manual_axis_type=jax.typeof(operands[-1]).manual_axis_type,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows.size * dim,
            transcendentals=0,
            bytes_accessed=num_rows * dim * jnp.dtype(dtype).itemsize
            + 4 * (factors.size + num_groups * rows.size * (2 + len(weights))),
        ),
    )
    # Pallas cannot map over prefetched scalars: vmap becomes a loop of calls.
    return custom_batching.sequential_vmap(launch)(*jax.tree.leaves(operands))


class _Visits(NamedTuple):
    """Which block of rows and which chunk of selections each step of the grid brings together.

    Blocks are split in parts, for the two TensorCores of a device (v5p); one takes them in turn.
    Steps beyond the last visit of a part stay where they are, and do nothing.
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
        bounds = jnp.searchsorted(rows, starts).astype(jnp.int32)  # of the selections of a block
        first = jnp.minimum(bounds[:-1] // chunk, num_chunks - 1)
        last = jnp.maximum((bounds[1:] - 1) // chunk, first)
        # A block without selections is visited too, to be zeroed.
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
        # inputs    rows, counted from the block's first, tokens and weights [1, chunk] in SMEM;
        #           factors [1, T, S, 128] in VMEM
        # outputs   a block of rows [B, columns] in VMEM
        # scratch   their sums [B, S, 128] in VMEM
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
            # Rows are compared as vectors because the scalar unit has more to do. The sum of a row
            # so far is stored each time, which costs less than to find out whether it is complete.
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
