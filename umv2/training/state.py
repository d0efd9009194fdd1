"""The state of training: everything that a checkpoint holds and a step changes."""

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
    """A point in training. A pure tree of arrays: no modules, no functions.

    `params`, `store` and `buffers` are those of `weights`. `usage` counts how often each layer
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
        """The model, without what only training needs."""
        return Weights(params=self.params, buffers=self.buffers, store=self.store)


def create_optimizer(config: Config) -> optim.Optimizer:
    """Returns the optimizer of an experiment."""
    declared = weights.declarations(config.model)
    return optim.Optimizer(config.optimizer, config.train.num_steps, declared)


def create_state(config: Config, seed: int | Int[Array, ""] | None = None) -> TrainState:
    """Draws the state at step 0. Trace it (jit); it is not light.

    Args:
      config: of the experiment.
      seed: `config.seed` as an argument of a program that serves all seeds; None: `config.seed`.
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
    """Returns, for each slot whose layers choose, their number and the choices of each."""
    found = accounting.slots(config)
    shapes = {
        name: (count, layer.counters)
        for name, (count, layer) in (("memory", found.memory), ("router", found.experts))
    }
    return {name: shape for name, shape in shapes.items() if all(shape)}


def abstract_state(config: Config) -> TrainState:
    """Returns the shapes and dtypes of the state, and its shardings on the mesh in use, if any."""
    mesh = jax.sharding.get_mesh()
    with jax.set_mesh(None):
        state = jax.eval_shape(lambda w: initial_state(config, w), weights.abstract(config.model))
    return state if mesh.empty else sharded(config, mesh, state)


def abstract_weights(config: Config) -> Weights:
    """Returns shapes and dtypes of the weights alone, and their shardings on the mesh in use."""
    mesh, abstract = jax.sharding.get_mesh(), weights.abstract(config.model)
    if mesh.empty:
        return abstract
    specs = _of_weights(config, lambda name, found: _partition(config, mesh, name, found))
    return jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), abstract, specs)


def sharded(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Returns an abstract state with the shardings of a mesh."""

    def spec(name: str, declared: Declaration) -> PartitionSpec:
        return _partition(config, mesh, name, declared)

    specs = map_declared(config, state, spec, other=PartitionSpec())
    return jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), state, specs)


def map_declared[T](
    config: Config, state: TrainState, function: Callable[[str, Declaration], T], other: T
) -> Any:
    """Returns the state with values in place of its arrays.

    Args:
      config: of the experiment.
      state: abstract or not.
      function: of the name and declaration of an array of the weights; an optimizer's moments get
        the value of their parameter.
      other: in place of all other arrays.
    """
    values = _of_weights(config, function)
    # optax makes step counts on the way, and the devices of a mesh need not be attached.
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
    for part, of in parts:
        part_structure: Any = jax.tree.structure(part)
        leaves += part_structure.flatten_up_to(of)
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _of_weights(config: Config, function: Callable[[str, Declaration], Any]) -> Any:
    declared = weights.declarations(config.model)

    def value(path: Any, _: Any) -> Any:
        name = path_name(path)
        return function(name, declared[name])

    return jax.tree_util.tree_map_with_path(value, weights.abstract(config.model))


def _partition(config: Config, mesh: Mesh, name: str, declared: Declaration) -> PartitionSpec:
    """Returns how an array of the weights is sharded."""
    rules = sharding.rules(config.resolved_mesh)
    return sharding.partition(declared.axes, rules, mesh.shape, name=name)


def _placed(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
