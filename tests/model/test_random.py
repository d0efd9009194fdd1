"""Normal draws in chunks against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umv2.model import random

SHAPES = [(), (1,), (4096,), (4097,), (3, 5, 700), (2, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_equal_those_of_jax_to_the_bit(shape: tuple[int, ...]) -> None:
    key = jax.random.fold_in(jax.random.key(3), 7)
    drawn = jax.jit(lambda key: random.normal(key, shape))(key)
    np.testing.assert_array_equal(drawn, jax.random.normal(key, shape, jnp.float32))


def test_stacked_keys_draw_what_each_draws() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: random.normal(key, (5000,)))(keys)
    each = [jax.random.normal(key, (5000,)) for key in keys]
    np.testing.assert_array_equal(stacked, jnp.stack(each))


def test_only_programs_for_one_cpu_draw_in_chunks() -> None:
    def program() -> str:
        return str(jax.make_jaxpr(lambda key: random.normal(key, (9000,)))(jax.random.key(0)))

    assert "scan" in program()
    with jax.set_mesh(jax.make_mesh((2,), ("x",))):
        assert "scan" not in program()
    assert "scan" not in str(
        jax.make_jaxpr(lambda key: random.normal(key, (9000,)))(jax.random.key(0, impl="rbg"))
    )
