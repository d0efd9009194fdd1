"""Exact selection on the VPU of a TPU: sorting networks whose items are tiles of tokens.

An item of a list is a full register, [8, 128], in which every element belongs to a different token,
which has its own list. So a comparator acts on the lists of 1024 tokens at once, no data moves
between lanes, and no memory access order is slower than another. Items are pairs of a key, an int32
with the same order as the score, and an id. Equal keys are ordered by id, the lower one first, so
no two items are equal, and the result is unique although the networks are not stable.

A comparator takes 9 vector operations. Networks run in registers on 16 items (32 registers) at a
time, four stages per pass over VMEM.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

RADIX = 16  # items of a list in registers at a time

NOTHING = jnp.iinfo(jnp.int32).min  # the key of an empty item: ranks below every score
_NAN = jnp.iinfo(jnp.int32).max


class Items(NamedTuple):
    """Lists in VMEM, [places, 8, 128] each."""

    keys: Any
    ids: Any


Item = tuple[Array, Array]  # key and id


def key_of(scores: Array) -> Array:
    """Maps float32 scores to ints of the same order; -0 equals 0, NaN ranks above all numbers."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.int32)
    keys = bits ^ ((bits >> 31) & _NAN)
    return jnp.where(jnp.isnan(scores), _NAN, keys)


def score_of(keys: Array) -> Array:
    """The inverse of `key_of`; maps NOTHING to NaN."""
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & _NAN), jnp.float32)


def sort(items: Items, size: int, source: Callable[[Array], list[Item]]) -> None:
    """Fills the first `size` places, a power of two >= RADIX, with a sorted list, best first.

    `source(place)` computes the RADIX unsorted items that start at a place.
    """

    def sort_in_registers(i: Array, _: None) -> None:
        start = i * RADIX
        _store(items, pl.ds(start, RADIX), _sorted(source(start)))

    lax.fori_loop(0, size // RADIX, sort_in_registers, None)
    length = 2 * RADIX
    while length <= size:
        _merge_neighbours(items, size, length)
        length *= 2


def keep_best(best: Items, others: Items, size: int) -> None:
    """Merges two sorted lists of `size` items and keeps the better half in `best`."""
    stride = size // RADIX

    def merge_in_registers(offset: Array, _: None) -> None:
        places = pl.ds(offset, RADIX, stride)
        mirrored = pl.ds(stride - 1 - offset, RADIX, stride)
        pairs = zip(_load(best, places), reversed(_load(others, mirrored)), strict=True)
        _store(best, places, _cleaned([_better(a, b) for a, b in pairs]))

    lax.fori_loop(0, stride, merge_in_registers, None)
    _clean_runs(best, size, stride)


def clear(items: Items, size: int) -> None:
    """Fills the first `size` places with empty items."""
    shape = (size, *items.keys.shape[1:])
    items.keys[:size] = jnp.full(shape, NOTHING, jnp.int32)
    items.ids[:size] = jnp.zeros(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Staircase:
    """The s x s grid of a token's candidate pairs, in blocks ordered so that the best come first.

    Rows and columns are in the order of their shortlists, best first, and s is padded to a power of
    two. Each block has `size` pairs. Blocks in rows 2^k to 2^(k+1) - 1 are at most 2^k high, so
    that, in ascending order of (row + 1) (column + 1) of their first pair, blocks cover the
    staircase (i + 1) (j + 1) <= reach for every reach; see `_Staircase` in `../xla.py`.

    Blocks are visited in this order. A block is skipped if no token has a pair in it that precedes
    its m-th best so far. This proves the result block by block, so a failed check costs one block,
    not the full grid.

    Attributes:
        shortlist: s.
        padded: a power of two, at least RADIX and s.
        size: a power of two from RADIX to padded squared, at least m.
    """

    shortlist: int
    padded: int
    size: int

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """First row, first column and log2 of the width of each block, in visiting order."""
        lowest = max(1, self.size // self.padded)
        # RADIX / 2 adjacent pairs of a block are always in the same row.
        starts = [0, *(lowest << k for k in range((self.padded // lowest).bit_length() - 1))]
        blocks = []
        for start in starts:
            height = min(max(start, lowest), 2 * self.size // RADIX)
            width = self.size // height
            blocks += [
                (row, column, width.bit_length() - 1)
                for row in range(start, max(2 * start, lowest), height)
                for column in range(0, self.padded, width)
                if row < self.shortlist and column < self.shortlist
            ]
        return sorted(blocks, key=lambda block: ((block[0] + 1) * (block[1] + 1), block[0]))


def best_pairs(
    staircase: Staircase,
    table: Any,
    factors: Any,
    additive: bool,
    top_m: int,
    is_token: Array,
    best: Items,
    work: Items,
) -> None:
    """Fills `best` with the pairs of highest score; the id of a pair is row * padded + column.

    Args:
        staircase: the grid.
        table: its blocks, flattened, int32 in SMEM.
        factors: [2, rank, places, 8, 128] float32. The score of a pair is the sum over ranks of its
            row factor times its column factor, or the sum of the two if additive. Columns after the
            shortlist repeat its last one.
        additive: whether scores are sums.
        top_m: number of best pairs that must be exact; later places may hold other pairs.
        is_token: mask of the elements that hold a token, [8, 128].
        best: has staircase.size places.
        work: has as many, for the pairs of a block.
    """
    padded, size = staircase.padded, staircase.size
    rank, width = factors.shape[1], RADIX // 2
    clear(best, size)

    def scores_of(row: Array, column: Array) -> list[Array]:
        rows = [factors[0, q, row] for q in range(rank)]
        columns = [factors[1, q, pl.ds(column, width)] for q in range(rank)]
        if additive:
            return [rows[0] + columns[0][k] for k in range(width)]
        return [
            functools.reduce(jnp.add, [rows[q] * columns[q][k] for q in range(rank)])
            for k in range(width)
        ]

    def visit(i: Array, _: None) -> None:
        first_row, first_column, log_width = (table[3 * i + k] for k in range(3))

        def corner(pair: Array) -> tuple[Array, Array]:
            row = first_row + (pair >> log_width)
            return row, first_column + (pair & ((1 << log_width) - 1))

        def highest(i: Array, highest: Array) -> Array:
            return functools.reduce(jnp.maximum, scores_of(*corner(width * i)), highest)

        def items(start: Array) -> list[Item]:
            block_items = []
            for pair in (start, start + width):
                row, column = corner(pair)
                for k, scores in enumerate(scores_of(row, column)):
                    inside = (row < staircase.shortlist) & (column + k < staircase.shortlist)
                    keys = jnp.where(inside, key_of(scores), NOTHING)
                    block_items.append((keys, jnp.full_like(keys, row * padded + column + k)))
            return block_items

        most = lax.fori_loop(0, size // width, highest, jnp.full(is_token.shape, -jnp.inf))
        last, last_id = score_of(best.keys[top_m - 1]), best.ids[top_m - 1]
        # Comparisons with NaN are false, so a NaN makes the block doubtful.
        later = (most == last) & (first_row * padded + first_column > last_id)
        doubt = jnp.where((most < last) | later | ~is_token, 0.0, 1.0)

        @pl.when(jnp.max(doubt) > 0)
        def _merge() -> None:
            sort(work, size, items)
            keep_best(best, work, size)

    lax.fori_loop(0, len(staircase.blocks), visit, None)


def _merge_neighbours(items: Items, size: int, length: int) -> None:
    """Merges pairs of sorted runs of `length` / 2 into runs of `length`."""
    half, stride = length // 2, length // RADIX

    def merge_in_registers(i: Array, _: None) -> None:
        run, offset = _split(i, stride)
        start = run * length
        upper = pl.ds(start + offset, RADIX // 2, stride)
        lower = pl.ds(start + half + stride - 1 - offset, RADIX // 2, stride)
        merged = _merged([*_load(items, upper), *_load(items, lower)])
        _store(items, upper, merged[: RADIX // 2])
        _store(items, lower, merged[RADIX // 2 :])

    lax.fori_loop(0, size // RADIX, merge_in_registers, None)
    _clean_runs(items, size, stride)


def _clean_runs(items: Items, size: int, length: int) -> None:
    """Sorts the bitonic runs of `length`."""
    while length > 1:
        length = _clean_stages(items, size, length)


def _clean_stages(items: Items, size: int, length: int) -> int:
    """Splits bitonic runs of `length` into shorter bitonic runs in order; returns their length."""
    radix = min(RADIX, length)
    stride = length // radix

    def clean_in_registers(i: Array, _: None) -> None:
        run, offset = _split(i, stride)
        places = pl.ds(run * length + offset, radix, stride)
        _store(items, places, _cleaned(_load(items, places)))

    lax.fori_loop(0, size // radix, clean_in_registers, None, unroll=RADIX // radix)
    return stride


def _sorted(items: Sequence[Item]) -> list[Item]:
    """Batcher's odd-even merge sort: 63 comparators for 16 items."""
    if len(items) == 1:
        return list(items)
    half = len(items) // 2
    return _odd_even_merged([*_sorted(items[:half]), *_sorted(items[half:])])


def _odd_even_merged(items: Sequence[Item]) -> list[Item]:
    """Merges two sorted halves."""
    if len(items) == 2:
        return list(_exchanged(*items))
    even, odd = _odd_even_merged(items[::2]), _odd_even_merged(items[1::2])
    inner = [_exchanged(a, b) for a, b in zip(odd[:-1], even[1:], strict=True)]
    return [even[0], *(item for pair in inner for item in pair), odd[-1]]


def _merged(items: Sequence[Item]) -> list[Item]:
    """The first stages of merging two sorted runs, on equally spaced items of both."""
    half = len(items) // 2
    pairs = [_exchanged(items[k], items[-1 - k]) for k in range(half)]
    return [*_cleaned([a for a, _ in pairs]), *_cleaned([b for _, b in reversed(pairs)])]


def _cleaned(items: Sequence[Item]) -> list[Item]:
    """The stages of a bitonic merge, starting at a distance of half the number of items."""
    if len(items) == 1:
        return list(items)
    half = len(items) // 2
    pairs = [_exchanged(a, b) for a, b in zip(items[:half], items[half:], strict=True)]
    return [*_cleaned([a for a, _ in pairs]), *_cleaned([b for _, b in pairs])]


def _exchanged(a: Item, b: Item) -> tuple[Item, Item]:
    """A comparator: returns the better item and the other one."""
    in_order = _precedes(a, b)
    better = jnp.where(in_order, a[0], b[0]), jnp.where(in_order, a[1], b[1])
    other = jnp.where(in_order, b[0], a[0]), jnp.where(in_order, b[1], a[1])
    return better, other


def _better(a: Item, b: Item) -> Item:
    in_order = _precedes(a, b)
    return jnp.where(in_order, a[0], b[0]), jnp.where(in_order, a[1], b[1])


def _precedes(a: Item, b: Item) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _load(items: Items, places: Any) -> list[Item]:
    return list(zip(items.keys[places], items.ids[places], strict=True))


def _store(items: Items, places: Any, values: Sequence[Item]) -> None:
    keys, ids = zip(*values, strict=True)
    items.keys[places] = jnp.stack(keys)
    items.ids[places] = jnp.stack(ids)


def _split(i: Array, size: int) -> tuple[Array, Array]:
    """Quotient and remainder by a power of two."""
    return i >> (size.bit_length() - 1), i & (size - 1)
