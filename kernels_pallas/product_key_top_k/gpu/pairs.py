"""Pairs of shortlisted keys in the Hopper kernel: staircase, certificate, full grid, results."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from kernels_pallas.common import add_up
from kernels_pallas.product_key_top_k.gpu import select
from kernels_pallas.product_key_top_k.gpu.memory import Blocks, GroupScratch, Plan
from kernels_pallas.product_key_top_k.gpu.select import LANES


class Grid:
    """Scores of the pairs of a warpgroup's tokens, computed from their shortlists."""

    def __init__(self, plan: Plan, core: list[list[Array]], local: GroupScratch) -> None:
        self.plan, self.core, self.local = plan, core, local
        self.chunks = range(plan.list_size // LANES)
        self.columns = [self._load(1, 1 + a) for a in range(plan.rank)]

    def _load(self, side: int, word: int) -> list[Array]:
        ref = self.local.list(side, word)
        return [
            select.as_float(select.load(ref.at[:, pl.ds(LANES * q, LANES)])) for q in self.chunks
        ]

    def row(self, i: Array) -> list[Array]:
        """S of row i times the core, [4, 32] for each rank of the columns."""
        ranks = range(self.plan.rank)
        first = pl.multiple_of(lax.div(i, LANES) * LANES, LANES)
        values = []
        for a in ranks:
            word = select.load(self.local.list(0, 1 + a).at[:, pl.ds(first, LANES)])
            value = select.in_lane(lax.rem(i, LANES), word)
            values.append(select.as_float(select.broadcast(value)))
        if self.plan.additive:
            return values
        return [
            add_up(values[a] * select.full(self.core[a][b], jnp.float32) for a in ranks)
            for b in ranks
        ]

    def sort_keys(self, row: list[Array], chunk: int) -> Array:
        """Sort keys of the scores of a row with 32 columns."""
        columns = [by_rank[chunk] for by_rank in self.columns]
        if self.plan.additive:
            return select.sort_key(row[0] + columns[0])
        return select.sort_key(add_up(x * y for x, y in zip(row, columns, strict=True)))

    def width(self, i: Array) -> Array:
        """Number of columns of row i inside the staircase."""
        return jnp.minimum(self.plan.shortlist, lax.div(jnp.int32(self.plan.reach), i + 1))

    def visit(self, body: Any, carry: Any) -> Any:
        """Folds over all pairs."""
        shortlist = self.plan.shortlist

        def visit_row(i: Array, carry: Any) -> Any:
            row = self.row(i)
            for chunk in self.chunks:
                column = select.lane() + LANES * chunk
                sort_key = select.where(
                    column < shortlist, self.sort_keys(row, chunk), select.EMPTY
                )
                carry = body(carry, [sort_key, column + i * shortlist])
            return carry

        return lax.fori_loop(0, shortlist, visit_row, carry)

    def put_staircase(self) -> None:
        """Overwrites the scores of keys with the sort keys of the pairs inside, row by row."""

        def put_row(i: Array, first: Array) -> Array:
            row, width = self.row(i), self.width(i)
            for chunk in self.chunks:

                @pl.when(LANES * chunk < width)
                def _(chunk: int = chunk) -> None:
                    # The next row overwrites what is stored past the width.
                    select.store(
                        self.local.scores(first + LANES * chunk), self.sort_keys(row, chunk)
                    )

            return first + width

        lax.fori_loop(0, min(self.plan.shortlist, self.plan.reach), put_row, jnp.int32(0))

    def visit_staircase(self, places: Any, body: Any, carry: Any) -> Any:
        """Folds over the pairs inside; `places` is the result of `Plan.places`."""
        num_inside = self.plan.num_inside

        def visit_candidates(index: Array, carry: Any) -> Any:
            first = index * LANES
            sort_key = select.load(self.local.scores(first))
            sort_key = select.where(select.lane() + first < num_inside, sort_key, select.EMPTY)
            place = select.load_for_all(places.at[pl.ds(first, LANES)])
            return body(carry, [sort_key, place])

        return lax.fori_loop(0, pl.cdiv(num_inside, LANES), visit_candidates, carry)

    def doubts(self, last: tuple[Array, Array]) -> Array:
        """Nonzero where a pair outside may precede the last chosen one (sort key, index): [4]."""
        if self.plan.additive:
            return self._not_finite()
        last_key, last_place = (select.broadcast(x) for x in last)
        shortlist = self.plan.shortlist

        def look(i: Array, doubt: Array) -> Array:
            row, width = self.row(i), self.width(i)
            for chunk in self.chunks:
                column = select.lane() + LANES * chunk
                sort_key = self.sort_keys(row, chunk)
                earlier = (sort_key == last_key) & (column + i * shortlist < last_place)
                ahead = (sort_key > last_key) | earlier
                outside = (column >= width) & (column < shortlist)
                doubt = select.where(ahead & outside, 1, doubt)
            return doubt

        doubt = lax.fori_loop(0, shortlist, look, select.full(0))
        return jnp.max(doubt, axis=1)

    def _not_finite(self) -> Array:
        """Nonzero where S is not finite: only infinities break the order of rounded sums."""
        doubt = select.full(0)
        for side in range(2):
            for chunk, scores in enumerate(self._load(side, 1)):
                exists = select.lane() + LANES * chunk < self.plan.shortlist
                odd = exists & ~select.is_finite(select.as_int(scores))
                doubt = select.where(odd, 1, doubt)
        return jnp.max(doubt, axis=1)


def select_pairs(plan: Plan, blocks: Blocks, grid: Grid, places: Any, local: GroupScratch) -> None:
    """Selects the best pairs of each token, best first; writes their indices in the grid."""

    def search(visit: Any) -> tuple[Array, Array]:
        return select.best(visit, plan.top_m, blocks.pair_depth, 2, [local.places], local.flags)

    if not plan.num_inside:
        search(grid.visit)
        return
    grid.put_staircase()
    last = search(functools.partial(grid.visit_staircase, places))
    select.store(local.flags, grid.doubts(last))

    @pl.when(select.any_token(local.flags))
    def _() -> None:
        search(grid.visit)


def write_results(
    plan: Plan, head: Array, tokens: Any, cores: Any, results: Any, local: GroupScratch
) -> None:
    """Writes scores, addresses and S of the chosen pairs, 32 pairs at a time."""
    scores, addresses, *chosen = results
    sides = range(2)
    chunks = range(plan.list_size // LANES)
    words = [[local.list(side, word) for word in range(1 + plan.rank)] for side in sides]

    def look_up(place: Array, ref: Any) -> Array:
        """The word of each token's shortlist at a given index, [4]."""
        selected = select.full(0)
        for q in chunks:
            word = select.load(ref.at[:, pl.ds(LANES * q, LANES)])
            selected = select.where(select.lane() + LANES * q == place, word, selected)
        return jnp.sum(selected, axis=1)

    def put(first: Any, count: int) -> None:
        pair_places = select.load(local.places.at[:, pl.ds(first, LANES)])

        def collect(index: Array, columns: list[Array]) -> list[Array]:
            place = select.broadcast(select.in_lane(index, pair_places))
            row = lax.div(place, select.full(plan.shortlist))
            keys = row, place - row * plan.shortlist
            pair_words = [
                look_up(key, ref) for key, refs in zip(keys, words, strict=True) for ref in refs
            ]
            here = select.lane() == index
            return [
                select.where(here, select.broadcast(x), y)
                for x, y in zip(pair_words, columns, strict=True)
            ]

        nothing = [select.full(0)] * (2 * (1 + plan.rank))
        columns = lax.fori_loop(0, count, collect, nothing)
        row_key, *row_words = columns[: 1 + plan.rank]
        column_key, *column_words = columns[1 + plan.rank :]
        pairs = head * plan.top_m + first
        _put(addresses.at[tokens], pairs, row_key * plan.num_keys + column_key, count)
        for core in range(max(1, plan.num_cores)):
            score = _pair_score(plan, cores, core, head, row_words, column_words)
            _put(scores.at[tokens, :, core], pairs, score, count)
        if not chosen:
            return
        for side, side_words in enumerate((row_words, column_words)):
            for a, word in enumerate(side_words):
                at = chosen[0].at[tokens, side, head, a]
                _put(at, first, select.as_float(word), count)

    num_full = plan.top_m // LANES
    lax.fori_loop(0, num_full, lambda i, _: put(i * LANES, LANES), None)
    if plan.top_m % LANES:
        put(num_full * LANES, plan.top_m % LANES)


def _pair_score(
    plan: Plan, cores: Any, core: int, head: Array, rows: list[Array], columns: list[Array]
) -> Array:
    """The scores of one core for pairs of keys with the given S, by rank, as words."""
    rows, columns = ([select.as_float(word) for word in words] for words in (rows, columns))
    if plan.additive:
        return rows[0] + columns[0]
    return add_up(
        rows[a] * select.full(cores[core, head, a, b], jnp.float32) * columns[b]
        for a in range(plan.rank)
        for b in range(plan.rank)
    )


def _put(ref: Any, first: Any, values: Array, count: int) -> None:
    """Writes the first `count` lanes of [4, 32] to columns of a ref [4, any]."""
    if count == LANES:
        select.store(ref.at[:, pl.ds(first, LANES)], values)
        return
    is_int = values.dtype == jnp.int32
    words = values if is_int else select.as_int(values)

    def put_column(index: Array, _: None) -> None:
        word = select.in_lane(index, words)
        select.store(ref.at[:, first + index], word if is_int else select.as_float(word))

    lax.fori_loop(0, count, put_column, None)
