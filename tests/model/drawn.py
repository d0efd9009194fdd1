"""Modules with random values from NumPy: jax.random would compile a program per shape."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from umv2.config import ModelConfig
from umv2.model import weights
from umv2.model.weights import Weights


def drawn[T](abstract: T, seed: int = 0) -> T:
    """Fills an abstract module or tree with values that are larger than initial values.

    Norm weights are centred at 1, other floats at 0; integers are permutations. The values of a
    variable are a function of its name and shape.
    """

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(np.argsort(generator.random(leaf.shape), axis=-1), leaf.dtype)
        center = 1.0 if "norm" in name else 0.0
        return jnp.asarray(generator.normal(center, 0.4, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract)


@functools.lru_cache(maxsize=8)
def drawn_weights(config: ModelConfig, embedding: float = 1.0) -> Weights:
    """Returns the initial weights of a model, with the embedding scaled.

    With a large embedding, predictions vary with the token.
    """
    # The default PRNG takes five times as long to compile.
    key = jax.random.key(0, impl="unsafe_rbg")
    initial = jax.jit(lambda: weights.create(config, key))()
    params = initial.params | {"embedding": embedding * initial.params["embedding"]}
    return dataclasses.replace(initial, params=params)
