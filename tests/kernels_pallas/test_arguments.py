"""Arguments of the operators: NumPy arrays, arrays on a mesh, ids out of range."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import (
    UnsupportedError,
    activate,
    product_key_top_k,
    row_products,
    value_aggregation,
    value_aggregation_row_gradients,
)

pytestmark = pytest.mark.usefixtures("no_runtime_shape_checks")

_RNG = np.random.default_rng(0)
_NUM_VALUES = 6


def normal(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A public operator with valid NumPy arguments.

    Attributes:
        function: the operator.
        arrays: array arguments.
        options: other arguments.
        token_axes: the axis of tokens of each array that has one.
        differentiable: names of the differentiable arrays.
    """

    function: Callable[..., Any]
    arrays: dict[str, Any]
    options: dict[str, Any]
    token_axes: dict[str, int]
    differentiable: tuple[str, ...]

    def __call__(self, arrays: dict[str, Any]) -> Any:
        """The results for the given arrays."""
        return self.function(**arrays, **self.options)

    def with_gradients(self, arrays: dict[str, Any]) -> Any:
        """The results, and the gradients of a sum over the first one."""
        chosen = {name: x for name, x in arrays.items() if name in self.differentiable}

        def loss(chosen: dict[str, Any]) -> tuple[Any, Any]:
            results = self(arrays | chosen)
            return jnp.sum(jnp.sin(jax.tree.leaves(results)[0])), results

        if not chosen:
            return self(arrays)
        return jax.grad(loss, has_aux=True)(chosen)


_INDICES = _RNG.integers(0, _NUM_VALUES, (8, 3)).astype(np.int32)
_SUMMED: dict[str, Any] = {
    "values": normal(_NUM_VALUES, 4),
    "indices": _INDICES,
    "scores": normal(8, 3, 2),
    "pre_values": normal(_NUM_VALUES, 5),
    "pre_inputs": normal(8, 5),
}
OPERATORS = {
    "value_aggregation": Operator(
        value_aggregation,
        _SUMMED,
        {},
        dict.fromkeys(("indices", "scores", "pre_inputs"), 0),
        ("values", "scores", "pre_values", "pre_inputs"),
    ),
    "value_aggregation_row_gradients": Operator(
        value_aggregation_row_gradients, _SUMMED | {"output_grad": normal(8, 4)}, {}, {}, ()
    ),
    "row_products": Operator(
        row_products,
        {"table": normal(_NUM_VALUES, 4), "indices": _INDICES, "inputs": normal(8, 4)},
        {},
        {"indices": 0, "inputs": 0},
        ("table", "inputs"),
    ),
    "product_key_top_k": Operator(
        product_key_top_k,
        {
            "query": normal(2, 2, 2, 8, 4),
            "keys": normal(2, 2, 2, 5, 4),
            "u": normal(2, 2),
            "v": normal(2, 2),
            "cores": normal(3, 2, 2, 2),
        },
        {"top_m": 4, "shortlist": 3},
        {"query": 3},
        ("query", "keys", "cores"),
    ),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def as_jax(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def assert_close(got: Any, want: Any) -> None:
    def compare(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)

    jax.tree.map(compare, got, want)


@pytest.mark.slow(fast=["value_aggregation"])
@every_operator
def test_numpy_arrays_are_accepted(name: str) -> None:
    operator = OPERATORS[name]
    want = operator(as_jax(operator.arrays))
    assert_close(operator(operator.arrays), want)
    # Arrays in a closure are constants of the program.
    assert_close(jax.jit(lambda: operator(operator.arrays))(), want)
    with_gradients = jax.jit(operator.with_gradients)
    want = with_gradients(as_jax(operator.arrays))
    assert_close(with_gradients(operator.arrays), want)


@pytest.mark.parametrize("name", ["row_products", "value_aggregation"])
def test_gradients_may_be_computed_eagerly(name: str) -> None:
    operator = OPERATORS[name]
    want = jax.jit(operator.with_gradients)(operator.arrays)
    assert_close(operator.with_gradients(operator.arrays), want)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i4"])
@pytest.mark.parametrize("x64", [False, True])
def test_numpy_ids_may_have_any_integer_dtype(dtype: Any, x64: bool) -> None:
    want = value_aggregation(**_SUMMED)
    with jax.enable_x64(x64):
        got = value_aggregation(**_SUMMED | {"indices": _INDICES.astype(dtype)})
    assert_close(got, want)


@every_operator
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
@pytest.mark.parametrize("x64", [False, True])
def test_every_floating_point_dtype_accumulates_in_float32_or_float64(
    name: str, dtype: Any, x64: bool
) -> None:
    operator = OPERATORS[name]
    arrays = {
        argument: array if argument == "indices" else array.astype(dtype)
        for argument, array in operator.arrays.items()
    }
    with jax.enable_x64(x64):
        results = jax.tree.leaves(jax.eval_shape(lambda: operator(arrays)))
    wide = x64 and np.dtype(dtype) == np.float64
    floats = {x.dtype for x in results if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {np.dtype(np.float64 if wide else np.float32)}


def invalid(array: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Invalid versions of an array argument, each with a description."""
    for dtype in (np.complex64, np.bool_, np.object_, ml_dtypes.float8_e4m3fn, np.longdouble, "S3"):
        yield str(np.dtype(dtype)), array.astype(dtype)
    if array.dtype == np.int32:
        yield "float ids", array.astype(np.float32)
        yield "JAX uint32", jnp.asarray(array, jnp.uint32)
        yield "beyond int32", np.where(array == array.flat[0], 2**31, array.astype(np.int64))
        yield "below int32", np.where(array == array.flat[0], -(2**40), array.astype(np.int64))
    else:
        yield "integers", array.astype(np.int32)
    yield "a list", array.tolist()
    yield "a number", 1.0
    yield "a string", "values"
    yield "another rank", array[None]
    yield "random keys", jax.random.split(jax.random.key(0), 2)


@every_operator
def test_an_invalid_array_is_reported_in_one_line_with_name_and_rule(name: str) -> None:
    operator = OPERATORS[name]
    for argument, array in operator.arrays.items():
        for what, wrong in invalid(array):
            with pytest.raises(ValueError, match=rf"{argument}.*: got .*, must be ") as raised:
                operator(operator.arrays | {argument: wrong})
            assert "\n" not in str(raised.value), what


@pytest.mark.usefixtures("x64")
def test_jax_ids_must_be_int32() -> None:
    with pytest.raises(ValueError, match=r"indices.dtype: got int64, must be int32"):
        value_aggregation(**_SUMMED | {"indices": jnp.asarray(_INDICES, jnp.int64)})


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "chunk_size") for name in OPERATORS]
    + [("product_key_top_k", "top_m"), ("product_key_top_k", "shortlist")]
    + [("value_aggregation", "num_slots"), ("value_aggregation_row_gradients", "max_rows")],
)
@pytest.mark.parametrize("value", [-1, 2.0, "2", [2], float("nan")], ids=str)
def test_an_invalid_number_is_reported_with_name_and_rule(
    name: str, option: str, value: Any
) -> None:
    operator = OPERATORS[name]
    with pytest.raises(ValueError, match=rf"{option}: got .*, must be "):
        operator.function(**operator.arrays, **operator.options | {option: value})


@every_operator
@pytest.mark.parametrize("option", ["implementation", "platform"])
@pytest.mark.parametrize("value", ["cuda", 1, ["xla"]], ids=str)
def test_an_unknown_name_is_rejected_with_the_known_names(
    name: str, option: str, value: Any
) -> None:
    operator = OPERATORS[name]
    with pytest.raises(ValueError, match=rf"{option}: got .*, must be .*one of ") as raised:
        operator.function(**operator.arrays, **operator.options, **{option: value})
    assert not isinstance(raised.value, UnsupportedError)


def test_an_unknown_activation_is_rejected() -> None:
    name: Any = "tanh"
    with pytest.raises(ValueError, match=r"activation: got 'tanh', must be one of .*'gelu'"):
        activate(jnp.ones(3), name)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["value_aggregation", "row_products"])
def test_without_tokens_or_selections_results_and_gradients_are_empty_or_zero(
    name: str, axis: int
) -> None:
    operator = OPERATORS[name]
    selections = {"indices", "scores"} | (set(operator.token_axes) if axis == 0 else set())
    empty = {
        argument: np.take(array, [], axis) if argument in selections else array
        for argument, array in operator.arrays.items()
    }
    gradients, output = jax.jit(operator.with_gradients)(as_jax(empty))
    assert output.shape[0] == empty["indices"].shape[0]
    assert not np.any(output)
    assert all(not np.any(gradient) for gradient in gradients.values())


def test_top_k_without_tokens_is_empty() -> None:
    operator = OPERATORS["product_key_top_k"]
    arrays = operator.arrays | {"query": operator.arrays["query"][:, :, :, :0]}
    gradients, (scores, addresses) = jax.jit(operator.with_gradients)(as_jax(arrays))
    assert (scores.shape, addresses.shape) == ((0, 8, 3), (0, 8))
    assert not np.any(gradients["keys"])


@pytest.mark.parametrize("axis", [0, 2, 3, 4])
def test_empty_key_axes_are_rejected(axis: int) -> None:
    operator = OPERATORS["product_key_top_k"]
    sized = {"query": axis, "keys": axis} if axis != 3 else {"keys": axis}
    arrays = {n: np.take(x, [], sized[n]) if n in sized else x for n, x in operator.arrays.items()}
    with pytest.raises(ValueError, match=r"(keys.shape\[\d\]|shortlist): got \d, must be "):
        operator(arrays)


def test_selecting_from_an_empty_table_is_rejected() -> None:
    tables = {name: _SUMMED[name][:0] for name in ("values", "pre_values")}
    with pytest.raises(ValueError, match="values rows: got 0, must be at least 1"):
        value_aggregation(**_SUMMED | tables)
    with pytest.raises(ValueError, match="table rows: got 0, must be at least 1"):
        row_products(tables["values"], _INDICES, normal(8, 4))


@pytest.mark.slow(fast=["AxisType.Explicit-value_aggregation"])
@every_operator
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_call_on_a_mesh_needs_no_shard_map(name: str, kind: AxisType) -> None:
    operator = OPERATORS[name]
    unplaced = as_jax(operator.arrays)
    want = jax.device_get(jax.jit(operator.with_gradients)(unplaced))
    eager_want = jax.device_get(operator(unplaced))
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(kind,))):
        over_tokens = {
            argument: PartitionSpec(*[None] * axis, "data")
            for argument, axis in operator.token_axes.items()
        }
        sharded = {
            argument: jax.device_put(array, over_tokens.get(argument, PartitionSpec()))
            for argument, array in operator.arrays.items()
        }
        one_sharded = unplaced | {n: sharded[n] for n in list(over_tokens)[:1]}
        explicit = kind == AxisType.Explicit
        for arrays in (sharded, one_sharded, operator.arrays, unplaced)[: 4 if explicit else 1]:
            assert_close(jax.device_get(operator(arrays)), eager_want)
        for arrays in (sharded, operator.arrays):
            assert_close(jax.device_get(jax.jit(operator.with_gradients)(arrays)), want)
        result = jax.tree.leaves(operator(sharded))[0]
        if explicit and over_tokens:
            assert jax.typeof(result).sharding.spec[0] == "data"


@every_operator
def test_other_shardings_are_rejected_with_a_remedy(name: str) -> None:
    operator = OPERATORS[name]
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        for argument, array in operator.arrays.items():
            axes = {axis for axis in range(array.ndim) if array.shape[axis] % 2 == 0}
            for axis in axes - {operator.token_axes.get(argument)}:
                spec = PartitionSpec(*[None] * axis, "data")
                arrays = operator.arrays | {argument: jax.device_put(array, spec)}
                rule = f"replicated.* unless {name} is called inside jax.shard_map"
                with pytest.raises(ValueError, match=rf"{argument}.sharding: got .*{rule}"):
                    operator(arrays)


def test_tokens_sharded_in_two_ways_are_rejected() -> None:
    with jax.set_mesh(jax.make_mesh((2, 2), ("a", "b"))):
        arrays = {
            "indices": jax.device_put(_INDICES, PartitionSpec("a")),
            "scores": jax.device_put(_SUMMED["scores"], PartitionSpec("b")),
        }
        with pytest.raises(ValueError, match=r"sharding: got .*like the other arguments"):
            value_aggregation(**_SUMMED | arrays)


def test_an_eager_call_on_a_mesh_compiles_once() -> None:
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        value_aggregation(**_SUMMED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "shard_map", lambda *_, **__: pytest.fail("mapped again"))
            value_aggregation(**_SUMMED)


def out_of_range(ids: np.ndarray, wrong: int) -> np.ndarray:
    return np.where(ids == ids.flat[0], wrong, ids).astype(np.int32)


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function)


def scanned(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(ids: Any) -> Any:
        step = jax.checkpoint(lambda carry, ids: (carry + function(ids).sum(), None))
        return lax.scan(step, 0.0, jnp.stack([ids, ids]))[0]

    return jax.jit(run)


def differentiated(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(lambda ids: jax.grad(lambda x: (x * function(ids)).sum())(1.0))


def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    mesh = jax.make_mesh((2,), ("data",))
    spec = PartitionSpec()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


@pytest.fixture
def checked_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KERNELS_PALLAS_CHECK_IDS", "1")
    yield
    # Consume the error of the failed program, or Python would raise it again at exit.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.effects_barrier()


@pytest.mark.usefixtures("checked_ids")
@pytest.mark.parametrize("wrong", [-1, 2**31 - 1])
@pytest.mark.parametrize("transform", [None, traced, scanned, differentiated, mapped])
def test_ids_out_of_range_raise_when_checked(
    transform: Callable[..., Any] | None, wrong: int
) -> None:
    def call(ids: Any) -> Any:
        return row_products(OPERATORS["row_products"].arrays["table"], ids, normal(8, 4))

    function = transform(call) if transform else call
    jax.block_until_ready(function(_INDICES))
    jax.effects_barrier()
    ends = f"{min(wrong, 0)} to {max(wrong, _INDICES.max())}"
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError),
        match=rf"indices: got ids from -?\d+ to -?\d+, must be in \[0, {_NUM_VALUES}\)",
    ) as raised:
        jax.block_until_ready(function(out_of_range(_INDICES, wrong)))
        jax.effects_barrier()
    assert ends.split()[0 if wrong < 0 else 2] in str(raised.value)


@pytest.mark.parametrize("name", ["value_aggregation", "value_aggregation_row_gradients"])
def test_ids_of_rows_and_slots_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS[name]
    slots: dict[str, Any] = {"slots": np.full((8, 3), 2), "num_slots": 2}
    if "output_grad" in operator.arrays:
        slots["output_grad"] = normal(8, 8)
    operator.function(**operator.arrays | slots)  # unchecked, as by default
    monkeypatch.setenv("KERNELS_PALLAS_CHECK_IDS", "1")
    with pytest.raises(ValueError, match=r"slots: got ids from 2 to 2, must be in \[0, 2\)"):
        operator.function(**operator.arrays | slots)
    wrong = {"indices": out_of_range(_INDICES, _NUM_VALUES)}
    with pytest.raises(ValueError, match=rf"indices: got ids from \d to {_NUM_VALUES}, must be"):
        operator.function(**operator.arrays | wrong)


def test_the_variable_that_enables_id_checks_must_be_0_or_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KERNELS_PALLAS_CHECK_IDS", "yes")
    with pytest.raises(ValueError, match="KERNELS_PALLAS_CHECK_IDS: got 'yes', must be 0 or 1"):
        value_aggregation(**_SUMMED)


@pytest.mark.parametrize("wrong", [-1, -(2**31), _NUM_VALUES, 2**31 - 1])
def test_row_gradients_return_valid_ids_for_any_input_ids(wrong: int) -> None:
    operator = OPERATORS["value_aggregation_row_gradients"]
    indices = out_of_range(_INDICES, wrong)
    got = value_aggregation_row_gradients(**operator.arrays | {"indices": indices})
    nearest = np.clip(indices, 0, _NUM_VALUES - 1)
    want = value_aggregation_row_gradients(**operator.arrays | {"indices": nearest})
    assert_close(got.values, want.values)
    rows, padding = got.ids[: int(got.num_rows)], got.ids[int(got.num_rows) :]
    assert np.all((rows >= 0) & (rows < _NUM_VALUES) & (np.diff(rows, prepend=-1) > 0))
    assert np.all(padding == _NUM_VALUES)
