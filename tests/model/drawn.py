"""Modules with NumPy's random values: jax.random compiles a program for every shape."""

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
    """Returns an abstract module, or tree, with values larger than those at initialisation.

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

    return jax.tree.map_with_path(draw, abstract)


@functools.lru_cache(maxsize=8)
def drawn_weights(config: ModelConfig, embedding: float = 1.0) -> Weights:
    """Returns the weights of a model as they are drawn at initialisation, the embedding scaled.

    Predictions vary with the token where the embedding is large.
    """
    # The default generator takes five times as long to compile.
    key = jax.random.key(0, impl="unsafe_rbg")
    found = jax.jit(lambda: weights.create(config, key))()
    params = found.params | {"embedding": embedding * found.params["embedding"]}
    return dataclasses.replace(found, params=params)
