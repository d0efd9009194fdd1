"""The common sign of u and v: its effect on the selection, and how it is fixed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kernels_pallas import fix_signs, product_key_top_k
from tests.kernels_pallas.product_key_top_k.test_api import make_inputs


def vectors(cores: Array) -> tuple[Array, Array]:
    """The first singular vectors of the summed cores, with the sign returned by the SVD."""
    left, _, right = jnp.linalg.svd(cores.sum(axis=0))
    return left[..., :, 0], right[..., 0, :]


def selected(inputs: dict[str, Any], u: Array, v: Array) -> list[set[int]]:
    """The addresses that each token selects."""
    sizes: dict[str, Any] = {"top_m": 6, "shortlist": 5}
    _, addresses = product_key_top_k(**inputs | {"u": u, "v": v}, **sizes)
    return [set(row) for row in addresses.tolist()]


def test_both_signs_are_valid_svds_but_select_different_keys() -> None:
    inputs = make_inputs(num_tokens=9, num_heads=1)
    u, v = vectors(inputs["cores"])
    core = inputs["cores"].sum(axis=0)
    for sign in (1, -1):  # both satisfy C v = s u
        np.testing.assert_allclose(
            jnp.einsum("hab,hb->ha", core, sign * v), 2 * sign * u, rtol=1e-4, atol=1e-5
        )
    differ = [a != b for a, b in zip(selected(inputs, u, v), selected(inputs, -u, -v), strict=True)]
    assert all(differ)


def test_fixing_a_flipped_sign_restores_the_selection() -> None:
    inputs = make_inputs(num_tokens=9, num_heads=1)
    u, v = fix_signs(*vectors(inputs["cores"]))
    before = selected(inputs, u, v)
    # The next step: slightly different cores, and an SVD that returns the other sign.
    inputs["cores"] = inputs["cores"] * 1.001
    raw_u, raw_v = vectors(inputs["cores"])
    turned = jnp.where(jnp.sum(raw_u * u) > 0, -1.0, 1.0)
    raw_u, raw_v = turned * raw_u, turned * raw_v
    assert selected(inputs, raw_u, raw_v) != before
    assert selected(inputs, *fix_signs(raw_u, raw_v, u, v)) == before
    assert selected(inputs, *fix_signs(raw_u, raw_v)) == before


def test_without_a_previous_pair_the_sum_of_u_is_nonnegative_in_every_head() -> None:
    u = jnp.array([[0.5, 0.75], [-0.75, 0.5], [0.5, -0.5]])
    v = jnp.array([[-1.0, 0.0], [0.5, -0.75], [0.0, -1.0]])
    for pair in (fix_signs(u, v), fix_signs(-u, -v)):
        np.testing.assert_array_equal(jnp.sign(pair[0].sum(axis=-1)), [1, 1, 0])
    fixed_u, fixed_v = fix_signs(u, v)
    np.testing.assert_array_equal(fixed_u, [[0.5, 0.75], [0.75, -0.5], [0.5, -0.5]])  # u at a tie
    np.testing.assert_array_equal(fixed_v, [[-1.0, 0.0], [-0.5, 0.75], [0.0, -1.0]])
    zeros = jnp.zeros_like(u)
    for got, want in zip(fix_signs(u, v, zeros, zeros), (fixed_u, fixed_v), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_sign_is_the_one_closer_to_the_previous_pair_in_each_head() -> None:
    previous_u = jnp.array([[-1.0, 0.0], [0.6, 0.8]])
    previous_v = jnp.array([[0.0, -1.0], [0.8, 0.6]])
    near_u, near_v = 0.99 * previous_u, 0.99 * previous_v
    signs = jnp.array([[1.0], [-1.0]])
    got_u, got_v = jax.jit(fix_signs)(signs * near_u, signs * near_v, previous_u, previous_v)
    np.testing.assert_array_equal(got_u, near_u)
    np.testing.assert_array_equal(got_v, near_v)
    # u alone would give the opposite sign: the distance is that of the pair.
    u, v = jnp.array([[1.0, 0.1]]), jnp.array([[0.0, 1.0]])
    got_u, _ = fix_signs(u, v, -0.2 * u, 3.0 * v)
    np.testing.assert_array_equal(got_u, u)


def test_half_of_a_previous_pair_is_rejected() -> None:
    u = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="must be both or neither"):
        fix_signs(u, u, u)
