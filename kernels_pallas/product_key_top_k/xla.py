"""Product-key top-k in plain XLA operations, for every platform.

Tokens are processed in chunks, so that only [chunk, n] scores are live at a time. The best pairs
are searched for among keys that come early in their shortlists. A check then proves that no other
pair can be better, which almost always succeeds; see `_Staircase`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import RARE, add_up, scan_chunks
from kernels_pallas.product_key_top_k.call import TopK, TopKCall
from kernels_pallas.product_key_top_k.selection import best, top_k

# The reach of the staircase in multiples of m for Tucker scores, which are not monotone, and the
# fraction of the grid above which the staircase does not pay off. The fraction is 0.12 at (n 964,
# s 94, m 94), 0.18 at (1696, 128, 256), and 0.45 at (128, 16, 16), where searching the full grid is
# as fast.
TUCKER_REACH = 2
MAX_INSIDE_FRACTION = 0.5

# DEFAULT precision would round float32 operands to bfloat16 on TPU and to TF32 on GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _Staircase:
    """The part of the s x s grid of a token in which its best pairs are searched for.

    It contains the first `width` columns of row i (from 1): the reach divided by i, with i rounded
    down to a power of two. So it consists of a few rectangles and contains all (i, j) with
    i j <= reach.

    Rows and columns are in the order of their shortlists, best first. With additive scores, pair
    (i, j) has i j - 1 pairs above and to the left of it, none of which scores less, and which win
    ties by their lower index in the grid. So reach = m contains the m best. (Rounded sums keep this
    order; only infinities of both signs break it, because their sum is NaN.)

    For Tucker scores, this only holds up to the smaller singular values of the core. So the pairs
    outside are compared with the m-th best inside; if none of them precedes it, the selection is
    correct.
    """

    shortlist: int
    reach: int

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """Start row, end row (exclusive) and width of each rectangle."""
        starts = [2**i - 1 for i in range(self.shortlist.bit_length())]
        ends = [*starts[1:], self.shortlist]
        return [
            (start, end, min(self.shortlist, self.reach // (start + 1)))
            for start, end in zip(starts, ends, strict=True)
            if self.reach > start
        ]

    @property
    def places(self) -> np.ndarray:
        """Row-major indices in the grid of the pairs inside, ascending."""
        grid = np.arange(self.shortlist**2, dtype=np.int32).reshape(self.shortlist, -1)
        return np.concatenate([grid[a:b, :width].reshape(-1) for a, b, width in self.blocks])

    @property
    def outside(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the rectangles that make up the rest of the grid."""
        parts = [(slice(a, b), slice(width, None)) for a, b, width in self.blocks]
        parts.append((slice(self.blocks[-1][1], None), slice(0, None)))
        size = range(self.shortlist)
        return [(rows, columns) for rows, columns in parts if size[rows] and size[columns]]


def unsupported_reason(call: TopKCall, platform: str) -> str | None:
    """Returns None: this implementation supports every call."""
    del call, platform
    return None


def forward(call: TopKCall, with_chosen: bool = False) -> TopK:
    """Computes the results of `product_key_top_k`, `chunk_size` tokens at a time."""
    query, keys, cores = call.query, call.keys, call.cores
    top_m, shortlist = call.top_m, call.shortlist
    num_heads, num_keys, num_tokens = keys.shape[0], keys.shape[3], query.shape[3]

    def choose(_: None, query: Array) -> tuple[None, tuple[Array, Array, Array | None]]:
        by_side = _key_scores(query, keys, call.dtype)
        rows, row_scores = _shortlist(by_side[:, 0], call.u, shortlist)
        columns, column_scores = _shortlist(by_side[:, 1], call.v, shortlist)
        places = _best_pairs(row_scores, column_scores, cores, top_m)
        i, j = places // shortlist, places % shortlist
        addresses = _take(rows, i) * num_keys + _take(columns, j)
        chosen = jnp.stack([_take(row_scores, i[:, None]), _take(column_scores, j[:, None])])
        return None, (
            _pair_scores(chosen, cores),
            jnp.moveaxis(addresses, 2, 0),
            jnp.moveaxis(chosen, 4, 0) if with_chosen else None,
        )

    _, results = scan_chunks(choose, None, jnp.moveaxis(query, 3, 0), call.chunk_size)
    scores, addresses, chosen = results
    pairs = (num_tokens, num_heads * top_m)
    return TopK(scores.reshape(*pairs, scores.shape[-1]), addresses.reshape(pairs), chosen)


def backward(
    call: TopKCall,
    addresses: Int32[Array, "num_tokens pairs"],
    chosen: Float[Array, "num_tokens 2 num_heads rank top_m"],
    scores_grad: Float[Array, "num_tokens pairs num_cores"],
) -> dict[str, Array]:
    """Computes the gradients of query, keys and cores, each in its own dtype."""
    query, keys, cores, dtype = call.query, call.keys, call.cores, call.dtype
    num_tokens, _, num_heads, _, top_m = chosen.shape
    num_keys = keys.shape[3]
    query_axes = _query_axes(query, keys)

    def accumulate(carry: Any, chunk: Any) -> tuple[Any, Array]:
        keys_grad, cores_grad = carry
        query, addresses, chosen, scores_grad = chunk
        if cores is None:
            sides_grad = jnp.broadcast_to(scores_grad[:, None, :, None, :, 0], chosen.shape)
        else:
            core = cores.astype(dtype)
            rows, columns = chosen[:, 0], chosen[:, 1]
            cores_grad += _einsum("thkc,thrk,thqk->chrq", scores_grad, rows, columns)
            rows_grad = _einsum("thkc,chrq,thqk->thrk", scores_grad, core, columns)
            columns_grad = _einsum("thkc,chrq,thrk->thqk", scores_grad, core, rows)
            sides_grad = jnp.stack([rows_grad, columns_grad], axis=1)
        ids = jnp.stack([addresses // num_keys, addresses % num_keys], axis=1)[:, :, :, None]
        # Two dense products with all keys, rather than gathering the chosen keys and scattering
        # their gradients row by row. Assumed to be faster, not measured.
        dense = _scatter_add(sides_grad, jnp.broadcast_to(ids, sides_grad.shape), num_keys)
        query_grad = _einsum(f"tshrn,hsrnq->t{query_axes}q", dense, keys.astype(dtype)).reshape(
            query.shape
        )
        query = query.reshape(query.shape[0], *_sizes(query_axes, keys), keys.shape[-1])
        keys_grad += _einsum(f"tshrn,t{query_axes}q->hsrnq", dense, query.astype(dtype))
        return (keys_grad, cores_grad), query_grad

    # Unlike zeros, zeros_like keeps the manual axes over which an array varies inside shard_map.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), (keys, cores))
    per_token = (
        jnp.moveaxis(query, 3, 0),
        addresses.reshape(num_tokens, num_heads, top_m),
        chosen,
        scores_grad.reshape(num_tokens, num_heads, top_m, scores_grad.shape[-1]),
    )
    (keys_grad, cores_grad), query_grad = scan_chunks(accumulate, zeros, per_token, call.chunk_size)
    query_grad = jnp.moveaxis(query_grad, 0, 3).astype(query.dtype)
    gradients = {"query": query_grad, "keys": keys_grad.astype(keys.dtype)}
    return gradients if cores is None else gradients | {"cores": cores_grad.astype(cores.dtype)}


def _query_axes(query: Array, keys: Array) -> str:
    """The leading axes of the query, without those of size 1 that several heads or ranks share."""
    shared_heads = query.shape[0] < keys.shape[0]
    shared_ranks = query.shape[2] < keys.shape[2]
    return ("" if shared_heads else "h") + "s" + ("" if shared_ranks else "r")


def _sizes(axes: str, keys: Array) -> tuple[int, ...]:
    return tuple(keys.shape["hsr".index(axis)] for axis in axes)


def _key_scores(query: Array, keys: Array, dtype: jnp.dtype) -> Array:
    """S of every key, [h, 2, r, n, t], from a query of [t, h or 1, 2, r or 1, q]."""
    axes = _query_axes(jnp.moveaxis(query, 0, 3), keys)
    query = query.reshape(query.shape[0], *_sizes(axes, keys), keys.shape[-1])
    return _einsum(f"t{axes}q,hsrnq->hsrnt", query, keys, preferred_element_type=dtype)


def _shortlist(scores: Array, weights: Array | None, size: int) -> tuple[Array, Array]:
    """The best keys of one side by their rank-1 score, [h, s, t], and their S, [h, r, s, t]."""
    ranking = scores[:, 0]
    if weights is not None:
        weights = weights.astype(scores.dtype)[:, :, None, None]
        ranking = add_up(scores[:, i] * weights[:, i] for i in range(scores.shape[1]))
    places = best(ranking, size)
    return places, _take(scores, places[:, None])


def _best_pairs(rows: Array, columns: Array, cores: Array | None, top_m: int) -> Array:
    """Indices of the best pairs in the grid of shortlisted keys, [h, m, t], best first.

    Args:
        rows: S of the shortlisted row keys, [h, r, s, t].
        columns: the same of column keys.
        cores: None for additive scores.
        top_m: m.
    """
    additive = cores is None
    if cores is not None:
        rows = _times_core(rows, cores)
    staircase = _Staircase(rows.shape[2], top_m * (1 if additive else TUCKER_REACH))
    if len(staircase.places) > MAX_INSIDE_FRACTION * staircase.shortlist**2:
        return best(_full_grid(rows, columns, additive), top_m)

    places, doubtful = _search(staircase, rows, columns, additive, top_m)
    num_heads, num_tokens = doubtful.shape
    num_redone = -(-num_heads * num_tokens // 8)

    def redo_some() -> Array:
        """Searches the full grids of the few tokens whose selection is not proven correct."""
        which = lax.top_k(doubtful.reshape(-1).astype(jnp.float32), num_redone)[1]
        heads, tokens = which // num_tokens, which % num_tokens
        # Move all of them to the token axis of a single head.
        of_rows, of_columns = (
            jnp.moveaxis(x[heads, :, :, tokens], 0, 2)[None] for x in (rows, columns)
        )
        redone = top_k(_full_grid(of_rows, of_columns, additive), top_m)
        return places.at[heads, :, tokens].set(redone[0].T)

    @jax.named_scope(RARE)
    def redo_all() -> Array:
        return top_k(_full_grid(rows, columns, additive), top_m)

    num_doubtful = jnp.sum(doubtful, dtype=jnp.int32)
    branch = (num_doubtful > 0).astype(jnp.int32) + (num_doubtful > num_redone).astype(jnp.int32)
    return lax.switch(branch, [lambda: places, redo_some, redo_all])


def _times_core(rows: Array, cores: Array) -> Array:
    """S C of the shortlisted rows for the sum C of the cores, [h, r, s, t]."""
    core = cores.astype(rows.dtype).sum(axis=0)
    ranks = range(rows.shape[1])
    # Unrolled over ranks, because the matrix products of a token would be tiny.
    products = [add_up(rows[:, r] * core[:, r, q, None, None] for r in ranks) for q in ranks]
    return jnp.stack(products, axis=1)


def _search(
    staircase: _Staircase, rows: Array, columns: Array, additive: bool, top_m: int
) -> tuple[Array, Array]:
    """The best pairs inside, [h, m, t], and whether one outside may precede the last: [h, t]."""
    shortlist = staircase.shortlist
    parts = [
        _grid(rows[:, :, start:end], columns[:, :, :width], additive)
        for start, end, width in staircase.blocks
    ]
    candidates = jnp.concatenate([lax.collapse(x, 1, 3) for x in parts], axis=1)
    places_inside = best(candidates, top_m)
    places = jnp.asarray(staircase.places).at[places_inside].get(mode="promise_in_bounds")
    if additive:
        infinite = jnp.any(~jnp.isfinite(rows[:, 0]) | ~jnp.isfinite(columns[:, 0]), axis=1)
        return places, infinite

    last_score = _take(candidates, places_inside[:, -1:])[:, :, None]
    last_place = places[:, -1:, None]
    numbers = np.arange(shortlist**2, dtype=np.int32).reshape(1, shortlist, shortlist, 1)
    num_ahead = jnp.zeros_like(places[:, 0])
    for some_rows, some_columns in staircase.outside:
        grid = _grid(rows[:, :, some_rows], columns[:, :, some_columns], additive)
        later = numbers[:, some_rows, some_columns] > last_place
        # Comparisons with NaN are false, so a NaN outside counts as ahead.
        behind = (grid < last_score) | ((grid == last_score) & later)
        num_ahead += jnp.sum(~behind, axis=(1, 2), dtype=jnp.int32)
    return places, num_ahead > 0


def _full_grid(rows: Array, columns: Array, additive: bool) -> Array:
    """Scores of all pairs, [h, s * s, t]."""
    return lax.collapse(_grid(rows, columns, additive), 1, 3)


def _grid(rows: Array, columns: Array, additive: bool) -> Array:
    """Scores of all pairs, [h, rows, columns, t]."""
    rows, columns = rows[:, :, :, None], columns[:, :, None]
    if additive:
        return rows[:, 0] + columns[:, 0]
    return add_up(rows[:, q] * columns[:, q] for q in range(rows.shape[1]))


def _pair_scores(chosen: Array, cores: Array | None) -> Array:
    """Scores by core, [t, h, m, c], from S of the chosen keys, [2, h, r, m, t]."""
    rows, columns = chosen
    if cores is None:
        return jnp.moveaxis(rows + columns, (1, 3), (3, 0))
    return _einsum("hrkt,chrq,hqkt->thkc", rows, cores.astype(rows.dtype), columns)


def _take(x: Array, places: Array) -> Array:
    return jnp.take_along_axis(x, places, axis=-2, mode="promise_in_bounds")


def _scatter_add(x: Array, ids: Array, size: int) -> Array:
    """[..., m] to [..., size]: adds each entry at its id."""
    flat, flat_ids = (y.reshape(-1, y.shape[-1]) for y in (x, ids))
    tokens = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    zeros = jnp.zeros_like(flat, shape=(flat.shape[0], size))
    return (
        zeros.at[tokens, flat_ids].add(flat, mode="promise_in_bounds").reshape(*x.shape[:-1], size)
    )
