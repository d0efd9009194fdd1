"""The train state: everything that a training step updates and a checkpoint stores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from umv2 import sharding
from umv2.config import Config, ModelConfig
from umv2.cost import accounting
from umv2.model import weights
from umv2.model.memory.store import ValueStore
from umv2.model.parameter import Declaration, path_name
from umv2.model.weights import Weights
from umv2.training import optim
from umv2.types import struct


@struct
class TrainState:
    """The train state, a pytree of arrays without modules or functions.

    `params`, `store` and `buffers` are those of `Weights`. `usage` counts how often each layer
    selected each of its rows ("memory") or experts ("router") since the last log.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    store: ValueStore | None
    buffers: dict[str, Any]
    optimizer: optim.OptimizerState
    usage: dict[str, Int[Array, "l choices"]]

    @property
    def weights(self) -> Weights:
        """The weights of the model."""
        return Weights(params=self.params, buffers=self.buffers, store=self.store)


def create_optimizer(config: Config) -> optim.Optimizer:
    """Returns the optimizer of an experiment."""
    declared = weights.declarations(config.model)
    return optim.Optimizer(config.optimizer, config.train.num_steps, declared)


def create_state(config: Config, seed: int | Int[Array, ""] | None = None) -> TrainState:
    """Initialises the state at step 0. Call it under `jax.jit`: op by op it is slow.

    Args:
      config: experiment configuration.
      seed: seed that replaces `config.seed`. Passing it as a traced argument allows all seeds to
        share one compiled program.
    """
    key = jax.random.key(config.seed if seed is None else seed)
    return initial_state(config, weights.create(config.model, key))


def initial_state(config: Config, initial: Weights) -> TrainState:
    """Returns the state at step 0 with the given weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=initial.params,
        store=initial.store,
        buffers=initial.buffers,
        optimizer=create_optimizer(config).init(initial.params, initial.store),
        usage={
            name: jnp.zeros(shape, jnp.int32) for name, shape in usage_shapes(config.model).items()
        },
    )


def usage_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the (layers, choices) shape of the hit counters of each slot that has any."""
    slots = accounting.slots(config)
    shapes = {
        name: (count, layer.counters)
        for name, (count, layer) in (("memory", slots.memory), ("router", slots.experts))
    }
    return {name: shape for name, shape in shapes.items() if all(shape)}


def abstract_state(config: Config) -> TrainState:
    """Returns the shapes and dtypes of the state, and its shardings on the current mesh, if any."""
    mesh = jax.sharding.get_mesh()
    with jax.set_mesh(None):
        state = jax.eval_shape(lambda w: initial_state(config, w), weights.abstract(config.model))
    return state if mesh.empty else sharded(config, mesh, state)


def abstract_weights(config: Config) -> Weights:
    """Returns the shapes and dtypes of the weights, and their shardings on the current mesh."""
    mesh, abstract = jax.sharding.get_mesh(), weights.abstract(config.model)
    if mesh.empty:
        return abstract
    specs = _map_weights(config, lambda name, declared: _partition(config, mesh, name, declared))
    return jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), abstract, specs)


def sharded(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Returns an abstract state with shardings on a mesh."""

    def spec(name: str, declared: Declaration) -> PartitionSpec:
        return _partition(config, mesh, name, declared)

    specs = map_declared(config, state, spec, other=PartitionSpec())
    return jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), state, specs)


def map_declared[T](
    config: Config, state: TrainState, function: Callable[[str, Declaration], T], other: T
) -> Any:
    """Maps the state to a tree of values that depend on declarations, such as shardings.

    Args:
      config: experiment configuration.
      state: train state, concrete or abstract.
      function: maps the name and declaration of an array of the weights to its value. The moments
        of a parameter get the parameter's value.
      other: value for all other arrays.
    """
    values = _map_weights(config, function)
    # No mesh: optax creates step counts here, and the devices of the mesh may not be attached.
    with jax.set_mesh(None):
        moments = create_optimizer(config).map_moments(
            lambda value: value, state.optimizer, values, other
        )
    parts = (
        (state.step, other),
        (state.params, values.params),
        (state.store, values.store),
        (state.buffers, values.buffers),
        (state.optimizer, moments),
        (state.usage, dict.fromkeys(state.usage, other)),
    )
    leaves: list[Any] = []
    for part, part_values in parts:
        part_structure: Any = jax.tree.structure(part)
        leaves += part_structure.flatten_up_to(part_values)
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _map_weights(config: Config, function: Callable[[str, Declaration], Any]) -> Any:
    declared = weights.declarations(config.model)

    def value(path: Any, _: Any) -> Any:
        name = path_name(path)
        return function(name, declared[name])

    return jax.tree_util.tree_map_with_path(value, weights.abstract(config.model))


def _partition(config: Config, mesh: Mesh, name: str, declared: Declaration) -> PartitionSpec:
    """Returns the PartitionSpec of an array of the weights."""
    rules = sharding.rules(config.resolved_mesh)
    return sharding.partition(declared.axes, rules, mesh.shape, name=name)


def _placed(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
