"""Calls are pytrees that declare their arrays once; backends implement their protocol."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Float
from kernels_pallas.product_key_top_k import api as top_k_api
from kernels_pallas.product_key_top_k.call import TopKBackend
from kernels_pallas.protocol import Backend, Call, array, cotangents
from kernels_pallas.row_products import api as row_products_api
from kernels_pallas.table_gradient import api as table_gradient_api
from kernels_pallas.table_gradient.call import TableGradientBackend
from kernels_pallas.value_aggregation import api as aggregation_api
from kernels_pallas.value_aggregation.call import AggregationBackend, AggregationCall

OPERATORS: dict[str, tuple[Any, Any]] = {
    "product_key_top_k": (top_k_api.BACKENDS, TopKBackend),
    "value_aggregation": (aggregation_api.BACKENDS, AggregationBackend),
    "row_products": (row_products_api.BACKENDS, Backend),
    "table_gradient": (table_gradient_api.BACKENDS, TableGradientBackend),
}
CASES = [(operator, name) for operator, (backends, _) in OPERATORS.items() for name in backends]


@protocol.call
class ScaleCall(Call):
    """Arguments of an operator that only exists in this test."""

    x: Float[AbstractArray, "num_tokens dim"] = array("[num_tokens, dim]", token_axis=0)
    bias: Float[AbstractArray, " dim"] | None = array("[dim]", default=None)
    factor: float = 1.0


def example() -> ScaleCall:
    return ScaleCall(x=jnp.ones((2, 3)), factor=2.0)


@pytest.mark.parametrize(("operator", "name"), CASES)
def test_a_backend_has_the_functions_of_its_protocol(operator: str, name: str) -> None:
    backends, expected = OPERATORS[operator]
    backend = backends[name]
    assert isinstance(backend, expected)
    functions = {n: f for n, f in inspect.getmembers(expected, inspect.isfunction) if n[0] != "_"}
    assert {"unsupported_reason", "forward"} <= functions.keys()
    for function, declared in functions.items():
        _, *wanted = inspect.signature(declared).parameters.values()  # without self
        got = inspect.signature(getattr(backend, function)).parameters.values()
        assert [p.name for p in got] == [p.name for p in wanted], function
        assert [p.default for p in got] == [p.default for p in wanted], function


def test_arrays_are_named_leaves_and_other_fields_are_structure() -> None:
    call = example()
    leaves = jax.tree.leaves(call)
    structure: Any = jax.tree.structure(call)
    assert len(leaves) == len(call.arrays) == 1
    assert [str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(call)] == [".x"]
    assert structure == jax.tree.structure(ScaleCall(x=jnp.zeros((5, 1)), factor=2.0))
    assert structure != jax.tree.structure(ScaleCall(x=jnp.ones((2, 3)), factor=3.0))
    with_bias = ScaleCall(x=jnp.ones((2, 3)), bias=jnp.ones(3), factor=2.0)
    assert structure != jax.tree.structure(with_bias)
    doubled = jax.jit(lambda call: jax.tree.map(lambda x: call.factor * x, call))(call)
    assert isinstance(doubled, ScaleCall)
    np.testing.assert_array_equal(doubled.x, 2 * call.x)
    assert (doubled.bias, doubled.factor) == (None, 2.0)


def test_specs_come_from_the_declaration() -> None:
    specs = ScaleCall.specs()
    assert list(specs) == ["x", "bias"]
    assert specs["x"] == ("[num_tokens, dim]", "floats", False, 0)
    assert specs["bias"] == ("[dim]", "floats", True, None)
    kinds: dict[str, list[str]] = {"floats": [], "ids": [], "words": []}
    for name, spec in AggregationCall.specs().items():
        kinds[spec.kind].append(name)
    assert kinds["ids"] == ["indices", "slots", "first_master"]
    assert kinds["words"] == ["packed_values", "packed_pre_values"]


def test_cotangents_have_the_structure_of_the_call() -> None:
    call = ScaleCall(x=jnp.ones((2, 3)), bias=jnp.ones(3), factor=2.0)

    @jax.custom_vjp
    def scaled(call: ScaleCall) -> jax.Array:
        return call.factor * call.x

    def backward(call: ScaleCall, grad: jax.Array) -> tuple[ScaleCall]:
        return (cotangents(call, {"x": call.factor * grad}),)

    scaled.defvjp(lambda call: (scaled(call), call), backward)
    gradient = jax.grad(lambda call: scaled(call).sum())(call)
    np.testing.assert_array_equal(gradient.x, np.full((2, 3), 2))
    np.testing.assert_array_equal(gradient.bias, np.zeros(3))  # no gradient was given
    with pytest.raises(ValueError, match=r"gradients of unknown arguments: \['y'\]"):
        cotangents(call, {"y": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"gradients of unknown arguments: \['bias'\]"):
        cotangents(example(), {"bias": jnp.ones(3)})
