"""Tables divided over devices give the outputs and the gradients of tables that are not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from umv2.model import exchange

_TOKENS = PartitionSpec("memory")
_TABLES = {
    "whole": PartitionSpec(),
    "columns": PartitionSpec(None, None, "memory"),
    "rows": PartitionSpec(None, "memory", None),
}
_NUM_TABLES, _NUM_ROWS, _VALUE_DIM, _PRE_VALUE_DIM = 2, 24, 16, 8


def _mesh(size: int) -> Mesh:
    devices = np.asarray(jax.devices()[:size])
    return Mesh(devices, ("memory",), axis_types=(AxisType.Explicit,))


def _arrays(
    *, num_tokens: int, top_m: int = 6, num_cores: int = 1, num_slots: int = 1, pre: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random arguments: those to be differentiated, and the integers."""
    random = np.random.default_rng(0)
    shape = (num_tokens, top_m)
    tables = (_NUM_TABLES, _NUM_ROWS)
    floats = {
        "values": random.normal(size=(*tables, _VALUE_DIM)),
        "weights": random.normal(size=(*shape, num_cores)),
    }
    if pre:
        floats["pre_values"] = random.normal(size=(*tables, _PRE_VALUE_DIM))
        floats["pre_inputs"] = random.normal(size=(num_tokens, _PRE_VALUE_DIM))
    integers = {"rows": random.integers(0, _NUM_TABLES * _NUM_ROWS, shape)}
    if num_slots > 1:
        integers["slots"] = random.integers(0, num_slots, shape)
    dtype = jax.dtypes.canonicalize_dtype(float)
    return (
        {name: jnp.asarray(array, dtype) for name, array in floats.items()},
        {name: jnp.asarray(array, jnp.int32) for name, array in integers.items()},
    )


def _pool(
    layout: exchange.Layout, floats: dict[str, Any], integers: dict[str, Any], **options: Any
) -> jax.Array:
    options = {"activation": None, "num_slots": 1, "chunk_size": None} | options
    return exchange.aggregate(
        layout,
        floats["values"],
        integers["rows"],
        floats["weights"],
        pre_values=floats.get("pre_values"),
        pre_inputs=floats.get("pre_inputs"),
        slots=integers.get("slots"),
        implementation="auto",
        **({"dtype": floats["values"].dtype} | options),
    )


def _place(layout: exchange.Layout, mesh: Mesh, arrays: dict[str, Any]) -> dict[str, Any]:
    """Divides tables as the layout says, and everything else by tokens."""
    return {
        name: jax.device_put(
            array, NamedSharding(mesh, _TABLES[layout] if "values" in name else _TOKENS)
        )
        for name, array in arrays.items()
    }


def _on_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function of one device's (floats, integers) on all devices of the mesh."""
    return jax.shard_map(function, out_specs=_TOKENS)


def _output_and_gradients(
    layout: exchange.Layout, floats: Any, integers: Any, size: int = 1, **options: Any
) -> tuple[jax.Array, Any]:
    mesh = _mesh(size)
    floats, integers = _place(layout, mesh, floats), _place(layout, mesh, integers)
    pool = _on_devices(functools.partial(_pool, layout, **options))

    @jax.jit
    def run(floats: Any, integers: Any, output_grad: Any) -> tuple[jax.Array, Any]:
        output, vjp = jax.vjp(lambda floats: pool(floats, integers), floats)
        return output, vjp(output_grad.astype(output.dtype))[0]

    shape = (len(floats["weights"]), options["num_slots"] * _VALUE_DIM)
    output_grad = np.random.default_rng(1).normal(size=shape)
    with jax.set_mesh(mesh):
        output_grad = jax.device_put(output_grad, NamedSharding(mesh, _TOKENS))
        return jax.device_get(run(floats, integers, output_grad))


def _assert_same(left: Any, right: Any, tolerance: float) -> None:
    """Relative to the largest element of each array."""

    def compare(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, left, right)


_CASES = [
    pytest.param(2, {}, None, id="2"),
    pytest.param(4, {"num_cores": 2, "num_slots": 2}, "gelu", id="4, cores, slots, gelu"),
    pytest.param(8, {"num_cores": 2, "pre": False}, None, id="8, cores, no pre-values"),
    pytest.param(2, {"num_cores": 4, "num_slots": 3}, "relu", id="2, more cores than devices"),
    pytest.param(8, {"num_tokens": 8, "top_m": 40, "num_slots": 2}, "silu", id="8, one token each"),
]


@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize(("size", "sizes", "activation"), _CASES)
def test_divided_tables_give_the_same_output_and_gradients(
    layout: exchange.Layout, size: int, sizes: dict[str, Any], activation: str | None
) -> None:
    floats, integers = _arrays(**({"num_tokens": 48} | sizes))
    options = {"activation": activation, "num_slots": sizes.get("num_slots", 1)}
    expected = _output_and_gradients("whole", floats, integers, **options)
    assert all(np.any(grad) for grad in expected[1].values())
    divided = _output_and_gradients(layout, floats, integers, size, **options)
    _assert_same(divided, expected, 2e-6)
