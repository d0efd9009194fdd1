"""Weights: all that a trained model is, without what only training needs."""

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
    """Parameters, buffers and value tables of one model: a pure tree of arrays.

    `params` and `buffers` are nested dicts named as the model's attributes; the store is None where
    layers have no tables. Evaluation, generation, export and training take one such object.
    """

    params: dict[str, Any]
    buffers: dict[str, Any]
    store: ValueStore | None

    def model(self, config: ModelConfig) -> Transformer:
        """Returns the model that these parameters and buffers make; free in a traced function."""
        return nnx.merge(structure(config), self.params, self.buffers)

    def named(self) -> dict[str, Any]:
        """Returns every array under its name, such as "params/blocks/ffn/up"."""
        return {
            parameter.path_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(self)
        }


def create(config: ModelConfig, key: Key[Array, ""]) -> Weights:
    """Draws the weights of a model. Trace it (jit): it is not light."""
    return _weights(config, Initializer(key))


@functools.lru_cache(maxsize=8)
def abstract(config: ModelConfig) -> Weights:
    """Returns shapes and dtypes of the weights of a model; nothing is drawn."""
    return _weights(config, ABSTRACT)


@functools.lru_cache(maxsize=8)
def structure(config: ModelConfig) -> Any:
    """Returns the graphdef of a model, without its arrays."""
    return nnx.graphdef(Transformer(config, init=ABSTRACT), graph=False)


@functools.lru_cache(maxsize=8)
def declarations(config: ModelConfig) -> dict[str, Declaration]:
    """Returns what is declared of every array of the weights, by name, in their order.

    Raises:
      ValueError: an array without a declaration.
    """
    declared = parameter.declarations(Transformer(config, init=ABSTRACT), "params")
    return {
        name: (TABLE if name.startswith("store/") else declared[name]).stacked(leaf.ndim)
        for name, leaf in abstract(config).named().items()
    }


def split(model: Transformer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a model's parameters and its buffers, as plain dicts.

    Raises:
      ValueError: one variable stands at two paths. In NNX's graph mode `jax.jit` would untie it.
    """
    _, *states = nnx.split(model, nnx.Param, Buffer, graph=False)
    params, buffers = (nnx.to_pure_dict(state) for state in states)
    return params, buffers


def refreshed_buffers(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    """Returns the buffers as the parameters want them: core vectors recomputed."""
    model = weights.model(config)
    model.refresh()
    return split(model)[1]


def _weights(config: ModelConfig, init: Initializer) -> Weights:
    params, buffers = split(Transformer(config, init=init.child("model")))
    store = create_store(config, init=init.child("store"))
    return Weights(params=params, buffers=buffers, store=store)
