"""The best of many candidates on a Hopper GPU, where each warp of a warpgroup serves one token.

Arrays are [4, 32]: a token a warp, a lane each candidate. A maximum or a sum over the lanes is then
one instruction (`redux.sync` of whole numbers) and asks no other warp. Mosaic GPU has no sort, no
shuffle and no access to memory at places that differ by lane; a selection gets by without:

    lists       Each lane keeps the `depth` best of the candidates that it sees, in order, in
                registers: one of every 32 candidates, so the best ones are spread over the lanes.
    tournament  As often as one is wanted, the best of the 32 heads wins and leaves its list.
    scan        A lane whose list has run out while it had to drop candidates may spoil the result.
                That is noticed, and the tokens of the warpgroup are done again: the best of all
                candidates after the last one found, as often as one is wanted.

So the result is exact always. Scores are compared as whole numbers in the same order; equal ones
are taken by rising number of the candidate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TOKENS, LANES = 4, 32  # of a warpgroup and of a warp

# Row i in warp i, column j in lane j mod 32.
BY_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((TOKENS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

EMPTY = -(2**31)  # below the image of any score
_LARGEST = 2**31 - 1
_NAN_IMAGE = 0x7FC00000
_INFINITY = 0x7F800000

# A candidate: the image of its score, its number, and other words (int32), all [4, 32].
Words = list[Array]
# visit(body, carry): folds body(carry, words) over all candidates; numbers rise in every lane.
Visit = Callable[[Callable[[Any, Words], Any], Any], Any]


def lane() -> Array:
    """The number of each lane, [4, 32]."""
    return plgpu.broadcasted_iota(jnp.int32, (TOKENS, LANES), 1, layout=BY_LANE)


def everywhere(value: Any, dtype: Any = jnp.int32) -> Array:
    """One number for all lanes of all tokens, [4, 32]."""
    return plgpu.layout_cast(jnp.full((TOKENS, LANES), value, dtype), BY_LANE)


def spread(by_token: Array) -> Array:
    """A number of each token, [4], to all of its lanes, [4, 32]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(by_token, (TOKENS, LANES), (0,)), BY_LANE)


def where(condition: Array, x: Any, y: Any) -> Array:
    """Selects among [4, 32]; x or y may be one whole number.

    Mosaic GPU gives `jnp.where` of a constant and an array the sign of the condition: none, so that
    whole numbers would be compared as unsigned from there on. An array of constants keeps its own.
    """
    x = everywhere(x) if isinstance(x, int) else x
    return jnp.where(condition, x, y)


def load(ref: Any) -> Array:
    """Reads [4, 32] from shared or device memory."""
    return plgpu.load(ref, layout=BY_LANE, optimized=False)


def load_for_all(ref: Any) -> Array:
    """Reads [32], a number a lane, the same for all tokens."""
    row = plgpu.load(ref, layout=BY_LANE.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (TOKENS, LANES), (1,)), BY_LANE)


def store(ref: Any, value: Array) -> None:
    """Writes [4, 32], or [4]."""
    plgpu.store(ref, value, optimized=False)


def as_int(x: Array) -> Array:
    """The bits of a float32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def as_float(x: Array) -> Array:
    """The float32 of these bits."""
    return lax.bitcast_convert_type(x, jnp.float32)


def image(scores: Array) -> Array:
    """Whole numbers in the order of float32 scores: -0 equals 0, any NaN is the largest."""
    bits = as_int(scores)
    size = bits & _LARGEST
    ordered = where(bits >= 0, bits, bits ^ _LARGEST)
    return where(size > _INFINITY, _NAN_IMAGE, where(size == 0, 0, ordered))


def is_finite(bits: Array) -> Array:
    """Whether these bits are those of a finite float32."""
    return (bits & _LARGEST) < _INFINITY


def in_lane(wanted: Array, word: Array) -> Array:
    """The word of each token, [4], that is in the lane of this number."""
    return jnp.sum(where(lane() == wanted, word, 0), axis=1)


def best(
    visit: Visit, count: int, depth: int, num_words: int, outputs: Sequence[Any], flags: Any
) -> tuple[Array, Array]:
    """Writes the words but the image of the `count` best candidates, best first.

    Args:
        visit: what folds over the candidates.
        count: how many are wanted, no more than there are.
        depth: of the lists.
        num_words: of a candidate.
        outputs: a reference [4, count or more, in whole 32s] of each word but the image.
        flags: int32[4] in shared memory, of this warpgroup.

    Returns:
        Image and number of the last of them, [4].
    """
    *last, doubt = _tournament(visit, count, depth, num_words, outputs)
    store(flags, doubt)
    return lax.cond(
        any_token(flags),
        lambda: _scan(visit, count, num_words, outputs),
        lambda: (last[0], last[1]),
    )


def any_token(flags: Any) -> Array:
    """Whether any of the four is not 0, for all threads of the warpgroup alike."""
    return (flags[0] | flags[1] | flags[2] | flags[3]) != 0


def _tournament(
    visit: Visit, count: int, depth: int, num_words: int, outputs: Sequence[Any]
) -> tuple[Array, Array, Array]:
    """Like `best`, and whether the result may be wrong."""
    nothing = [everywhere(EMPTY)] + [everywhere(0)] * (num_words - 1)

    def insert(carry: tuple[list[Words], Array], words: Words) -> tuple[list[Words], Array]:
        entries, dropped = carry
        inserted = []
        for entry in entries:
            # Of equal ones, the entry came earlier and has the lower number.
            ahead = words[0] > entry[0]
            pairs = list(zip(words, entry, strict=True))
            inserted.append([where(ahead, new, old) for new, old in pairs])
            words = [where(ahead, old, new) for new, old in pairs]
        return inserted, jnp.maximum(dropped, words[0])

    entries, dropped = visit(insert, ([nothing] * depth, everywhere(EMPTY)))

    def play(step: Array, carry: Any) -> Any:
        entries, doubt, _, columns = carry
        won, row = _winner(entries[0])
        spoiled = (entries[0][0] == EMPTY) & (dropped > EMPTY) & (dropped >= spread(row[0]))
        doubt = where(spoiled, 1, doubt)
        entries = [
            [where(won, later, now) for now, later in zip(entry, following, strict=True)]
            for entry, following in zip(entries, [*entries[1:], nothing], strict=True)
        ]
        columns = _collect(step, count, row[1:], columns, outputs)
        return entries, doubt, (row[0], row[1]), columns

    carry = (entries, everywhere(0), _before_all(), [everywhere(0)] * len(outputs))
    _, doubt, last, _ = lax.fori_loop(0, count, play, carry)
    return *last, jnp.max(doubt, axis=1)


def _scan(visit: Visit, count: int, num_words: int, outputs: Sequence[Any]) -> tuple[Array, Array]:
    nothing = [everywhere(EMPTY)] + [everywhere(0)] * (num_words - 1)

    def find_next(step: Array, carry: Any) -> Any:
        last, columns = carry
        last_image, last_number = (spread(x) for x in last)

        def keep(found: Words, words: Words) -> Words:
            later = (words[0] == last_image) & (words[1] > last_number)
            better = ((words[0] < last_image) | later) & (words[0] > found[0])
            return [where(better, new, old) for new, old in zip(words, found, strict=True)]

        _, row = _winner(visit(keep, nothing))
        columns = _collect(step, count, row[1:], columns, outputs)
        return (row[0], row[1]), columns

    carry = (_before_all(), [everywhere(0)] * len(outputs))
    return lax.fori_loop(0, count, find_next, carry)[0]


def _before_all() -> tuple[Array, Array]:
    """An image and a number that precede those of any candidate, [4]."""
    return jnp.max(everywhere(_LARGEST), axis=1), jnp.max(everywhere(-1), axis=1)


def _winner(words: Words) -> tuple[Array, list[Array]]:
    """The lane of the best of 32 candidates, [4, 32], and its words, [4]."""
    top = jnp.max(words[0], axis=1)
    leads = words[0] == spread(top)
    # The lowest number; there is an instruction for the largest.
    number = ~jnp.max(where(leads, ~words[1], EMPTY), axis=1)
    won = leads & (words[1] == spread(number))
    rest = [jnp.sum(where(won, word, 0), axis=1) for word in words[2:]]
    return won, [top, number, *rest]


def _collect(
    step: Array, count: int, row: list[Array], columns: list[Array], outputs: Sequence[Any]
) -> list[Array]:
    """Keeps the words of one step in one lane; writes them when there are 32, or no more."""
    place = lax.rem(step, LANES)
    here = lane() == place
    columns = [where(here, spread(x), kept) for x, kept in zip(row, columns, strict=True)]

    @pl.when((place == LANES - 1) | (step == count - 1))
    def _() -> None:
        first = pl.multiple_of(step - place, LANES)
        for output, column in zip(outputs, columns, strict=True):
            store(output.at[:, pl.ds(first, LANES)], column)

    return columns
