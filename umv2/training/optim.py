"""AdamW with a group for every parameter, and a transformation of its own for the value tables.

The group of a parameter, which has its own weight decay, stands in its declaration.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from umv2.config import OptimizerConfig
from umv2.config.schema import named
from umv2.model.memory.store import ValueStore
from umv2.model.parameter import Declaration, path_name
from umv2.model.weights import Weights
from umv2.training.table_gradient import TableGradient
from umv2.types import struct


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate of all parameters but the value tables, from the step count.

    Linear warm-up from 0 to the peak at `warmup_steps`; then constant, or a cosine that reaches
    final_fraction of the peak at `num_steps`, from the end of warm-up or from `decay_start_step`.
    """
    constant = _after_warmup(config, optax.constant_schedule(config.learning_rate))
    if config.schedule == "constant":
        return constant
    start = config.warmup_steps if config.schedule == "cosine" else config.decay_start_step
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, num_steps - start, alpha=config.final_fraction
    )
    return optax.join_schedules([constant, cosine], [start])


def values_learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate of the value tables (section 4.2.9), from the step count.

    `multiplier`: the schedule of the model times a factor that falls linearly from
    values_multiplier to values_final_multiplier over the first values_decay_fraction of training,
    and stays there. `constant`: values_learning_rate after the same warm-up.
    """
    if config.values_schedule == "constant":
        return _after_warmup(config, optax.constant_schedule(config.values_learning_rate))
    base = learning_rate(config, num_steps)
    multiplier = optax.linear_schedule(
        config.values_multiplier,
        config.values_final_multiplier,
        transition_steps=max(1, round(config.values_decay_fraction * num_steps)),
    )
    return lambda step: base(step) * multiplier(step)


@struct
class OptimizerState:
    """AdamW's moments and step count, of the model and of the value store."""

    model: optax.OptState
    store: optax.OptState


class Optimizer:
    """AdamW after a clip of the gradient norm that model and store have together.

    The store has its own transformation: its learning rate has a schedule of its own. Weight decay
    is decoupled, and scaled by the learning rate (arXiv 1711.05101).
    """

    def __init__(
        self, config: OptimizerConfig, num_steps: int, declared: Mapping[str, Declaration]
    ):
        self._clip_norm = config.clip_norm
        self._schedule = learning_rate(config, num_steps)
        self._values_schedule = values_learning_rate(config, num_steps)

        def decay(name: str) -> float:
            group = declared[f"params/{name}"].group
            assert group is not None  # a parameter has one
            return getattr(config.weight_decay, group)

        self._model = _adamw(config, self._schedule, decay)
        make = named("optimizer.values_optimizer", config.values_optimizer, TABLE_OPTIMIZERS)
        self._store = make(config, self._values_schedule)

    def init(self, params: Any, store: ValueStore | None) -> OptimizerState:
        """Returns the state before the first step."""
        return OptimizerState(model=self._model.init(params), store=self._store.init(store))

    def update(
        self,
        params_gradient: Any,
        table_gradient: TableGradient,
        state: OptimizerState,
        params: Any,
        store: ValueStore | None,
    ) -> tuple[Any, ValueStore | None, OptimizerState, Float[Array, ""]]:
        """Returns params, store and state after a step, and the gradient norm before clipping."""
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params_gradient)]
        norm = jnp.sqrt(functools.reduce(jnp.add, [*squares, *table_gradient.squares()]))
        scale = jnp.minimum(1.0, self._clip_norm / norm)
        params_gradient = jax.tree.map(lambda gradient: gradient * scale, params_gradient)
        params_update, model_state = self._model.update(params_gradient, state.model, params)
        store, store_state = table_gradient.scale(scale).apply(self._store, state.store, store)
        return (
            optax.apply_updates(params, params_update),
            store,
            OptimizerState(model=model_state, store=store_state),
            norm,
        )

    def map_moments(
        self, function: Callable[[Any], Any], state: OptimizerState, of_weights: Weights, other: Any
    ) -> OptimizerState:
        """Returns the state with values in place of its arrays.

        Args:
          function: of what stands in `of_weights` for a parameter; its result for each moment.
          state: abstract or not.
          of_weights: anything in place of the arrays.
          other: in place of what belongs to no parameter: step counts.
        """

        def mapped(transformation: Any, part: Any, tree: Any) -> Any:
            return optax.tree.map_params(
                transformation,
                lambda _, value: function(value),
                part,
                tree,
                transform_non_params=lambda _: other,
            )

        return OptimizerState(
            model=mapped(self._model, state.model, of_weights.params),
            store=mapped(self._store, state.store, of_weights.store),
        )

    def learning_rates(self, step: int) -> dict[str, float]:
        """Returns the learning rates of the update that follows `step` updates."""
        return {
            "learning_rate": float(self._schedule(step)),
            "values_learning_rate": float(self._values_schedule(step)),
        }


def table_adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW for the value tables, of which every entry has moments."""
    return _adamw(config, schedule, lambda _: config.weight_decay.values)


# What `optimizer.values_optimizer` may name: functions of the optimizer's section and the schedule
# of learning rates that return a transformation of the gradient of a `ValueStore`.
TABLE_OPTIMIZERS: dict[
    str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]
] = {"adamw": table_adamw}


def _after_warmup(config: OptimizerConfig, schedule: optax.Schedule) -> optax.Schedule:
    """Rises linearly from 0 to the start of a schedule, over warmup_steps."""
    if config.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, schedule(0), config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule, decay: Callable[[str], float]
) -> optax.GradientTransformation:
    """AdamW with the weight decay that `decay` returns for the name of an array."""

    def decayed(path: Any, update: Array, parameter: Array) -> Array:
        return update + decay(path_name(path)) * parameter

    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.stateless(
            lambda updates, params: jax.tree_util.tree_map_with_path(decayed, updates, params)
        ),
        optax.scale_by_learning_rate(schedule),
    )
