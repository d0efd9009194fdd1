"""Top-k by threshold on CPU, against a stable sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.product_key_top_k import selection

# (candidates, k, tokens): k fills a power of two, nearly fills it, or is far below it.
SIZES = [(72, 32, 16), (200, 33, 17), (964, 94, 16), (600, 128, 16), (333, 60, 19)]


def expected(scores: np.ndarray, k: int) -> np.ndarray:
    """NaN first, then the highest; ties go to the lower index."""
    ranks = np.where(np.isnan(scores), np.inf, scores.astype(np.float64))
    nan_first = np.lexsort((np.arange(len(scores)), -ranks, ~np.isnan(scores)))
    return nan_first[:k]


@pytest.fixture(autouse=True)
def lower_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_MIN_CHOSEN", 32)


def assert_matches_sorting(scores: np.ndarray, k: int) -> None:
    got = np.asarray(jax.jit(selection.best, static_argnums=1)(jnp.asarray(scores), k))
    for token in range(scores.shape[-1]):
        np.testing.assert_array_equal(got[:, token], expected(scores[:, token], k))


def normal(num_candidates: int, num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_candidates, num_tokens)).astype(np.float32)


def found(scores: np.ndarray, k: int) -> np.ndarray:
    """Whether bisection finds a threshold, for each token."""
    return np.asarray(selection._threshold(jnp.asarray(scores), k, selection._num_sorted(k))[1])


@pytest.mark.parametrize(("num_candidates", "k", "num_tokens"), SIZES)
def test_bisection_finds_thresholds_and_the_result_is_correct(
    num_candidates: int, k: int, num_tokens: int
) -> None:
    scores = normal(num_candidates, num_tokens)
    jaxpr = str(jax.make_jaxpr(selection.best, static_argnums=1)(jnp.asarray(scores), k))
    assert "while" in jaxpr
    assert found(scores, k).all()
    assert_matches_sorting(scores, k)


@pytest.mark.parametrize(("num_candidates", "k", "num_tokens"), [(60, 8, 3), (70, 33, 32)], ids=str)
def test_small_sizes_use_xla(num_candidates: int, k: int, num_tokens: int) -> None:
    scores = normal(num_candidates, num_tokens)
    jaxpr = str(jax.make_jaxpr(selection.best, static_argnums=1)(jnp.asarray(scores), k))
    assert "while" not in jaxpr
    assert_matches_sorting(scores, k)


@pytest.mark.slow
def test_leading_axes_are_batched() -> None:
    scores = np.stack([normal(200, 16, seed) for seed in (0, 1)])
    got = np.asarray(selection.best(jnp.asarray(scores), 33))
    assert np.any(got[0] != got[1])
    for one, places in zip(scores, got, strict=True):
        np.testing.assert_array_equal(places, selection.best(jnp.asarray(one), 33))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3e38])
def test_a_token_without_a_threshold_does_not_affect_results(bad: float) -> None:
    scores = normal(200, 16)
    scores[7, 3] = scores[150, 3] = bad
    if np.isfinite(bad):
        scores[8, 3] = -bad
    assert list(np.flatnonzero(~found(scores, 33))) == [3]
    assert_matches_sorting(scores, 33)


@given(levels=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_ties_go_to_the_lower_index(levels: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, levels, (200, 16)).astype(np.float32)
    scores[::3] *= -0.0 if levels == 1 else 1
    assert_matches_sorting(scores, 33)


def test_ties_among_the_survivors_need_no_fallback() -> None:
    scores = normal(200, 16)
    order = np.argsort(-scores, axis=0)
    # Duplicate the fifth best score at another index, before or after it.
    for token in range(16):
        scores[order[150, token], token] = scores[order[4, token], token]
    assert found(scores, 33).all()
    assert_matches_sorting(scores, 33)


@pytest.mark.slow
def test_vmap_equals_a_python_loop() -> None:
    scores = jnp.asarray(np.stack([normal(200, 16, seed) for seed in (0, 1)]))
    mapped = jax.vmap(lambda x: selection.best(x, 33))(scores)
    np.testing.assert_array_equal(mapped, [selection.best(x, 33) for x in scores])
