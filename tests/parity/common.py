"""Shared by the comparisons with golden files: types, tolerances and observation of a layer."""

import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from umv2 import kernels
from umv2.config import from_config_dict
from umv2.model.memory import retrieval, store
from umv2.model.memory.layer import MemoryLayer
from umv2.model.slots import MemoryStats, Observe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

Dtype = Literal["float32", "float64"]
Meta = dict[str, Any]
Arrays = dict[str, np.ndarray]
Traced = dict[str, jax.Array]

# Functions inside a memory layer whose results are compared, too.
OBSERVED: list[tuple[ModuleType, str]] = [
    (retrieval, "arrange_query"),
    (retrieval, "product_key_scores"),
    (retrieval, "shortlist_scores"),
    (kernels, "product_key_top_k"),
    (retrieval, "virtual_addresses"),
    (retrieval, "table_rows"),
    (retrieval, "value_weights"),
    (kernels, "value_aggregation"),
]


def observe(
    layer: MemoryLayer, x: jax.Array, window: store.StoreWindow
) -> tuple[jax.Array, MemoryStats, dict[str, Any]]:
    """Runs a memory layer; returns its results and those of the observed functions inside."""
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in OBSERVED:
            patch.setattr(module, name, _observed(getattr(module, name), seen))
        # The override, if a layer has one.
        patch.setattr(type(layer), "locate", _observed(type(layer).locate, seen))
        y, stats = layer(x, window=window, observe=Observe(health=True, key_balance=True))
    seen["top_k"] = jax.lax.top_k(seen["shortlist_scores"], layer.config.shortlist)
    seen["scores"], seen["grid"] = seen.pop("product_key_top_k")
    return y, stats, seen


def replace_all(layer: nnx.Module, kind: type[nnx.Variable], arrays: Traced) -> None:
    """Replaces all variables of a kind, so that no initial value is left."""
    old = nnx.to_pure_dict(nnx.state(layer, kind))
    assert jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, arrays)
    nnx.update(layer, arrays)


def run_with_gradients(
    forward: Callable[..., tuple[Traced, Any]], given: Arrays, x: np.ndarray
) -> tuple[Any, dict[str, Arrays]]:
    """Returns the auxiliary output of `forward`, and the gradient of each of its objectives.

    `forward(given, x)` returns scalar objectives and an auxiliary output; gradients are taken with
    respect to the entries of `given` and, under "x", to x.
    """

    @jax.jit
    def run(given: Traced, x: jax.Array) -> tuple[Any, dict[str, Traced]]:
        objectives, pull_back, seen = jax.vjp(forward, given, x, has_aux=True)
        gradients = {}
        for name in objectives:
            chosen = {
                other: jnp.full_like(objectives[other], other == name) for other in objectives
            }
            of_parameters, of_x = pull_back(chosen)
            gradients[name] = of_parameters | {"x": of_x}
        return seen, gradients

    return jax.device_get(run(given, x))


def parameters(golden: Arrays) -> Arrays:
    """Returns the parameters of a golden file without their prefix."""
    return {name.removeprefix("param."): golden[name] for name in golden if "param." in name}


def small_model(dtype: Dtype, *, hidden_size: int, epsilon: float = 1e-5, **memory: Any) -> Any:
    """Returns a model configuration whose memory layers have the given fields."""
    config = base.get_config()
    model = config.model
    model.hidden_size, model.norm_epsilon, model.compute_dtype = hidden_size, epsilon, dtype
    model.num_heads = model.num_key_value_heads = 1
    model.memory.update(memory)
    return from_config_dict(config).model


def _observed(function: Callable[..., Any], seen: dict[str, Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen[function.__name__] = function(*args, **kwargs)
        return seen[function.__name__]

    return wrapper
