"""The public operators, dense and row-sparse, against NumPy; kernels are interpreted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from kernels_pallas import UnsupportedError, table_gradient, table_gradient_rows
from kernels_pallas.table_gradient.reference import table_gradient_reference
from tests.kernels_pallas.conformance import PLATFORMS, interpreter

KERNELS = ("pallas_tpu", "pallas_gpu")
NUM_VALUES = 11


def arguments(
    num_tokens: int = 7,
    num_selected: int = 3,
    num_cores: int = 2,
    dim: int = 8,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, NUM_VALUES, (num_tokens, num_selected))
    return {
        "indices": jnp.asarray(ids, jnp.int32),
        "weights": jnp.asarray(rng.normal(size=(num_tokens, num_selected, num_cores)), dtype),
        "factors": jnp.asarray(rng.normal(size=(num_tokens, dim)), dtype),
    }


def by_numpy(arrays: dict[str, Any]) -> np.ndarray:
    indices, weights, factors = (np.asarray(x, np.float64) for x in arrays.values())
    by_column = np.repeat(weights, factors.shape[1] // weights.shape[2], axis=2)
    table = np.zeros((NUM_VALUES, factors.shape[1]))
    np.add.at(table, indices.astype(int), by_column * factors[:, None, :])
    return table


def dense(rows: Any) -> Array:
    table = jnp.zeros((NUM_VALUES, rows.rows.shape[1]), rows.rows.dtype)
    return table.at[rows.ids].add(rows.rows, mode="drop")


def test_two_tokens_by_hand() -> None:
    indices = jnp.array([[0, 1], [0, 2]], jnp.int32)
    weights = jnp.array([[[1.0, 10.0], [2.0, 0.0]], [[3.0, -1.0], [0.0, 1.0]]])  # two cores
    factors = jnp.array([[1.0, 2.0], [5.0, 7.0]])
    gradient = table_gradient(indices, weights, factors, num_values=4)
    np.testing.assert_array_equal(gradient, [[16.0, 13.0], [2.0, 0.0], [0.0, 7.0], [0.0, 0.0]])
    rows = table_gradient_rows(indices, weights, factors, num_values=4)
    np.testing.assert_array_equal(rows.ids, [0, 1, 2, 4])
    assert rows.num_rows == 3
    np.testing.assert_array_equal(rows.rows[:3], gradient[:3])


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_cores": 1}, {"num_tokens": 1, "num_selected": 1}, {"num_tokens": 0}],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dense_and_row_sparse_gradients_match_numpy(
    shape: dict[str, Any], chunk_size: int | None
) -> None:
    arrays = arguments(**shape)
    want = by_numpy(arrays)
    options: dict[str, Any] = {"num_values": NUM_VALUES, "chunk_size": chunk_size}
    for got in (
        table_gradient_reference(**arrays, num_values=NUM_VALUES),
        table_gradient(**arrays, **options),
        dense(table_gradient_rows(**arrays, **options)),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_float64_is_summed_in_float64() -> None:
    arrays = arguments(dtype=jnp.float64)
    got = table_gradient(**arrays, num_values=NUM_VALUES, dtype=jnp.float64)
    np.testing.assert_allclose(got, by_numpy(arrays), rtol=1e-13, atol=1e-13)
    rows = table_gradient_rows(**arrays, num_values=NUM_VALUES)
    np.testing.assert_allclose(dense(rows), by_numpy(arrays), rtol=1e-13, atol=1e-13)


@pytest.mark.slow(fast=["pallas_gpu-float32"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_match_numpy(backend: str, dtype: DTypeLike) -> None:
    arrays = arguments(num_tokens=5)
    options: dict[str, Any] = {"implementation": backend, "platform": PLATFORMS[backend]}
    with interpreter(backend):
        got = jax.jit(
            lambda: table_gradient(**arrays, num_values=NUM_VALUES, dtype=dtype, **options)
        )()
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        np.asarray(got, np.float32), by_numpy(arrays), rtol=tolerance, atol=tolerance
    )


@pytest.mark.slow(fast=["pallas_gpu"])
@pytest.mark.parametrize("backend", KERNELS)
def test_row_sparse_kernels_match_xla(backend: str) -> None:
    arrays = arguments(num_tokens=5)
    options: dict[str, Any] = {"implementation": backend, "platform": PLATFORMS[backend]}
    want = table_gradient_rows(**arrays, num_values=NUM_VALUES, max_rows=4)
    with interpreter(backend):
        got = jax.jit(
            lambda: table_gradient_rows(**arrays, num_values=NUM_VALUES, max_rows=4, **options)
        )()
    np.testing.assert_array_equal(got.ids, want.ids)
    assert got.num_rows == want.num_rows > 4
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-5)


def test_an_id_out_of_range_is_clamped_to_the_nearest_row() -> None:
    arrays = arguments()
    outside = jnp.where(arrays["indices"] == 0, -3, arrays["indices"])
    outside = jnp.where(outside == NUM_VALUES - 1, NUM_VALUES + 5, outside)
    want = table_gradient_rows(**arrays, num_values=NUM_VALUES)
    got = table_gradient_rows(**arrays | {"indices": outside}, num_values=NUM_VALUES)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_inside_shard_map_the_gradient_is_that_of_the_local_tokens(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    arrays = arguments(num_tokens=16)
    specs = {name: PartitionSpec("data") for name in arrays}

    def local(arrays: dict[str, Any]) -> Array:
        return jax.lax.psum(table_gradient(**arrays, num_values=NUM_VALUES, chunk_size=1), "data")

    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, specs[name]) for name, x in arrays.items()}
        mapped = jax.shard_map(local, in_specs=(specs,), out_specs=PartitionSpec())
        got = jax.jit(mapped)(placed)
        if axis_type == AxisType.Explicit:
            with pytest.raises(ValueError, match=r"indices.sharding: got .*, must be replicated"):
                table_gradient(**placed, num_values=NUM_VALUES)
    np.testing.assert_allclose(got, by_numpy(arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("pallas_tpu", {"dtype": jnp.float16}, "the gradient must be float32 or bfloat16"),
        ("pallas_gpu", {"dtype": jnp.float16}, "the gradient must be float32 or bfloat16"),
        ("pallas_gpu", {"factors": jnp.ones((7, 6))}, "must be multiples of 16 bytes, .* have 24"),
        ("pallas_tpu", {"platform": "cpu"}, "it compiles for TPU, not for cpu"),
        ("pallas_gpu", {"platform": "cpu"}, "it compiles for GPU, not for cpu"),
    ],
)
def test_a_kernel_says_why_a_call_is_unsupported(
    backend: Any, changes: dict[str, Any], reason: str
) -> None:
    options = {"num_values": NUM_VALUES, "platform": PLATFORMS[backend]}
    with pytest.raises(UnsupportedError, match=f"implementation '{backend}': .*{reason}"):
        table_gradient(**arguments() | options | changes, implementation=backend)


@pytest.mark.usefixtures("no_runtime_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": jnp.ones((7, 3))}, "indices.dtype: got float32, must be int32"),
        ({"weights": jnp.ones((7, 2, 2))}, r"weights.shape\[:2\]: got \(7, 2\), must be the shape"),
        ({"weights": jnp.ones((7, 3, 3))}, r"weights.shape\[-1\]: got 3, must be a divisor of"),
        ({"factors": jnp.ones((6, 8))}, r"factors.shape: got \(6, 8\), must be as many rows as"),
        ({"num_values": 0}, "table rows: got 0, must be at least 1"),
        ({"num_values": -1}, "num_values: got -1, must be at least 0"),
        ({"num_values": 2.0}, "num_values: got 2.0, must be an integer"),
        ({"dtype": jnp.int32}, "dtype: got int32, must be a floating-point dtype"),
        ({"chunk_size": 0}, "chunk_size: got 0, must be at least 1"),
        ({"implementation": "best"}, "implementation: got 'best', must be None or one of xla, "),
    ],
)
def test_wrong_arguments_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_gradient(**arguments() | {"num_values": NUM_VALUES} | changes)
