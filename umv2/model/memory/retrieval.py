"""Product-key retrieval as pure functions: queries, addresses, weights, sharing windows, losses.

UltraMemV2 (arXiv 2508.18756), section 3.2, called TDQKR there; the selection itself (Eq. 6-8 and
10-11) is `kernels_pallas.product_key_top_k`. Everything acts on the tokens of one device, and can
be checked by hand on a table of four rows. Heads and sides lead and tokens follow (`h`, 2, `r`,
`t`, ...), so that scoring is one batched matrix product with no transposition.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from umv2 import kernels

QueryLayout = Literal["per_rank", "shared", "per_head", "released"]


def query_chunks(layout: QueryLayout, *, num_heads: int, tucker_rank: int) -> int:
    """Returns how many vectors of key_dim the query projection gives."""
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
    """Gives each head, side and rank its query; heads or ranks that share one have size 1.

    Layouts: `per_rank`, chunks in the order (side, rank), the same for every head (section 4.2.2);
    `shared`, a row and a column chunk for all ranks and heads (V1); `per_head`, chunks in the order
    (head, side), the same for every rank (PKM, arXiv 1907.05242); `released`, as the published
    PyTorch code reads its four chunks: head i takes 2 (i // 2) for the row and 2 (i // 2) + 1 for
    the column, whatever the rank, so that one or two heads leave half of the projection unused.
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

    Products in the dtype of the inputs, sums and result in float32 (float64 for float64). Only the
    balance loss needs them all; selection goes without.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = jnp.broadcast_to(query, (*keys.shape[:3], *query.shape[3:]))
    return jnp.einsum("hsrtq,hsrnq->hsrtn", query, keys, preferred_element_type=dtype)


def shortlist_scores(
    scores: Float[Array, "h 2 r t n"],
    u: Float[Array, "h r"] | None,
    v: Float[Array, "h r"] | None,
) -> Float[Array, "h 2 t n"]:
    """Returns the rank-1 approximation by which keys are shortlisted: S_row u, S_col v (step 5).

    Additive scores have rank 1 already, and no u and v.
    """
    if u is None or v is None:
        return scores[:, :, 0]
    return jnp.einsum("hsrtn,hsr->hstn", scores, jnp.stack([u, v], axis=1))


def virtual_addresses(
    grid: Int[Array, "t hk"], shuffle: Int[Array, " a"] | None
) -> Int[Array, "t hk"]:
    """Returns the virtual address of each place in the grid of keys: shuffle[place] (step 7).

    Without a shuffle the grid is numbered row by row.
    """
    return grid if shuffle is None else shuffle[grid]


def table_rows(
    virtual: Int[Array, "t hk"], start: Int[Array, ""] | int, *, num_visible: int, num_rows: int
) -> tuple[Int[Array, "t hk"], Int[Array, "t hk"], Int[Array, "t hk"]]:
    """Splits virtual addresses into (block, visible row, row of the store) (step 7).

    The visible window begins at row `start` of a store of `num_rows` and wraps round its end.
    """
    block, visible = virtual // num_visible, virtual % num_visible
    # start + visible may pass 2^31 in a large store; what remains of the store never does.
    remaining = num_rows - start
    row = jnp.where(visible < remaining, visible + start, visible - remaining)
    return block, visible, row


def value_weights(
    scores: Float[Array, "t hk c"],
    score_activation: Literal["none", "softmax", "relu"],
    *,
    num_heads: int,
) -> Float[Array, "t hk c"]:
    """Returns what weights each core's slice of each value.

    The per-core scores; or their softmax over the selection of each head (PKM); or their ReLU.
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
    """Returns the first table that each memory layer sees, counted from 0 (section 4.2.8).

    ring: a window of `group` tables around the layer's own, wrapping round; no_ring: clipped at
    the ends; block: the same window for `group` consecutive layers; none: the layer's own table.
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
    """Returns the sums that the balance loss needs: (softmax mass, shortlist picks) of each key."""
    _, picks = jax.lax.top_k(jax.lax.stop_gradient(shortlisting), shortlist)
    mass = jax.nn.softmax(shortlisting, axis=-1).sum(axis=(0, 2))
    num_keys = shortlisting.shape[-1]
    counts = [jnp.zeros(num_keys, mass.dtype).at[picks[:, side]].add(1.0) for side in range(2)]
    return mass, jnp.stack(counts)


def balance_loss(mass: Float[Array, "2 n"], counts: Float[Array, "2 n"]) -> Float[Array, ""]:
    """Returns n sum_i f_i p_i for row keys plus column keys (Eq. 18-20).

    p is the mean softmax of the shortlist score, f the fraction of all picks that fell on a key;
    each sums to 1, so that perfect balance gives 1 a side.
    """
    fraction = counts / counts.sum(axis=-1, keepdims=True)
    mean = mass / jax.lax.stop_gradient(mass.sum(axis=-1, keepdims=True))
    return mass.shape[-1] * jnp.sum(fraction * mean)


def core_vectors(
    cores: Float[Array, "c h r r"],
    previous_u: Float[Array, "h r"],
    previous_v: Float[Array, "h r"],
) -> tuple[Float[Array, "h r"], Float[Array, "h r"]]:
    """Returns the leading singular vectors of the summed cores (step 4), with continuous sign.

    An SVD leaves the common sign of u and v open. It is the one closer to the previous pair in L1
    distance; where the previous pair is zero (there is none), the one with sum(u) >= 0.
    """
    left, _, right = jnp.linalg.svd(cores.sum(axis=0))
    return kernels.fix_signs(left[..., :, 0], right[..., 0, :], previous_u, previous_v)


def tucker_penalty(cores: Float[Array, "*l c h r r"], margin: float) -> Float[Array, ""]:
    """Returns the mean of max(0, lambda_i - margin)^2 over all but the first singular value.

    Eq. 17 without its coefficient: the mean over i >= 2 is the sum divided by r - 1; heads and
    stacked layers are averaged.
    """
    singular = jnp.linalg.svd(cores.sum(axis=-4), compute_uv=False)
    return jnp.mean(jnp.square(jax.nn.relu(singular[..., 1:] - margin)))
