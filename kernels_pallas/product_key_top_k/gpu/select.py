"""Top-k over many candidates on a Hopper GPU; each warp of a warpgroup processes one token.

Arrays are [4, 32]: one token per warp, one candidate per lane. A max or sum over the lanes is then
a single instruction (`redux.sync` on integers) without communication between warps. Mosaic GPU has
no sort, no shuffle and no per-lane memory addressing, so the selection works without them:

    lists       Each lane keeps the `depth` best of the candidates that it sees in a sorted list in
                registers. It sees every 32nd candidate, so the best ones are spread over lanes.
    tournament  In each of `count` rounds, the best of the 32 list heads wins and is removed.
    scan        If a lane runs out of entries after it had to drop candidates, the result may be
                wrong. This is detected, and the tokens of the warpgroup are selected again: in each
                of `count` rounds, the best of all candidates after the previous winner.

So the result is always exact. Scores are compared as order-preserving integers; ties go to the
lower candidate index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.compat import gpu_store

TOKENS, LANES = 4, 32  # tokens per warpgroup, lanes per warp

# Row i in warp i, column j in lane j mod 32.
BY_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((TOKENS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

EMPTY = -(2**31)  # below the sort key of any score
_LARGEST = 2**31 - 1
_NAN_KEY = 0x7FC00000
_INFINITY = 0x7F800000

# A candidate: the sort key of its score, its index, and other words (int32), all [4, 32].
Words = list[Array]
# visit(body, carry): folds body(carry, words) over all candidates; indices ascend in every lane.
Visit = Callable[[Callable[[Any, Words], Any], Any], Any]


def lane() -> Array:
    """The index of each lane, [4, 32]."""
    return plgpu.broadcasted_iota(jnp.int32, (TOKENS, LANES), 1, layout=BY_LANE)


def full(value: Any, dtype: Any = jnp.int32) -> Array:
    """Broadcasts a scalar to all lanes of all tokens, [4, 32]."""
    return plgpu.layout_cast(jnp.full((TOKENS, LANES), value, dtype), BY_LANE)


def broadcast(by_token: Array) -> Array:
    """Broadcasts one value per token, [4], to its lanes, [4, 32]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(by_token, (TOKENS, LANES), (0,)), BY_LANE)


def where(condition: Array, x: Any, y: Any) -> Array:
    """`jnp.where` on [4, 32] arrays; x may be an int.

    If an operand of `jnp.where` is a constant, Mosaic GPU gives the result the signedness of the
    condition, which is unsigned, so later comparisons would be wrong. Broadcasting the constant to
    an array first avoids this.
    """
    x = full(x) if isinstance(x, int) else x
    return jnp.where(condition, x, y)


def load(ref: Any) -> Array:
    """Loads [4, 32] from shared or device memory."""
    return plgpu.load(ref, layout=BY_LANE, optimized=False)


def load_for_all(ref: Any) -> Array:
    """Loads [32], one number per lane, and broadcasts it over tokens: [4, 32]."""
    row = plgpu.load(ref, layout=BY_LANE.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (TOKENS, LANES), (1,)), BY_LANE)


def store(ref: Any, value: Array) -> None:
    """Stores [4, 32] or [4]."""
    gpu_store(ref, value, optimized=False)


def as_int(x: Array) -> Array:
    """Bitcasts float32 to int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def as_float(x: Array) -> Array:
    """Bitcasts int32 to float32."""
    return lax.bitcast_convert_type(x, jnp.float32)


def sort_key(scores: Array) -> Array:
    """Maps float32 scores to ints of the same order: -0 equals 0, any NaN is the largest."""
    bits = as_int(scores)
    size = bits & _LARGEST
    ordered = where(bits >= 0, bits, bits ^ _LARGEST)
    return where(size > _INFINITY, _NAN_KEY, where(size == 0, 0, ordered))


def is_finite(bits: Array) -> Array:
    """Whether the bits represent a finite float32."""
    return (bits & _LARGEST) < _INFINITY


def in_lane(wanted: Array, word: Array) -> Array:
    """Extracts the word in lane `wanted` for each token, [4]."""
    return jnp.sum(where(lane() == wanted, word, 0), axis=1)


def best(
    visit: Visit, count: int, depth: int, num_words: int, outputs: Sequence[Any], flags: Any
) -> tuple[Array, Array]:
    """Writes the words, except the sort key, of the `count` best candidates, best first.

    Args:
        visit: folds over the candidates.
        count: number of candidates to select, at most as many as there are.
        depth: length of the list of each lane.
        num_words: words per candidate.
        outputs: a ref [4, count padded to a multiple of 32] for each word except the sort key.
        flags: int32[4] in shared memory, private to this warpgroup.

    Returns:
        Sort key and index of the last selected candidate, [4] each.
    """
    *last, doubt = _tournament(visit, count, depth, num_words, outputs)
    store(flags, doubt)
    return lax.cond(
        any_token(flags),
        lambda: _scan(visit, count, num_words, outputs),
        lambda: (last[0], last[1]),
    )


def any_token(flags: Any) -> Array:
    """Whether any of the four flags is set; uniform over the threads of the warpgroup."""
    return (flags[0] | flags[1] | flags[2] | flags[3]) != 0


def _tournament(
    visit: Visit, count: int, depth: int, num_words: int, outputs: Sequence[Any]
) -> tuple[Array, Array, Array]:
    """Like `best`, but also returns whether the result may be wrong."""
    nothing = [full(EMPTY)] + [full(0)] * (num_words - 1)

    def insert(carry: tuple[list[Words], Array], words: Words) -> tuple[list[Words], Array]:
        entries, dropped = carry
        inserted = []
        for entry in entries:
            # In a tie, the existing entry wins: it came earlier and has the lower index.
            ahead = words[0] > entry[0]
            pairs = list(zip(words, entry, strict=True))
            inserted.append([where(ahead, new, old) for new, old in pairs])
            words = [where(ahead, old, new) for new, old in pairs]
        return inserted, jnp.maximum(dropped, words[0])

    entries, dropped = visit(insert, ([nothing] * depth, full(EMPTY)))

    def play(step: Array, carry: Any) -> Any:
        entries, doubt, _, columns = carry
        won, row = _winner(entries[0])
        spoiled = (entries[0][0] == EMPTY) & (dropped > EMPTY) & (dropped >= broadcast(row[0]))
        doubt = where(spoiled, 1, doubt)
        entries = [
            [where(won, later, now) for now, later in zip(entry, following, strict=True)]
            for entry, following in zip(entries, [*entries[1:], nothing], strict=True)
        ]
        columns = _collect(step, count, row[1:], columns, outputs)
        return entries, doubt, (row[0], row[1]), columns

    carry = (entries, full(0), _before_all(), [full(0)] * len(outputs))
    _, doubt, last, _ = lax.fori_loop(0, count, play, carry)
    return *last, jnp.max(doubt, axis=1)


def _scan(visit: Visit, count: int, num_words: int, outputs: Sequence[Any]) -> tuple[Array, Array]:
    nothing = [full(EMPTY)] + [full(0)] * (num_words - 1)

    def find_next(step: Array, carry: Any) -> Any:
        last, columns = carry
        last_key, last_number = (broadcast(x) for x in last)

        def keep(kept: Words, words: Words) -> Words:
            later = (words[0] == last_key) & (words[1] > last_number)
            better = ((words[0] < last_key) | later) & (words[0] > kept[0])
            return [where(better, new, old) for new, old in zip(words, kept, strict=True)]

        _, row = _winner(visit(keep, nothing))
        columns = _collect(step, count, row[1:], columns, outputs)
        return (row[0], row[1]), columns

    carry = (_before_all(), [full(0)] * len(outputs))
    return lax.fori_loop(0, count, find_next, carry)[0]


def _before_all() -> tuple[Array, Array]:
    """A sort key and an index that precede those of any candidate, [4] each."""
    return jnp.max(full(_LARGEST), axis=1), jnp.max(full(-1), axis=1)


def _winner(words: Words) -> tuple[Array, list[Array]]:
    """A mask of the lane with the best of 32 candidates, [4, 32], and its words, [4] each."""
    top = jnp.max(words[0], axis=1)
    leads = words[0] == broadcast(top)
    # The lowest index, by way of a max, for which there is an instruction.
    number = ~jnp.max(where(leads, ~words[1], EMPTY), axis=1)
    won = leads & (words[1] == broadcast(number))
    rest = [jnp.sum(where(won, word, 0), axis=1) for word in words[2:]]
    return won, [top, number, *rest]


def _collect(
    step: Array, count: int, row: list[Array], columns: list[Array], outputs: Sequence[Any]
) -> list[Array]:
    """Buffers the words of each step in one lane; writes them after 32 steps or the last one."""
    place = lax.rem(step, LANES)
    here = lane() == place
    columns = [where(here, broadcast(x), kept) for x, kept in zip(row, columns, strict=True)]

    @pl.when((place == LANES - 1) | (step == count - 1))
    def _() -> None:
        first = pl.multiple_of(step - place, LANES)
        for output, column in zip(outputs, columns, strict=True):
            store(output.at[:, pl.ds(first, LANES)], column)

    return columns
