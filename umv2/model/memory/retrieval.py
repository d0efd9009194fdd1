"""Product-key retrieval as pure functions: queries, addresses, weights, sharing windows, losses.

Follows UltraMemV2 (arXiv 2508.18756), section 3.2, where it is called TDQKR; the selection itself
(Eq. 6-8 and 10-11) is `kernels_pallas.product_key_top_k`. All functions act on the tokens of one
device. Head and side axes precede the token axis (`h`, 2, `r`, `t`, ...), so that scoring is one
batched matrix product without transposition.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umv2 import kernels
from umv2.types import accumulation_dtype

QueryLayout = Literal["per_rank", "shared", "per_head", "released"]


def query_chunks(layout: QueryLayout, *, num_heads: int, tucker_rank: int) -> int:
    """Returns the number of key_dim vectors that the query projection produces."""
    match layout:
        case "shared":
            return 2
        case "per_head":
            return 2 * num_heads
        case _:
            return 2 * tucker_rank


def arrange_query(
    chunks: Float[Array, "t q_chunks q"],
    layout: QueryLayout,
    *,
    num_heads: int,
    tucker_rank: int,
) -> Float[Array, "query_heads 2 query_ranks t q"]:
    """Arranges the projected chunks into a query for each head, side and rank.

    A head or rank axis along which all queries are the same has size 1. Layouts:

    per_rank: chunks in the order (side, rank), the same for every head (section 4.2.2).
    shared: one row and one column chunk for all ranks and heads (V1).
    per_head: chunks in the order (head, side), the same for every rank (PKM, arXiv 1907.05242).
    released: as the published PyTorch code reads its four chunks: for every rank, head i uses chunk
      2 (i // 2) for the row and 2 (i // 2) + 1 for the column, so with one or two heads half of the
      projection is unused.
    """
    chunks = jnp.moveaxis(chunks, 1, 0)
    num_tokens, key_dim = chunks.shape[1:]
    match layout:
        case "per_rank":
            return chunks.reshape(1, 2, tucker_rank, num_tokens, key_dim)
        case "shared":
            return chunks.reshape(1, 2, 1, num_tokens, key_dim)
        case "per_head":
            return chunks.reshape(num_heads, 2, 1, num_tokens, key_dim)
        case "released":
            heads = 2 * (np.arange(num_heads) // 2)
            return chunks[heads[:, None] + np.arange(2)[None, :]][:, :, None]


def product_key_scores(
    query: Float[Array, "query_heads 2 query_ranks t q"], keys: Float[Array, "h 2 r n q"]
) -> Float[Array, "h 2 r t n"]:
    """Returns the score of every row and column key for each rank: S = <q, K> (step 3).

    Computes and returns float32 (float64 for float64). Only the balance loss needs all of these
    scores; selection does not materialise them.
    """
    dtype = accumulation_dtype(query.dtype)
    query = jnp.broadcast_to(query.astype(dtype), (*keys.shape[:3], *query.shape[3:]))
    return jnp.einsum("hsrtq,hsrnq->hsrtn", query, keys.astype(dtype))


def shortlist_scores(
    scores: Float[Array, "h 2 r t n"],
    u: Float[Array, "h r"] | None,
    v: Float[Array, "h r"] | None,
) -> Float[Array, "h 2 t n"]:
    """Returns the rank-1 scores that select the shortlist: S_row u and S_col v (step 5).

    Additive scores already have rank 1, and have no u and v.
    """
    if u is None or v is None:
        return scores[:, :, 0]
    return jnp.einsum("hsrtn,hsr->hstn", scores, jnp.stack([u, v], axis=1))


def virtual_addresses(
    grid: Int[Array, "t hk"], shuffle: Int[Array, " a"] | None
) -> Int[Array, "t hk"]:
    """Returns the virtual address of each position in the key grid: shuffle[position] (step 7).

    Without a shuffle, addresses are the row-major positions.
    """
    return grid if shuffle is None else shuffle[grid]


def table_rows(
    virtual: Int[Array, "t hk"], start: Int[Array, ""] | int, *, num_visible: int, num_rows: int
) -> tuple[Int[Array, "t hk"], Int[Array, "t hk"], Int[Array, "t hk"]]:
    """Maps virtual addresses to (block, row within the window, row of the store) (step 7).

    The window starts at row `start` of a store of `num_rows` rows and wraps around its end.
    """
    block, visible = virtual // num_visible, virtual % num_visible
    # start + visible could overflow int32 in a large store; num_rows - start cannot.
    remaining = num_rows - start
    row = jnp.where(visible < remaining, visible + start, visible - remaining)
    return block, visible, row


def value_weights(
    scores: Float[Array, "t hk c"],
    score_activation: Literal["none", "softmax", "relu"],
    *,
    num_heads: int,
) -> Float[Array, "t hk c"]:
    """Returns the weight of each core's slice of each selected value.

    This is the per-core score, its softmax over the selections of a head (PKM), or its ReLU.
    """
    match score_activation:
        case "softmax":
            by_head = scores.reshape(scores.shape[0], num_heads, -1, scores.shape[-1])
            return jax.nn.softmax(by_head, axis=-2).reshape(scores.shape)
        case "relu":
            return jax.nn.relu(scores)
        case _:
            return scores


def window_starts(
    num_tables: int, sharing: Literal["none", "ring", "no_ring", "block"], group: int
) -> np.ndarray:
    """Returns the index of the first table in each memory layer's window (section 4.2.8).

    ring: a window of `group` tables centred on the layer's own, wrapping around; no_ring: the same,
    clipped at the ends; block: one window for `group` consecutive layers; none: the layer's own
    table.
    """
    layer = np.arange(num_tables)
    match sharing:
        case "none":
            return layer
        case "ring":
            return (layer - (group - 1) // 2) % num_tables
        case "no_ring":
            return np.clip(layer - (group - 1) // 2, 0, num_tables - group)
        case "block":
            return layer // group * group


def balance_statistics(
    shortlisting: Float[Array, "h 2 t n"], shortlist: int
) -> tuple[Float[Array, "2 n"], Float[Array, "2 n"]]:
    """Returns the sums for the balance loss: the softmax mass and shortlist picks of each key."""
    _, picks = jax.lax.top_k(jax.lax.stop_gradient(shortlisting), shortlist)
    mass = jax.nn.softmax(shortlisting, axis=-1).sum(axis=(0, 2))
    num_keys = shortlisting.shape[-1]
    counts = [jnp.zeros(num_keys, mass.dtype).at[picks[:, side]].add(1.0) for side in range(2)]
    return mass, jnp.stack(counts)


def balance_loss(mass: Float[Array, "2 n"], counts: Float[Array, "2 n"]) -> Float[Array, ""]:
    """Returns n sum_i f_i p_i for row keys plus column keys (Eq. 18-20).

    p is the mean softmax of the shortlist scores, and f the fraction of shortlist picks that fell
    on a key. Each sums to 1, so that perfect balance gives 1 per side.
    """
    fraction = counts / counts.sum(axis=-1, keepdims=True)
    mean = mass / jax.lax.stop_gradient(mass.sum(axis=-1, keepdims=True))
    return mass.shape[-1] * jnp.sum(fraction * mean)


def core_vectors(
    cores: Float[Array, "c h r r"],
    previous_u: Float[Array, "h r"],
    previous_v: Float[Array, "h r"],
) -> tuple[Float[Array, "h r"], Float[Array, "h r"]]:
    """Returns the leading singular vectors of the summed cores (step 4), with a continuous sign.

    An SVD does not determine the common sign of u and v. We choose the one closer to the previous
    pair in L1 distance or, if the previous pair is zero (initialisation), the one with sum(u) >= 0.
    """
    left, _, right = jnp.linalg.svd(cores.sum(axis=0))
    return kernels.fix_signs(left[..., :, 0], right[..., 0, :], previous_u, previous_v)


def tucker_penalty(cores: Float[Array, "*l c h r r"], margin: float) -> Float[Array, ""]:
    """Returns the mean of max(0, lambda_i - margin)^2 over all but the first singular value.

    This is Eq. 17 without its coefficient, averaged over i >= 2, heads and stacked layers.
    """
    singular = jnp.linalg.svd(cores.sum(axis=-4), compute_uv=False)
    return jnp.mean(jnp.square(jax.nn.relu(singular[..., 1:] - margin)))
