"""The weights of a model: parameters, buffers and value tables, without optimizer state."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from umv2.config import ModelConfig
from umv2.model import parameter
from umv2.model.memory.store import TABLE, ValueStore
from umv2.model.parameter import ABSTRACT, Buffer, Declaration, Initializer
from umv2.model.transformer import Transformer, create_store
from umv2.types import struct


@struct
class Weights:
    """Parameters, buffers and value tables of a model: a pytree of arrays.

    `params` and `buffers` are nested dicts keyed by the model's attribute names; `store` is None if
    the layers have no tables. Evaluation, generation, export and training all take `Weights`.
    """

    params: dict[str, Any]
    buffers: dict[str, Any]
    store: ValueStore | None

    def model(self, config: ModelConfig) -> Transformer:
        """Returns the model with these parameters and buffers; free inside a traced function."""
        return nnx.merge(structure(config), self.params, self.buffers)

    def named(self) -> dict[str, Any]:
        """Returns all arrays by name, such as "params/blocks/ffn/up"."""
        return {
            parameter.path_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(self)
        }


def create(config: ModelConfig, key: Key[Array, ""]) -> Weights:
    """Initialises the weights of a model. Call it under `jax.jit`: op by op it is slow."""
    return _weights(config, Initializer(key))


@functools.lru_cache(maxsize=8)
def abstract(config: ModelConfig) -> Weights:
    """Returns the shapes and dtypes of a model's weights, without computing them."""
    return _weights(config, ABSTRACT)


@functools.lru_cache(maxsize=8)
def structure(config: ModelConfig) -> Any:
    """Returns the graphdef of a model."""
    return nnx.graphdef(Transformer(config, init=ABSTRACT), graph=False)


@functools.lru_cache(maxsize=8)
def declarations(config: ModelConfig) -> dict[str, Declaration]:
    """Returns the declaration of every array of the weights, by name, in tree order.

    Raises:
      ValueError: an array has no declaration.
    """
    declared = parameter.declarations(Transformer(config, init=ABSTRACT), "params")
    return {
        name: (TABLE if name.startswith("store/") else declared[name]).stacked(leaf.ndim)
        for name, leaf in abstract(config).named().items()
    }


def split(model: Transformer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a model's parameters and buffers as plain nested dicts.

    Raises:
      ValueError: a variable is shared between two paths; `jax.jit` would silently untie it in
        NNX's graph mode.
    """
    _, *states = nnx.split(model, nnx.Param, Buffer, graph=False)
    params, buffers = (nnx.to_pure_dict(state) for state in states)
    return params, buffers


def refreshed_buffers(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    """Returns the buffers recomputed from the current parameters (see `Transformer.refresh`)."""
    model = weights.model(config)
    model.refresh()
    return split(model)[1]


def _weights(config: ModelConfig, init: Initializer) -> Weights:
    params, buffers = split(Transformer(config, init=init.child("model")))
    store = create_store(config, init=init.child("store"))
    return Weights(params=params, buffers=buffers, store=store)
