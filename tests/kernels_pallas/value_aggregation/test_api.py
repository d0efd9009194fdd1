"""Value aggregation against its reference, by hand, and under JAX's transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from jax.typing import DTypeLike

from kernels_pallas.tables import MAX_NUM_VALUES
from kernels_pallas.value_aggregation import value_aggregation
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference

TABLES = ("values", "pre_values")
DIFFERENTIABLE = ("values", "scores", "pre_values", "pre_inputs")


def make_inputs(
    num_tokens: int = 7,
    num_selected: int = 3,
    num_values: int = 11,
    num_cores: int = 2,
    value_dim: int = 12,
    pre_value_dim: int = 5,
    num_slots: int | None = None,
    indices: np.ndarray | None = None,
    dtype: DTypeLike = jnp.float32,
    table_dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Random arguments of the operator, by name."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    if indices is None:
        indices = rng.integers(0, num_values, (num_tokens, num_selected))
    inputs: dict[str, Any] = {
        "values": normal(num_values, value_dim),
        "indices": jnp.asarray(indices, jnp.int32),
        "scores": normal(num_tokens, num_selected, num_cores),
    }
    if pre_value_dim:
        inputs["pre_values"] = normal(num_values, pre_value_dim)
        inputs["pre_inputs"] = normal(num_tokens, pre_value_dim)
    if num_slots:
        inputs["slots"] = jnp.asarray(
            rng.integers(0, num_slots, (num_tokens, num_selected)), jnp.int32
        )
        inputs["num_slots"] = num_slots
    for name in TABLES:
        if table_dtype is not None and name in inputs:
            inputs[name] = inputs[name].astype(table_dtype)
    return inputs


def output_and_grads(
    function: Callable[..., Array], inputs: dict[str, Any], **options: Any
) -> dict[str, Array]:
    """The output of `function`, and the gradients of a weighted sum of it by argument name."""
    arrays = {name: inputs[name] for name in DIFFERENTIABLE if name in inputs}
    others = {name: value for name, value in inputs.items() if name not in arrays}

    def loss(arrays: dict[str, Array]) -> tuple[Array, Array]:
        output = function(**arrays, **others, **options)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size)).reshape(output.shape)), output

    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"output": output, **grads}


def assert_all_close(
    got: dict[str, Array], expected: dict[str, Array], tolerance: float = 1e-5
) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        got_array, want_array = (np.asarray(x, np.float64) for x in (got[name], want))
        assert np.isfinite(want_array).all(), name
        np.testing.assert_allclose(
            got_array, want_array, rtol=tolerance, atol=tolerance, err_msg=name
        )


def assert_matches_reference(
    inputs: dict[str, Any],
    *,
    activation: Activation | None = None,
    chunk_size: int | None = None,
    tolerance: float = 1e-5,
) -> None:
    expected = output_and_grads(value_aggregation_reference, inputs, activation=activation)
    got = output_and_grads(value_aggregation, inputs, activation=activation, chunk_size=chunk_size)
    assert_all_close(got, expected, tolerance)


def gradient_jaxpr(inputs: dict[str, Any], chunk_size: int) -> str:
    return str(
        jax.make_jaxpr(lambda: output_and_grads(value_aggregation, inputs, chunk_size=chunk_size))()
    )


def temporary_bytes(function: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> int:
    """Bytes of temporaries of the compiled function."""
    compiled = jax.jit(lambda inputs: function(**inputs, **options)).lower(inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_two_tokens_by_hand() -> None:
    values = jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    indices = jnp.array([[0, 2], [1, 1]], jnp.int32)
    scores = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.0], [0.5, 1.0]]])
    output = value_aggregation(values, indices, scores)
    np.testing.assert_array_equal(output, [[301.0, 804.0], [10.0, 20.0]])


def test_pre_values_and_slots_by_hand() -> None:
    values = jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    pre_values = jnp.array([[1.0], [-1.0], [0.5]])
    indices = jnp.array([[0, 1, 2]], jnp.int32)
    output = value_aggregation(
        values,
        indices,
        jnp.ones((1, 3, 1)),
        pre_values=pre_values,
        pre_inputs=jnp.array([[4.0]]),
        activation="relu",
        slots=jnp.array([[1, 0, 1]], jnp.int32),
        num_slots=2,
    )
    np.testing.assert_array_equal(output, [[0.0, 0.0, 204.0, 408.0]])


@pytest.mark.parametrize(
    ("activation", "num_slots"),
    [(None, None), (None, 4), ("gelu", None), ("silu", 4), ("relu", None)],
)
def test_activations_and_slots_match_the_reference(
    activation: Activation | None, num_slots: int | None
) -> None:
    assert_matches_reference(make_inputs(num_slots=num_slots), activation=activation, chunk_size=3)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_cores": 1},
        {"num_cores": 3, "num_slots": 2},
        {"num_cores": 2, "pre_value_dim": 0},
        {"num_cores": 1, "pre_value_dim": 0, "num_slots": 3},
        {"value_dim": 3, "num_cores": 1, "pre_value_dim": 3},
        {"value_dim": 3, "num_cores": 3, "num_slots": 2, "pre_value_dim": 1},
        {"num_selected": 1},
        {"num_tokens": 1},
        {"num_tokens": 1, "num_selected": 1, "num_values": 1, "num_cores": 1, "value_dim": 1},
    ],
    ids=str,
)
def test_every_shape_matches_the_reference(shape: dict[str, Any]) -> None:
    assert_matches_reference(make_inputs(**shape))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float64_matches_the_reference_to_float64_precision() -> None:
    inputs = make_inputs(num_slots=2, dtype=jnp.float64)
    assert_matches_reference(inputs, activation="gelu", chunk_size=2, tolerance=1e-12)
    assert value_aggregation(**inputs).dtype == jnp.float64


@pytest.mark.slow
def test_bfloat16_rows_match_the_reference() -> None:
    activation: Activation = "silu"
    inputs = make_inputs(table_dtype=jnp.bfloat16)
    # Table gradients are rounded to bfloat16 once; their float32 sums may differ in the last bit.
    assert_matches_reference(inputs, activation=activation, chunk_size=2, tolerance=2**-7)
    float32_tables = {name: inputs[name].astype(jnp.float32) for name in TABLES}
    output = value_aggregation(**inputs, activation=activation)
    expected = value_aggregation_reference(**inputs | float32_tables, activation=activation)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_table_gradient_is_summed_in_float32() -> None:
    # Each of the 256 + 64 contributions is 1; a bfloat16 sum would saturate at 256.
    num_tokens = 320
    values = jnp.ones((2, 1), jnp.bfloat16)
    indices = jnp.zeros((num_tokens, 1), jnp.int32)
    grad = jax.grad(
        lambda values: value_aggregation(
            values, indices, jnp.ones((num_tokens, 1, 1)), chunk_size=16
        ).sum()
    )(values)
    np.testing.assert_array_equal(grad.astype(jnp.float32), [[320.0], [0.0]])


@pytest.mark.parametrize("row", [0, 10])
def test_all_ids_equal_at_either_end_of_the_table(row: int) -> None:
    inputs = make_inputs(indices=np.full((7, 3), row))
    assert_matches_reference(inputs, chunk_size=3)
    grad = output_and_grads(value_aggregation, inputs, chunk_size=3)["values"]
    assert set(np.flatnonzero(np.abs(grad).sum(axis=1))) == {row}


def test_repeated_ids_sum() -> None:
    inputs = make_inputs(num_tokens=5, num_values=5)

    @jax.jit
    def got_and_expected(indices: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        chosen = inputs | {"indices": indices}
        return (
            output_and_grads(value_aggregation, chosen, chunk_size=2),
            output_and_grads(value_aggregation_reference, chosen),
        )

    @given(st.lists(st.integers(0, 4), min_size=15, max_size=15))
    def check(indices: list[int]) -> None:
        assert_all_close(*got_and_expected(jnp.asarray(indices, jnp.int32).reshape(5, 3)))

    check()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunked_equals_unchunked_though_only_one_loops(chunk_size: int) -> None:
    inputs = make_inputs(num_tokens=7, num_slots=2)
    assert "scan[" in gradient_jaxpr(inputs, chunk_size)
    assert "scan[" not in gradient_jaxpr(inputs, 7)
    chunked = output_and_grads(value_aggregation, inputs, chunk_size=chunk_size)
    unchunked = output_and_grads(value_aggregation, inputs, chunk_size=7)
    assert_all_close(chunked, unchunked)


def test_unselected_rows_are_never_read() -> None:
    inputs = make_inputs(indices=np.full((7, 3), 4))
    infinite = jnp.full_like(inputs["values"], jnp.inf).at[4].set(inputs["values"][4])
    grads = output_and_grads(value_aggregation, inputs | {"values": infinite}, chunk_size=2)
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_match_finite_differences(activation: Activation | None) -> None:
    inputs = make_inputs(num_tokens=3, num_values=4, num_slots=2, dtype=jnp.float64)
    arrays = [inputs.pop(name) for name in DIFFERENTIABLE]

    @jax.jit
    def function(*arrays: Array) -> Array:
        named: dict[str, Any] = dict(zip(DIFFERENTIABLE, arrays, strict=True))
        return value_aggregation(**named, **inputs, activation=activation, chunk_size=2)

    check_grads(function, arrays, order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.slow
def test_vmap_equals_a_python_loop() -> None:
    tables = make_inputs()
    batch = [make_inputs(indices=np.random.default_rng(i).integers(0, 11, (7, 3))) for i in (1, 2)]
    indices = jnp.stack([inputs["indices"] for inputs in batch])

    @jax.jit
    def grads(indices: Array) -> dict[str, Array]:
        return output_and_grads(value_aggregation, tables | {"indices": indices}, chunk_size=2)

    looped = [grads(row) for row in indices]
    assert not np.array_equal(looped[0]["values"], looped[1]["values"])
    stacked = {name: jnp.stack([result[name] for result in looped]) for name in looped[0]}
    assert_all_close(jax.vmap(grads)(indices), stacked)


@pytest.mark.slow
def test_scan_over_layers_with_checkpoint_equals_a_python_loop() -> None:
    inputs = make_inputs(value_dim=10, pre_value_dim=10)
    table_names = ("values", "pre_values")
    layers = {name: jnp.stack([inputs.pop(name), jnp.ones((11, 10))]) for name in table_names}
    x = inputs.pop("pre_inputs")

    def layer(x: Array, tables: dict[str, Any]) -> tuple[Array, None]:
        return x + value_aggregation(**tables, **inputs, pre_inputs=x, chunk_size=2), None

    def scanned(layers: dict[str, Array], x: Array) -> Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, layers)[0] ** 2)

    def looped(layers: dict[str, Array], x: Array) -> Array:
        for i in range(2):
            x, _ = layer(x, {name: layers[name][i] for name in table_names})
        return jnp.sum(x**2)

    def jaxpr_of(function: Callable[..., Array]) -> str:
        return str(jax.make_jaxpr(jax.grad(function))(layers, x))

    assert "prevent_cse" in jaxpr_of(scanned)
    assert "prevent_cse" not in jaxpr_of(looped)
    got = jax.jit(jax.grad(scanned, (0, 1)))(layers, x)
    want = jax.jit(jax.grad(looped, (0, 1)))(layers, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), got, want)


@pytest.mark.slow(fast=["AxisType.Explicit-True-gelu"])
@pytest.mark.parametrize(
    ("axis_type", "check_vma", "activation"),
    [
        (AxisType.Auto, True, None),
        (AxisType.Explicit, True, "gelu"),
        (AxisType.Explicit, False, "silu"),
    ],
)
def test_inside_shard_map_a_replicated_table_gets_the_gradient_of_all_tokens(
    axis_type: AxisType, check_vma: bool, activation: Activation | None
) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))
    inputs = make_inputs(num_tokens=4 * jax.device_count(), num_slots=2)
    options = {"num_slots": inputs.pop("num_slots"), "activation": activation}
    specs = {name: PartitionSpec(None if name in TABLES else "data") for name in inputs}

    def sharded(**inputs: Array) -> Array:
        return jax.shard_map(
            lambda inputs: value_aggregation(**inputs, **options, chunk_size=3),
            in_specs=(specs,),
            out_specs=PartitionSpec("data"),
            check_vma=check_vma,
        )(inputs)

    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(inputs[name], specs[name]) for name in inputs}
        got = output_and_grads(sharded, placed)
    want = output_and_grads(value_aggregation, inputs, **options)
    assert_all_close(got, want)


def test_memory_is_far_below_that_of_the_gathered_rows() -> None:
    num_tokens, num_selected, width, num_values = 8192, 32, 192, 4096
    shapes = {
        "values": jax.ShapeDtypeStruct((num_values, width), jnp.bfloat16),
        "indices": jax.ShapeDtypeStruct((num_tokens, num_selected), jnp.int32),
        "scores": jax.ShapeDtypeStruct((num_tokens, num_selected, 2), jnp.float32),
        "pre_values": jax.ShapeDtypeStruct((num_values, width), jnp.bfloat16),
        "pre_inputs": jax.ShapeDtypeStruct((num_tokens, width), jnp.float32),
    }
    gathered_bytes = num_tokens * num_selected * width * 4

    def grads(chunk_size: int | None, **inputs: Any) -> dict[str, Array]:
        return output_and_grads(value_aggregation, inputs, chunk_size=chunk_size)

    assert temporary_bytes(value_aggregation, shapes, chunk_size=num_tokens) > gathered_bytes
    assert temporary_bytes(value_aggregation, shapes, chunk_size=128) < gathered_bytes / 10
    # This includes the float32 gradients of both tables and the output, about 20 MB.
    assert temporary_bytes(grads, shapes, chunk_size=128) < gathered_bytes / 4
    if jax.default_backend() == "cpu":
        assert temporary_bytes(value_aggregation, shapes) < gathered_bytes / 10
        assert temporary_bytes(grads, shapes, chunk_size=None) < gathered_bytes / 4


def test_a_bfloat16_table_is_never_converted_in_full() -> None:
    inputs = make_inputs(num_values=50_000, table_dtype=jnp.bfloat16)
    float32_table_bytes = 50_000 * 12 * 4
    assert temporary_bytes(value_aggregation, inputs) < float32_table_bytes / 10


@pytest.mark.usefixtures("no_runtime_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": jnp.ones(3)}, r"values.shape: got \(3,\), must be \[num_values, value_dim\]"),
        ({"values": jnp.ones((3, 2), int)}, "values.dtype: got int32, must be a floating"),
        ({"indices": jnp.ones((7, 3))}, "indices.dtype: got float32, must be int32"),
        ({"indices": jnp.ones((7, 3), jnp.uint8)}, "indices.dtype: got uint8, must be int32"),
        ({"scores": jnp.ones((7, 3))}, r"scores.shape: got \(7, 3\), must be \[num_tokens"),
        ({"scores": jnp.ones((7, 4, 2))}, r"scores.shape\[:2\]: got \(7, 4\), must be the shape"),
        ({"scores": jnp.ones((7, 3, 5))}, r"scores.shape\[-1\]: got 5, must be a divisor .* 12"),
        ({"scores": jnp.ones((7, 3, 0))}, r"scores.shape\[-1\]: got 0, must be a divisor"),
        ({"pre_values": None}, "pre_values absent, pre_inputs given, must be both or neither"),
        ({"pre_inputs": None}, "pre_values given, pre_inputs absent, must be both or neither"),
        ({"pre_values": jnp.ones((9, 5))}, r"pre_values.shape: got \(9, 5\), must be as many.* 11"),
        ({"pre_inputs": jnp.ones((7, 4))}, r"pre_inputs.shape: got \(7, 4\), must be .*\(7, 5\)"),
        ({"activation": "tanh"}, "activation: got 'tanh', must be one of .*'gelu', 'silu', 'relu'"),
        (
            {"activation": "relu", "pre_values": None, "pre_inputs": None},
            "activation: got 'relu', must be None without pre_values",
        ),
        ({"slots": jnp.ones((7, 2), jnp.int32)}, r"slots.shape: got \(7, 2\), must be the shape"),
        ({"num_slots": 2}, "num_slots: got 2, must be 1 without slots"),
        ({"num_slots": 0}, "num_slots: got 0, must be at least 1"),
        ({"chunk_size": 0}, "chunk_size: got 0, must be at least 1"),
    ],
)
def test_a_wrong_argument_is_reported_with_name_value_and_rule(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        value_aggregation(**make_inputs() | changes)


def test_a_table_beyond_int32_ids_is_rejected() -> None:
    inputs = make_inputs(pre_value_dim=0)
    largest = jax.eval_shape(
        lambda inputs: value_aggregation(**inputs),
        inputs | {"values": jax.ShapeDtypeStruct((MAX_NUM_VALUES, 12), jnp.bfloat16)},
    )
    assert largest.shape == (7, 12)
    too_large = {"values": jax.ShapeDtypeStruct((MAX_NUM_VALUES + 1, 12), jnp.bfloat16)}
    with pytest.raises(ValueError, match="values rows: got 2147483648, must be at most 2147483647"):
        jax.eval_shape(lambda inputs: value_aggregation(**inputs), inputs | too_large)
