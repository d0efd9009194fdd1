"""Row products against NumPy, the reference and value aggregation; kernels are interpreted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.interpreters import partial_eval as pe
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    PartitionSpec,
    use_abstract_mesh,
)
from jax.test_util import check_grads
from jax.typing import DTypeLike

from kernels_pallas import UnsupportedError, row_products, value_aggregation
from kernels_pallas.row_products.reference import row_products_reference
from tests.kernels_pallas.aot import CHIPS, FUSED_BYTES, run_cases
from tests.kernels_pallas.conformance import PLATFORMS, interpreter
from tests.kernels_pallas.value_aggregation.test_api import (
    assert_all_close,
    make_inputs,
    temporary_bytes,
)

KERNELS = ("pallas_tpu", "pallas_sparsecore", "pallas_gpu")
SHAPES = {
    "ragged": {"num_tokens": 7, "num_selected": 5, "dim": 12},
    "three_columns": {"num_tokens": 4, "num_selected": 3, "dim": 3},
    "one_token": {"num_tokens": 1, "num_selected": 1, "dim": 8},
    "one_of_all": {"num_tokens": 1, "num_selected": 1, "dim": 1, "num_values": 1},
    "no_token": {"num_tokens": 0, "num_selected": 3, "dim": 8},
}


def arguments(
    num_tokens: int = 7,
    num_selected: int = 3,
    dim: int = 8,
    num_values: int = 11,
    dtype: DTypeLike = jnp.float32,
    table_dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "table": jnp.asarray(rng.normal(size=(num_values, dim)), table_dtype or dtype),
        "indices": jnp.asarray(rng.integers(0, num_values, (num_tokens, num_selected)), jnp.int32),
        "inputs": jnp.asarray(rng.normal(size=(num_tokens, dim)), dtype),
    }


def results(
    function: Callable[..., Array], arrays: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """The output, and the gradients of a weighted sum of it by argument name."""
    indices = arrays["indices"]

    def loss(chosen: dict[str, Any]) -> tuple[Array, Array]:
        output = function(**chosen, indices=indices, **options)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size)).reshape(output.shape)), output

    chosen = {name: arrays[name] for name in ("table", "inputs")}
    (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(chosen)
    return {"output": output, **grads}


def test_two_tokens_by_hand() -> None:
    table = jnp.array([[1.0, 2.0], [10.0, 20.0], [-1.0, 0.0]])
    indices = jnp.array([[0, 1, 0], [2, 2, 1]], jnp.int32)
    inputs = jnp.array([[1.0, 1.0], [3.0, 0.5]])
    output, vjp = jax.vjp(lambda table, x: row_products(table, indices, x), table, inputs)
    np.testing.assert_array_equal(output, [[3.0, 30.0, 3.0], [-3.0, -3.0, 40.0]])
    table_grad, inputs_grad = vjp(jnp.array([[1.0, 1.0, 2.0], [1.0, -2.0, 1.0]]))
    np.testing.assert_array_equal(table_grad, [[3.0, 3.0], [4.0, 1.5], [-3.0, -0.5]])
    np.testing.assert_array_equal(inputs_grad, [[13.0, 26.0], [11.0, 20.0]])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_every_shape_matches_the_reference(shape: dict[str, Any], chunk_size: int | None) -> None:
    arrays = arguments(**shape)
    got = results(row_products, arrays, chunk_size=chunk_size)
    assert_all_close(got, results(row_products_reference, arrays))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk_size", [7, 2])
def test_float64_equals_numpy_and_finite_differences(chunk_size: int) -> None:
    arrays = arguments(dtype=jnp.float64)
    table, indices, inputs = (np.asarray(x) for x in arrays.values())
    output = row_products(**arrays, chunk_size=chunk_size)
    assert output.dtype == jnp.float64
    expected = np.einsum("tkd,td->tk", table[indices], inputs)
    np.testing.assert_allclose(output, expected, rtol=1e-13, atol=1e-13)

    @jax.jit
    def function(table: Array, inputs: Array) -> Array:
        return row_products(table, arrays["indices"], inputs, chunk_size=chunk_size)

    check_grads(function, (arrays["table"], arrays["inputs"]), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("row", [0, 10])
def test_repeated_ids_sum(row: int) -> None:
    arrays = arguments() | {"indices": jnp.full((7, 3), row, jnp.int32)}
    got = results(row_products, arrays, chunk_size=2)
    assert_all_close(got, results(row_products_reference, arrays))
    assert set(np.flatnonzero(np.abs(got["table"]).sum(axis=1))) == {row}


def test_bfloat16_products_and_gradients_are_summed_in_float32() -> None:
    arrays = arguments(table_dtype=jnp.bfloat16)
    table = arrays["table"].astype(jnp.float32)
    output = row_products(**arrays)
    assert output.dtype == jnp.float32
    expected = row_products_reference(**arrays | {"table": table})
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)

    # A bfloat16 sum would saturate at 256.
    ones = {"table": jnp.ones((2, 1), jnp.bfloat16), "inputs": jnp.ones((320, 1), jnp.bfloat16)}
    indices = jnp.zeros((320, 1), jnp.int32)
    grads = jax.grad(lambda ones: row_products(**ones, indices=indices, chunk_size=16).sum())(ones)
    assert all(grad.dtype == jnp.bfloat16 for grad in grads.values())
    np.testing.assert_array_equal(grads["table"].astype(jnp.float32), [[320.0], [0.0]])


def test_column_shards_sum_to_the_pre_scores_of_value_aggregation() -> None:
    """This is how a table that is sharded by columns uses the operator."""
    inputs = make_inputs(pre_value_dim=6, num_cores=1)
    table, indices, x = (inputs[name] for name in ("pre_values", "indices", "pre_inputs"))
    parts = [row_products(table[:, at : at + 3], indices, x[:, at : at + 3]) for at in (0, 3)]
    scores = inputs["scores"] * (parts[0] + parts[1])[:, :, None]
    divided = value_aggregation(inputs["values"], indices, scores)
    np.testing.assert_allclose(divided, value_aggregation(**inputs), rtol=1e-5, atol=1e-5)
    wrong = value_aggregation(inputs["values"], indices, inputs["scores"] * parts[0][:, :, None])
    assert not np.allclose(wrong, divided)


def test_unused_gradients_are_not_computed() -> None:
    arrays = arguments()

    def compiled(name: str) -> str:
        def loss(array: Array) -> Array:
            return jnp.sum(jnp.sin(row_products(**arrays | {name: array})))

        return str(jax.jit(jax.grad(loss)).lower(arrays[name]).compile().as_text())

    assert "scatter" in compiled("table")
    assert "scatter" not in compiled("inputs")


def test_memory_is_far_below_that_of_the_gathered_rows() -> None:
    shapes = {
        "table": jax.ShapeDtypeStruct((4096, 192), jnp.bfloat16),
        "indices": jax.ShapeDtypeStruct((8192, 32), jnp.int32),
        "inputs": jax.ShapeDtypeStruct((8192, 192), jnp.float32),
    }
    gathered_bytes = 8192 * 32 * 192 * 4

    def grads(**arrays: Any) -> dict[str, Any]:
        return results(row_products, arrays, chunk_size=128)

    assert temporary_bytes(row_products, shapes, chunk_size=8192) >= gathered_bytes
    assert temporary_bytes(row_products, shapes, chunk_size=128) < gathered_bytes / 10
    assert temporary_bytes(grads, shapes) < gathered_bytes / 10


@pytest.mark.slow
def test_vmap_and_checkpoint_equal_a_python_loop() -> None:
    arrays = arguments()
    batch = jnp.stack([arrays["indices"], arrays["indices"][::-1]])

    def loss(inputs: Array, indices: Array) -> Array:
        return jnp.sum(jnp.sin(row_products(arrays["table"], indices, inputs, chunk_size=2)))

    looped = [jax.grad(loss)(arrays["inputs"], indices) for indices in batch]
    assert not np.allclose(*looped)
    mapped = jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0))(arrays["inputs"], batch)
    np.testing.assert_allclose(mapped, jnp.stack(looped), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axis_type", "check_vma"), [(AxisType.Explicit, True), (AxisType.Auto, False)]
)
def test_tokens_and_columns_can_be_sharded_in_shard_map(
    axis_type: AxisType, check_vma: bool
) -> None:
    """Shards tokens over one axis, and columns over the other, which sums the products."""
    mesh = jax.make_mesh((2, 4), ("data", "memory"), axis_types=(axis_type,) * 2)
    arrays = arguments(num_tokens=10, dim=12)
    specs = {
        "table": PartitionSpec(None, "memory"),
        "indices": PartitionSpec("data"),
        "inputs": PartitionSpec("data", "memory"),
    }

    def sharded(**arrays: Array) -> Array:
        def local(arrays: dict[str, Any]) -> Array:
            return jax.lax.psum(row_products(**arrays, chunk_size=2), "memory")

        return jax.shard_map(
            local, in_specs=(specs,), out_specs=PartitionSpec("data"), check_vma=check_vma
        )(arrays)

    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, specs[name]) for name, x in arrays.items()}
        got = results(sharded, placed)
    assert_all_close(got, results(row_products, arrays))


@pytest.mark.slow(fast=["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_match_the_reference(backend: str) -> None:
    arrays = arguments(num_tokens=5, num_selected=3, dim=16, num_values=10)
    arrays["indices"] = arrays["indices"].at[0].set(9)  # select the last row three times
    with interpreter(backend):
        got = results(row_products, arrays, implementation=backend, platform=PLATFORMS[backend])
    assert_all_close(got, results(row_products_reference, arrays))


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_only_compute_what_is_used(backend: str) -> None:
    arrays = arguments(num_tokens=5, dim=16, num_values=10)
    options: dict[str, Any] = {"implementation": backend, "platform": PLATFORMS[backend]}

    def loss(inputs: Array) -> Array:
        return jnp.sum(row_products(**arrays | {"inputs": inputs}, **options))

    def kernels(function: Callable[[Array], Array]) -> set[str]:
        traced = jax.jit(function).trace(arrays["inputs"]).jaxpr
        used, _ = pe.dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))
        names = ("forward", "backward", "row_sums", "sum_slices")
        return {name for name in names if f"value_aggregation_{name}" in str(used)}

    device = AbstractDevice("TPU v6 lite", 1, "tpu")  # sets the number of SparseCores
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert kernels(lambda x: row_products(**arrays | {"inputs": x}, **options)) == {"backward"}
        # The value is not used either: the gradient of a sum does not need it.
        assert kernels(jax.grad(loss)) == {"forward"}


@pytest.mark.slow
def test_rows_of_three_columns_compile_for_every_tpu() -> None:
    sizes = {
        "num_tokens": 300,
        "num_selected": 6,
        "num_values": 512,
        "num_cores": 1,
        "value_dim": 8,
    }
    cases: list[dict[str, Any]] = [
        {
            "topology": chip,
            "what": "row_products",
            "table_dtype": dtype,
            "pre_value_dim": 3,
            **sizes,
        }
        for chip in CHIPS
        for dtype in ("float32", "bfloat16")
    ]
    for case, result in zip(cases, run_cases("tpu_compile.py", *cases), strict=True):
        assert result["kernels"] == ["value_aggregation_backward"], case
        assert result["temporaries"] < FUSED_BYTES, case


@pytest.mark.slow
def test_kernels_compile_for_the_h200() -> None:
    columns = {"float32": 4, "bfloat16": 40}
    cases: list[dict[str, Any]] = [
        {
            "operator": "row_products",
            "implementation": "pallas_gpu",
            "what": what,
            "arguments": {
                "table": [[512, dim], dtype],
                "indices": [[300, 6], "int32"],
                "inputs": [[300, dim], "float32"],
            },
        }
        for dtype, dim in columns.items()
        for what in ("forward", "grads")
    ]
    results = run_cases("gpu_compile.py", *cases, compiler="h200")
    for case, result in zip(cases, results, strict=True):
        kernels = {"value_aggregation_backward"}
        if case["what"] == "grads":
            kernels |= {"value_aggregation_forward", "value_aggregation_sum_slices"}
            kernels |= {"value_aggregation_join_slices"}
        assert result["kernels"].keys() == kernels, case
        assert result["temporaries"] < FUSED_BYTES, case


def test_the_implementation_is_chosen_as_for_value_aggregation() -> None:
    arrays = arguments()
    default, named = (
        str(jax.make_jaxpr(lambda name=name: row_products(**arrays, **name))())
        for name in ({}, {"implementation": "xla"})
    )
    assert default == named
    with pytest.raises(
        UnsupportedError, match="row_products, implementation 'pallas_tpu': it comp"
    ):
        row_products(**arrays, implementation="pallas_tpu", platform="cpu")
    with pytest.raises(UnsupportedError, match="must be multiples of 16 bytes"):
        narrow = arguments(dim=3)
        row_products(**narrow, implementation="pallas_gpu", platform="gpu")


@pytest.mark.usefixtures("no_runtime_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": jnp.ones(3)}, r"table.shape: got \(3,\), must be \[num_values, dim\]"),
        ({"table": jnp.ones((3, 8), int)}, "table.dtype: got int32, must be a floating"),
        ({"indices": jnp.ones((7, 3))}, "indices.dtype: got float32, must be int32"),
        ({"indices": jnp.ones((6, 3), jnp.int32)}, r"must be \[num_tokens, dim\] = \(6, 8\)"),
        ({"inputs": jnp.ones((7, 4))}, r"inputs.shape: got \(7, 4\), must be .* = \(7, 8\)"),
        ({"inputs": jnp.ones((7, 8), int)}, "inputs.dtype: got int32, must be a floating"),
        ({"implementation": "best"}, "implementation: got 'best', must be None or one of xla, "),
        ({"chunk_size": 0}, "chunk_size: got 0, must be at least 1"),
    ],
)
def test_wrong_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_products(**arguments() | changes)
