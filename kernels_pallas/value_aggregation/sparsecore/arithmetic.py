"""Arithmetic of a SparseCore vector subcore on rows in its local memory.

A register holds 8 (v5p, v6e) or 16 (tpu7x) 32-bit numbers: `lanes`. There are no wider vectors and
no matrix unit, so a row is processed in chunks of lanes. A vector of bfloat16 has twice as many
columns. It is read as 32-bit words and split into two registers, even and odd columns, by moving
each half into the upper half of a float32. Permutations reorder factors and sums to match, and
restore the order of sums: once per window, not once per row.

If the width is not a multiple of the chunk, the last chunk starts early and overlaps the one
before. Sums compute and store the overlapping columns twice, with the same result. Inner products
multiply them by zero the second time, so infinities in these columns can turn into NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc

from kernels_pallas.compat import bitcast_columns

# Sums, or factors, that a block of columns keeps in registers. More registers mean fewer loads of
# weights; 16 sums and the row chunks in flight fit 64 registers. Estimated, not measured.
_BLOCK_REGISTERS = 16
_UNROLLED_ROWS = 4


class Columns(NamedTuple):
    """Adjacent columns of a row: a core's slice, or all of them."""

    start: int
    width: int


def columns_per_chunk(dtype: Any, lanes: int) -> int:
    """Number of columns of a row of this dtype in one vector."""
    return lanes * 4 // jnp.dtype(dtype).itemsize


def for_rows(count: Any, body: Callable[[Any], None]) -> None:
    """Calls `body(k)` for each row; iterations must be independent of each other."""
    plsc.parallel_loop(0, count, unroll=_UNROLLED_ROWS)(body)


def fold_rows(count: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Folds `body(k, carry)` over rows, unrolled by hand: the compiler does not unroll carries."""

    def several(group: Any, carry: Any) -> Any:
        for i in range(_UNROLLED_ROWS):
            carry = body(group * _UNROLLED_ROWS + i, carry)
        return carry

    groups = lax.div(jnp.int32(count), _UNROLLED_ROWS)
    carry = lax.fori_loop(0, groups, several, carry)
    return lax.fori_loop(groups * _UNROLLED_ROWS, count, body, carry)


def multiply_rows(
    rows: Any, count: Any, columns: Columns, factor: Any, sums: Any, lanes: int
) -> None:
    """Sets sums[k] to a vector whose lanes sum to the inner product of row k with a factor.

    Refs: rows [>= count, D] of a table, factor [D] float32, sums [>= count, lanes].
    """
    chunk = columns_per_chunk(rows.dtype, lanes)

    def add_block(starts: Sequence[Any], num_shared: int, is_first: Any) -> None:
        factors: list[Array] = []
        for start in starts:
            factors += _load_split(factor, columns.start + start, chunk // lanes, lanes)
        if num_shared:
            num_parts = chunk // lanes
            column = lax.iota(jnp.int32, lanes) * num_parts
            for part in range(num_parts):
                i = len(factors) - num_parts + part
                factors[i] = jnp.where(column + part >= num_shared, factors[i], 0)

        def add_row(k: Any) -> None:
            parts = _load_row(rows, k, columns.start, starts, chunk, lanes)
            total = _tree_sum([x * y for x, y in zip(factors, parts, strict=True)])
            # The first block must overwrite sums[k], which is uninitialized.
            sums[k] = total if is_first is True else total + jnp.where(is_first, 0, sums[k])

        for_rows(count, add_row)

    _for_blocks(columns.width, chunk, lanes, add_block)


def add_weighted_rows(
    rows: Any, count: Any, columns: Columns, weights: Any, total: Any, is_first: Any, lanes: int
) -> None:
    """Adds weights[k] times the columns of each row k to total [D]; starts from 0 if is_first.

    Refs: rows [>= count, D] of a table, weights [>= count, lanes], all lanes equal.
    """
    chunk = columns_per_chunk(rows.dtype, lanes)
    num_parts = chunk // lanes

    def add_block(starts: Sequence[Any], num_shared: int, is_first_block: Any) -> None:
        # Overlapping chunks are in the same block, which is read before it is written.
        del num_shared, is_first_block
        sums: list[Array] = []
        for start in starts:
            parts = _load_split(total, columns.start + start, num_parts, lanes)
            sums += [jnp.where(is_first, 0, part) for part in parts]

        def add_row(k: Any, sums: list[Array]) -> list[Array]:
            weight = weights[k]
            parts = _load_row(rows, k, columns.start, starts, chunk, lanes)
            return [x + weight * y for x, y in zip(sums, parts, strict=True)]

        sums = fold_rows(count, add_row, sums)
        for i, start in enumerate(starts):
            parts = sums[i * num_parts : (i + 1) * num_parts]
            _store_merged(total, columns.start + start, parts, lanes)

    _for_blocks(columns.width, chunk, lanes, add_block)


def broadcast_entry(ref: Any, index: Any, lanes: int) -> Array:
    """Broadcasts the entry at `index` of a vector ref to all lanes.

    The ref must extend at least `lanes` - 1 entries beyond `index`.
    """
    return _permute(ref[pl.ds(index, lanes)], jnp.zeros(lanes, jnp.int32))


def broadcast_sum(x: Array) -> Array:
    """Sums over the lanes and broadcasts the result to all lanes."""
    lane = lax.iota(jnp.int32, x.size)
    distance = x.size // 2
    while distance:
        x += _permute(x, lane ^ distance)
        distance //= 2
    return x


def _for_blocks(
    width: int, chunk: int, lanes: int, body: Callable[[Sequence[Any], int, Any], None]
) -> None:
    """Calls `body` for each block of chunks, as many as fit in registers.

    Its arguments are the start columns of the chunks, the number of columns by which the last chunk
    overlaps the one before, and whether this is the first block.
    """
    num_chunks, num_left = divmod(width, chunk)
    num_blocks = pl.cdiv(num_chunks, max(1, _BLOCK_REGISTERS * lanes // chunk))
    size = pl.cdiv(num_chunks, num_blocks)
    num_equal = num_chunks // size if num_left == 0 else (num_chunks - 1) // size
    last = [i * chunk for i in range(num_equal * size, num_chunks)]
    if num_left:
        last.append(width - chunk)

    if num_equal == 1:
        body([i * chunk for i in range(size)], 0, True)
    elif num_equal > 1:

        @pl.loop(0, num_equal)
        def _block(block: Array) -> None:
            body([(block * size + i) * chunk for i in range(size)], 0, block == 0)

    if last:
        body(last, chunk - num_left if num_left else 0, num_equal == 0)


def _load_row(
    rows: Any, k: Any, first_column: int, starts: Sequence[Any], chunk: int, lanes: int
) -> list[Array]:
    """The chunks of row k in float32: one register each, or two for bfloat16."""
    parts: list[Array] = []
    for start in starts:
        row = rows[k, pl.ds(first_column + start, chunk)]
        if chunk == lanes:
            parts.append(row)
            continue
        words = bitcast_columns(row, jnp.uint32)
        for word in (words << 16, words & jnp.uint32(0xFFFF0000)):
            parts.append(lax.bitcast_convert_type(word, jnp.float32))
    return parts


def _load_split(ref: Any, start: Any, num_parts: int, lanes: int) -> list[Array]:
    """Loads columns of a float32 vector ref, in the order in which `_load_row` returns a row."""
    vectors = [ref[pl.ds(start + i * lanes, lanes)] for i in range(num_parts)]
    if num_parts == 1:
        return vectors
    first, second = vectors
    lane = lax.iota(jnp.int32, lanes)
    is_low = lane < lanes // 2
    from_lane = 2 * lane & lanes - 1
    return [
        jnp.where(is_low, _permute(first, from_lane + i), _permute(second, from_lane + i))
        for i in range(2)
    ]


def _store_merged(ref: Any, start: Any, parts: Sequence[Array], lanes: int) -> None:
    """The inverse of `_load_split`."""
    if len(parts) == 1:
        ref[pl.ds(start, lanes)] = parts[0]
        return
    even, odd = parts
    lane = lax.iota(jnp.int32, lanes)
    for i in range(2):
        from_lane = lane // 2 + i * (lanes // 2)
        merged = jnp.where(lane & 1 == 0, _permute(even, from_lane), _permute(odd, from_lane))
        ref[pl.ds(start + i * lanes, lanes)] = merged


def _permute(x: Array, lane: Array) -> Array:
    return jnp.take_along_axis(x, lane, axis=0, mode="promise_in_bounds")


def _tree_sum(terms: Sequence[Array]) -> Array:
    """Sums pairwise, as a tree, to shorten the chain of dependent additions."""
    while len(terms) > 1:
        pairs = [x + y for x, y in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + list(terms[2 * len(pairs) :])
    return terms[0]
