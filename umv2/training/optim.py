"""AdamW with a group for every parameter, and a transformation of its own for the value tables.

A parameter's name is its path: "model/blocks/attention/query", "store/values". `RULES` is the one
place that says what group a name belongs to.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from umv2.config import OptimizerConfig
from umv2.model.memory.store import ValueStore
from umv2.types import struct

MODEL, STORE = "model/", "store/"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Puts the parameters whose whole name matches a pattern into a group.

    Groups are the fields of `WeightDecayConfig`.
    """

    group: str
    pattern: str


# An output head of its own is a matrix like any other; tied to the embedding, it does not exist.
RULES = (
    Rule("embeddings", r"model/embedding"),
    Rule("norms", r"model/(final_norm|blocks/(\w+/)?\w+_norm)/weight"),
    Rule("norms", r"model/sparse/((query|key)_norm|\w+_bias)"),
    Rule("matrices", r"model/head"),
    Rule("matrices", r"model/blocks/attention/(query|key|value|output)"),
    Rule("matrices", r"model/blocks/ffn/(gate|up|down)"),
    Rule("matrices", r"model/sparse/(query|pre|output|output_gate)"),
    Rule("matrices", r"model/sparse/(router|gate|up|down)"),
    Rule("keys", r"model/sparse/(keys|cores)"),
    Rule("values", r"store/(values|pre_values)"),
)


def parameter_groups(names: Iterable[str], rules: tuple[Rule, ...] = RULES) -> dict[str, str]:
    """Returns the group of every parameter.

    Raises:
      ValueError: a name that no rule matches, or more than one.
    """
    groups = {}
    for name in names:
        matches = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
        if len(matches) != 1:
            patterns = ", ".join(rule.pattern for rule in matches) or "none"
            raise ValueError(
                f"parameter {name!r} must match exactly one rule of umv2/training/optim.py;"
                f" it matches {patterns}"
            )
        groups[name] = matches[0].group
    return groups


def named_parameters(params: Any, store: ValueStore | None) -> dict[str, Any]:
    """Returns every parameter of the model and the store under its name."""
    return {
        _name(prefix, path): leaf
        for prefix, tree in ((MODEL, params), (STORE, store))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


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

    The store has its own transformation, so that one that touches only the rows in use can take
    its place. Weight decay is decoupled, and scaled by the learning rate (arXiv 1711.05101).
    """

    def __init__(self, config: OptimizerConfig, num_steps: int):
        self._clip_norm = config.clip_norm
        self._schedule = learning_rate(config, num_steps)
        self._values_schedule = values_learning_rate(config, num_steps)
        self._model = _adamw(config, self._schedule, MODEL)
        self._store = _adamw(config, self._values_schedule, STORE)

    def init(self, params: Any, store: ValueStore | None) -> OptimizerState:
        """Returns the state before the first step."""
        parameter_groups(named_parameters(params, store))
        return OptimizerState(model=self._model.init(params), store=self._store.init(store))

    def update(
        self,
        params_gradient: Any,
        store_gradient: ValueStore | None,
        state: OptimizerState,
        params: Any,
        store: ValueStore | None,
    ) -> tuple[Any, ValueStore | None, OptimizerState, Float[Array, ""]]:
        """Returns params, store and state after a step, and the gradient norm before clipping."""
        norm = optax.tree.norm(jax.tree.leaves((params_gradient, store_gradient)))
        scale = jnp.minimum(1.0, self._clip_norm / norm)
        params_gradient, store_gradient = jax.tree.map(
            lambda gradient: gradient * scale, (params_gradient, store_gradient)
        )
        params_update, model_state = self._model.update(params_gradient, state.model, params)
        store_update, store_state = self._store.update(store_gradient, state.store, store)
        return (
            optax.apply_updates(params, params_update),
            optax.apply_updates(store, store_update),
            OptimizerState(model=model_state, store=store_state),
            norm,
        )

    def learning_rates(self, step: int) -> dict[str, float]:
        """Returns the learning rates of the update that follows `step` updates."""
        return {
            "learning_rate": float(self._schedule(step)),
            "values_learning_rate": float(self._values_schedule(step)),
        }


def _after_warmup(config: OptimizerConfig, schedule: optax.Schedule) -> optax.Schedule:
    """Rises linearly from 0 to the start of a schedule, over warmup_steps."""
    if config.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, schedule(0), config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule, prefix: str
) -> optax.GradientTransformation:
    """AdamW whose weight decay is that of each parameter's group."""

    def decayed(path: Any, update: Array, parameter: Array) -> Array:
        name = _name(prefix, path)
        group = parameter_groups([name])[name]
        return update + getattr(config.weight_decay, group) * parameter

    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.stateless(
            lambda updates, params: jax.tree_util.tree_map_with_path(decayed, updates, params)
        ),
        optax.scale_by_learning_rate(schedule),
    )


def _name(prefix: str, path: Any) -> str:
    return prefix + jax.tree_util.keystr(path, simple=True, separator="/")
