"""AdamW with parameter groups, and a separate optimizer for the value tables.

A parameter's declaration gives its group, which determines its weight decay.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from umv2.config import OptimizerConfig
from umv2.config.schema import resolve_name
from umv2.model.memory.store import ValueStore
from umv2.model.parameter import Declaration, path_name
from umv2.model.weights import Weights
from umv2.training.table_gradient import TableGradient
from umv2.types import struct


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate schedule of all parameters except the value tables.

    Linear warm-up from 0 to the peak at `warmup_steps`, then constant, or a cosine decay that
    starts after warm-up or at `decay_start_step` and reaches `final_fraction` of the peak at
    `num_steps`.
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
    """Returns the learning rate schedule of the value tables (section 4.2.9).

    multiplier: the schedule of the other parameters times a factor that changes linearly from
    `values_multiplier` to `values_final_multiplier` over the first `values_decay_fraction` of
    training and is then constant. constant: `values_learning_rate` after the same warm-up.
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
    """Optimizer states of the parameters (`model`) and of the value tables (`store`)."""

    model: optax.OptState
    store: optax.OptState


class Optimizer:
    """AdamW with clipping by the global gradient norm, value tables included.

    The value tables have their own optimizer and learning rate schedule. Weight decay is decoupled
    and scaled by the learning rate (arXiv 1711.05101).
    """

    def __init__(
        self, config: OptimizerConfig, num_steps: int, declared: Mapping[str, Declaration]
    ):
        self._clip_norm = config.clip_norm
        self._schedule = learning_rate(config, num_steps)
        self._values_schedule = values_learning_rate(config, num_steps)

        def decay(name: str) -> float:
            group = declared[f"params/{name}"].group
            assert group is not None  # only buffers have none
            return getattr(config.weight_decay, group)

        self._model = _adamw(config, self._schedule, decay)
        make = resolve_name("optimizer.values_optimizer", config.values_optimizer, TABLE_OPTIMIZERS)
        self._store = make(config, self._values_schedule)

    def init(self, params: Any, store: ValueStore | None) -> OptimizerState:
        """Returns the initial optimizer state."""
        return OptimizerState(model=self._model.init(params), store=self._store.init(store))

    def update(
        self,
        params_gradient: Any,
        table_gradient: TableGradient,
        state: OptimizerState,
        params: Any,
        store: ValueStore | None,
    ) -> tuple[Any, ValueStore | None, OptimizerState, Float[Array, ""]]:
        """Returns the updated params, store and state, and the gradient norm before clipping."""
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
        """Maps the optimizer state to a tree of other values, such as shardings.

        Args:
          function: maps the value in `of_weights` for a parameter to the value for its moments.
          state: optimizer state, concrete or abstract.
          of_weights: weights with arbitrary values in place of arrays.
          other: value for leaves that belong to no parameter, such as step counts.
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
        """Returns the learning rates of the next update after `step` updates."""
        return {
            "learning_rate": float(self._schedule(step)),
            "values_learning_rate": float(self._values_schedule(step)),
        }


def table_adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns dense AdamW for the value tables: every entry has moments."""
    return _adamw(config, schedule, lambda _: config.weight_decay.values)


# Registry for `optimizer.values_optimizer`. Each function maps the optimizer configuration and a
# learning rate schedule to an optax transformation of gradients of a `ValueStore`.
TABLE_OPTIMIZERS: dict[
    str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]
] = {"adamw": table_adamw}


def _after_warmup(config: OptimizerConfig, schedule: optax.Schedule) -> optax.Schedule:
    """Prepends a linear warm-up of `warmup_steps` from 0 to the start of a schedule."""
    if config.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, schedule(0), config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule, decay: Callable[[str], float]
) -> optax.GradientTransformation:
    """Returns AdamW with weight decay `decay(name)` for each array."""

    def decayed(path: Any, update: Array, parameter: Array) -> Array:
        return update + decay(path_name(path)) * parameter

    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.stateless(
            lambda updates, params: jax.tree_util.tree_map_with_path(decayed, updates, params)
        ),
        optax.scale_by_learning_rate(schedule),
    )
