"""The state of training: everything that a checkpoint holds and a step changes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from umv2 import sharding
from umv2.config import Config, ModelConfig
from umv2.model import layers
from umv2.model.memory.store import ValueStore, create_store
from umv2.model.transformer import Transformer
from umv2.training import optim
from umv2.types import struct


@struct
class TrainState:
    """A point in training. A pure tree of arrays: no modules, no functions.

    `params` and `buffers` are nested dicts named as the model's attributes. The value store stands
    beside them, with its own optimizer; it is None where there are no memory layers. `usage`
    counts how often each sparse layer selected each of its visible rows, or experts, since the
    last log; it is None for a dense model.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    store: ValueStore | None
    buffers: dict[str, Any]
    optimizer: optim.OptimizerState
    usage: Int[Array, "l choices"] | None


def create_model(config: ModelConfig, key: Key[Array, ""]) -> tuple[Transformer, ValueStore | None]:
    """Draws a model and its value store."""
    store = None
    if config.family == "memory":
        store = create_store(config, key=layers.named_key(key, "store"))
    return Transformer(config, key=layers.named_key(key, "model")), store


def split_model(model: Transformer) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns the model's structure, its parameters and its buffers, the latter as plain dicts.

    Raises:
      ValueError: one variable stands at two paths. In NNX's graph mode `jax.jit` would untie it.
    """
    graphdef, *states = nnx.split(model, nnx.Param, layers.Buffer, graph=False)
    params, buffers = (nnx.to_pure_dict(state) for state in states)
    return graphdef, params, buffers


def merge_model(graphdef: Any, params: dict[str, Any], buffers: dict[str, Any]) -> Transformer:
    """Puts together what `split_model` took apart; free within a traced function."""
    return nnx.merge(graphdef, params, buffers)


def model_structure(config: ModelConfig) -> Any:
    """Returns the graphdef of a model without creating its arrays."""
    model, _ = jax.eval_shape(lambda: create_model(config, jax.random.key(0)))
    return nnx.graphdef(model, graph=False)


def create_state(
    config: Config, optimizer: optim.Optimizer, seed: int | Int[Array, ""] | None = None
) -> TrainState:
    """Draws the state at step 0. Trace it (jit, eval_shape); it is not light.

    Args:
      config: of the experiment.
      optimizer: of the parameters.
      seed: `config.seed` as an argument of a program that serves all seeds; None: `config.seed`.
    """
    key = jax.random.key(config.seed if seed is None else seed)
    model, store = create_model(config.model, key)
    _, params, buffers = split_model(model)
    usage = None
    if config.model.placements:
        layers_and_choices = (len(config.model.placements), config.model.num_selectable)
        usage = jnp.zeros(layers_and_choices, jnp.int32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        store=store,
        buffers=buffers,
        optimizer=optimizer.init(params, store),
        usage=usage,
    )


def abstract_state(config: Config, optimizer: optim.Optimizer) -> TrainState:
    """Returns the shapes and dtypes of the state, and its shardings on the mesh in use, if any."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.eval_shape(lambda: create_state(config, optimizer))
    with jax.set_mesh(None):
        state = jax.eval_shape(lambda: create_state(config, optimizer))
    shardings = sharding.state_shardings(mesh, config.mesh, state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def refreshed_buffers(
    graphdef: Any, params: dict[str, Any], buffers: dict[str, Any]
) -> dict[str, Any]:
    """Returns the buffers as the given parameters want them: core vectors recomputed."""
    model = merge_model(graphdef, params, buffers)
    model.refresh()
    return split_model(model)[2]
