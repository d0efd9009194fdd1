"""Modules with NumPy's random values: jax.random compiles a program for every shape."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def drawn[T](create: Callable[[], T], seed: int = 0) -> T:
    """Returns what `create` returns, with other values, larger than those at initialisation.

    Norm weights lie around 1, everything else around 0; integers are permutations. The values of
    a variable are a function of its name and shape.
    """

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(np.argsort(generator.random(leaf.shape), axis=-1), leaf.dtype)
        center = 1.0 if "norm" in name else 0.0
        return jnp.asarray(generator.normal(center, 0.4, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(create))
