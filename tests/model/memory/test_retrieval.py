"""Retrieval by hand: a table of four rows has two row keys and two column keys."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from umv2 import kernels
from umv2.model.memory import retrieval


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def test_four_rows_by_hand() -> None:
    # The query is (1, 0) on the row side and (1, 1) on the column side, for both ranks.
    query = jnp.asarray([[[1.0, 0.0]], [[1.0, 1.0]]])[None, :, None]  # [1, 2, 1, t, q]
    keys = jnp.asarray(
        [
            [[[1.0, 5.0], [3.0, 0.0]], [[2.0, 0.0], [-1.0, 7.0]]],  # row keys of rank 0 and rank 1
            [[[1.0, 1.0], [0.0, 3.0]], [[0.0, -1.0], [2.0, 2.0]]],  # column keys
        ]
    )[None]
    key_scores = retrieval.product_key_scores(query, keys)
    np.testing.assert_array_equal(key_scores[0, 0, :, 0], [[1, 3], [2, -1]])  # rank by key
    np.testing.assert_array_equal(key_scores[0, 1, :, 0], [[2, 3], [-1, 4]])

    cores = jnp.asarray([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    # Core 0 gives S_row . S_col, core 1 gives S_row,0 S_col,1:
    #   pair    (0, 0)  (0, 1)  (1, 0)  (1, 1)
    #   core 0     0      11       7       5
    #   core 1    -1       4      -3      12
    #   total     -1      15       4      17
    u = v = jnp.asarray([[1.0, 0.0]])
    shortlisting = retrieval.shortlist_scores(key_scores, u, v)
    np.testing.assert_array_equal(shortlisting[0, :, 0], [[1, 3], [2, 3]])
    scores, grid = kernels.product_key_top_k(query, keys, u, v, cores, top_m=3, shortlist=2)
    np.testing.assert_array_equal(grid, [[3, 1, 2]])  # pairs (1, 1), (0, 1), (1, 0)
    np.testing.assert_array_equal(scores, [[[5, 12], [11, 4], [7, -3]]])

    virtual = retrieval.virtual_addresses(grid, jnp.asarray([2, 0, 3, 1], jnp.int32))
    np.testing.assert_array_equal(virtual, [[1, 0, 3]])  # shuffle[[3, 1, 2]]
    np.testing.assert_array_equal(retrieval.virtual_addresses(grid, None), grid)
    block, visible, rows = retrieval.table_rows(virtual, 3, num_visible=2, num_rows=4)
    np.testing.assert_array_equal(block, [[0, 0, 1]])
    np.testing.assert_array_equal(visible, [[1, 0, 1]])
    np.testing.assert_array_equal(rows, [[0, 3, 0]])  # (3 + visible) mod 4


def test_a_shortlist_of_one_hides_the_best_pair() -> None:
    # Two keys per side; the first is best for rank 0, the second, by far, for rank 1.
    query = jnp.ones((1, 2, 1, 1, 1))
    keys = jnp.asarray([[[[1.0], [0.0]], [[0.0], [9.0]]]] * 2)[None]
    u = v = jnp.asarray([[1.0, 0.0]])  # sees only rank 0
    chosen = [
        kernels.product_key_top_k(
            query, keys, u, v, jnp.eye(2)[None, None], top_m=1, shortlist=shortlist
        )[1].tolist()
        for shortlist in (1, 2)
    ]
    assert chosen == [[[0]], [[3]]]  # pairs (0, 0) and (1, 1)


def test_softmax_is_over_the_selection_of_each_head() -> None:
    scores = jnp.log(jnp.asarray([[[1.0], [3.0], [2.0], [8.0]]]))  # one token, two heads of two
    weights = retrieval.value_weights(scores, "softmax", num_heads=2)
    np.testing.assert_allclose(weights[0, :, 0], [0.25, 0.75, 0.2, 0.8], rtol=1e-6)
    assert retrieval.value_weights(-scores, "relu", num_heads=2).tolist() == [[[0]] * 4]
    assert retrieval.value_weights(scores, "none", num_heads=2) is scores


# --- queries ---


def test_query_layouts_by_hand() -> None:
    chunks = jnp.arange(4.0)[None, :, None]  # one token; the only entry of a chunk is its index

    def arranged(layout: retrieval.QueryLayout, count: int, heads: int) -> list:
        query = retrieval.arrange_query(chunks[:, :count], layout, num_heads=heads, tucker_rank=2)
        # Axes of heads or ranks that share a query have size 1.
        return jnp.broadcast_to(query, (heads, 2, 2, 1, 1))[..., 0, 0].tolist()

    assert arranged("per_rank", 4, 2) == [[[0, 1], [2, 3]]] * 2
    assert arranged("shared", 2, 2) == [[[0, 0], [1, 1]]] * 2
    first, second = [[0, 0], [1, 1]], [[2, 2], [3, 3]]
    assert arranged("per_head", 4, 2) == [first, second]
    assert arranged("released", 4, 4) == [first, first, second, second]


@pytest.mark.parametrize(
    ("layout", "count"),
    [("per_rank", 6), ("shared", 2), ("per_head", 10), ("released", 6)],
)
def test_query_chunks_matches_the_layout(layout: retrieval.QueryLayout, count: int) -> None:
    assert retrieval.query_chunks(layout, num_heads=5, tucker_rank=3) == count


# --- windows and addresses ---

_FOUR_OF_24 = {
    # layer (from 1): first table (from 1); section 4.2.8
    "ring": {1: 24, 2: 1, 3: 2, 4: 3, 23: 22, 24: 23},
    "no_ring": {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 22: 21, 23: 21, 24: 21},
    "block": {1: 1, 4: 1, 5: 5, 8: 5, 9: 9, 21: 21, 24: 21},
    "none": {1: 1, 5: 5, 24: 24},
}


@pytest.mark.parametrize("sharing", _FOUR_OF_24)
def test_windows_match_the_paper(sharing: Any) -> None:
    starts = retrieval.window_starts(24, sharing, 1 if sharing == "none" else 4)
    assert {layer: starts[layer - 1] + 1 for layer in _FOUR_OF_24[sharing]} == _FOUR_OF_24[sharing]
    assert starts.shape == (24,)


@pytest.mark.parametrize("sharing", ["ring", "no_ring", "block"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 12])
def test_every_layer_sees_its_own_table_and_every_table_is_seen(sharing: Any, group: int) -> None:
    starts = retrieval.window_starts(12, sharing, group)
    windows = (starts[:, None] + np.arange(group)[None, :]) % 12
    assert all(layer in window for layer, window in enumerate(windows))
    if sharing != "ring":
        assert (starts + group <= 12).all()


@hypothesis.given(
    num_rows=st.integers(1, 2**31 - 1),
    data=st.data(),
)
def test_table_rows_wrap_without_overflow(num_rows: int, data: st.DataObject) -> None:
    num_visible = data.draw(st.integers(1, num_rows))
    start = data.draw(st.integers(0, num_rows - 1))
    virtual = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4))
    block, visible, rows = retrieval.table_rows(
        jnp.asarray([virtual], jnp.int32),
        jnp.asarray(start, jnp.int32),
        num_visible=num_visible,
        num_rows=num_rows,
    )
    assert block[0].tolist() == [address // num_visible for address in virtual]
    assert visible[0].tolist() == [address % num_visible for address in virtual]
    assert rows[0].tolist() == [(address % num_visible + start) % num_rows for address in virtual]


# --- auxiliary losses ---


def test_balance_loss_by_hand() -> None:
    # Two tokens; row keys score (ln 3, 0) and (0, ln 3), column keys score equally.
    rows = jnp.log(jnp.asarray([[3.0, 1.0], [3.0, 1.0]]))
    shortlisting = jnp.stack([rows, jnp.zeros((2, 2))])[None]
    mass, counts = retrieval.balance_statistics(shortlisting, 1)
    np.testing.assert_allclose(mass, [[1.5, 0.5], [1.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(counts, [[2, 0], [2, 0]])  # ties pick the lower key
    # Rows: 2 (1 * 3/4 + 0) = 3/2; columns: 2 (1 * 1/2 + 0) = 1.
    np.testing.assert_allclose(retrieval.balance_loss(mass, counts), 2.5, rtol=1e-6)


def test_balance_loss_at_perfect_balance_is_one_per_side() -> None:
    shortlisting = 0.1 * jnp.stack([jnp.eye(4), jnp.eye(4)[::-1]])[None]
    statistics = retrieval.balance_statistics(shortlisting, 1)
    np.testing.assert_array_equal(statistics[1], jnp.ones((2, 4)))
    np.testing.assert_allclose(retrieval.balance_loss(*statistics), 2.0, rtol=1e-6)


def test_balance_loss_of_summed_statistics_matches_all_tokens() -> None:
    shortlisting = _random(0, 2, 2, 6, 5)
    parts = [retrieval.balance_statistics(shortlisting[:, :, i : i + 3], 2) for i in (0, 3)]
    summed = jax.tree.map(jnp.add, *parts)
    full = retrieval.balance_statistics(shortlisting, 2)
    np.testing.assert_allclose(
        retrieval.balance_loss(*summed), retrieval.balance_loss(*full), rtol=1e-6
    )


def test_balance_loss_decreases_along_its_gradient(x64: None) -> None:
    shortlisting = _random(0, 1, 2, 4, 6).astype(jnp.float64)

    @jax.jit
    def loss(shortlisting: jax.Array) -> jax.Array:
        return retrieval.balance_loss(*retrieval.balance_statistics(shortlisting, 2))

    check_grads(loss, (shortlisting,), order=1, modes=["rev"])
    gradient = jax.grad(loss)(shortlisting)
    assert loss(shortlisting - 0.1 * gradient) < loss(shortlisting)


def test_tucker_penalty_by_hand() -> None:
    cores = jnp.asarray([jnp.diag(jnp.asarray([2.0, 0.25])), jnp.diag(jnp.asarray([1.0, 0.1]))])
    # The summed core has singular values 3 and 0.35.
    penalty = retrieval.tucker_penalty(cores[:, None], 0.15)
    np.testing.assert_allclose(penalty, 0.2**2, rtol=1e-5)
    gradient = jax.grad(retrieval.tucker_penalty)(cores[:, None], 0.15)
    np.testing.assert_allclose(gradient[0, 0], [[0.0, 0.0], [0.0, 0.4]], atol=1e-6)
    assert retrieval.tucker_penalty(cores[:, None], 0.5) == 0


def test_tucker_penalty_averages_heads_layers_and_lower_singular_values() -> None:
    lower = jnp.asarray([[[1.0, 0.5], [0.25, 0.1]], [[0.75, 0.0], [0.2, 0.2]]])  # [l, h, 2]
    cores = jax.vmap(jax.vmap(jnp.diag))(jnp.concatenate([jnp.full((2, 2, 1), 3.0), lower], -1))
    excess = np.maximum(lower - 0.15, 0)
    np.testing.assert_allclose(
        retrieval.tucker_penalty(cores[:, None], 0.15), (excess**2).mean(), rtol=1e-5
    )


# --- leading vectors of the cores ---


def test_core_vectors_are_the_leading_singular_pair() -> None:
    cores = _random(0, 2, 3, 4, 4)
    none = jnp.zeros((3, 4))
    u, v = retrieval.core_vectors(cores, none, none)
    core = np.asarray(cores.sum(axis=0))
    leading = np.linalg.norm(core, ord=2, axis=(1, 2))
    np.testing.assert_allclose(np.einsum("hr,hrq,hq->h", u, core, v), leading, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(u, axis=-1), 1.0, rtol=1e-5)
    assert (u.sum(axis=-1) >= 0).all()


def test_core_vectors_keep_the_sign_of_the_previous_pair() -> None:
    cores = _random(0, 1, 2, 2, 2)
    none = jnp.zeros((2, 2))
    u, v = retrieval.core_vectors(cores, none, none)
    sign = jnp.asarray([[1.0], [-1.0]])  # one head unchanged, one flipped
    nearby = cores + 1e-3
    new_u, new_v = retrieval.core_vectors(nearby, u * sign, v * sign)
    np.testing.assert_allclose(new_u, u * sign, atol=1e-2)
    np.testing.assert_allclose(new_v, v * sign, atol=1e-2)


def test_core_vectors_follow_a_rotating_core_without_a_jump() -> None:
    def core(angle: jax.Array) -> jax.Array:
        u = jnp.asarray([jnp.cos(angle), jnp.sin(angle)])
        return (3 * jnp.outer(u, u) + 0.5 * jnp.eye(2))[None, None]

    pair = (jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    before = None
    for angle in jnp.linspace(0, 2 * jnp.pi, 40):
        pair = jax.jit(retrieval.core_vectors)(core(angle), *pair)
        if before is not None:
            assert float(jnp.abs(pair[0] - before[0]).max()) < 0.3
        before = pair
    np.testing.assert_allclose(pair[0], [[1, 0]], atol=1e-4)  # a full turn, not a half
