"""The GPU kernels of value aggregation: interpreted, and compiled for an absent H200.

The interpreter detects races, including those with asynchronous copies, and reads of uninitialized
memory. It only works on one device: with several (jax 0.12), it confuses the barriers of a device
that has finished with those of one that is still running. So `shard_map` is interpreted on a mesh
of one device, and compiled for four.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import dispatch, value_aggregation_row_gradients
from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.table_gradient.gpu import backend as table_gradient_gpu
from kernels_pallas.table_gradient.gpu.backend import sum_by_row
from kernels_pallas.value_aggregation import value_aggregation
from kernels_pallas.value_aggregation.activation import activation_and_slope
from kernels_pallas.value_aggregation.gpu import backend as pallas_gpu
from kernels_pallas.value_aggregation.gpu.tokens import Blocks
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference
from kernels_pallas.value_aggregation.shapes import PAPER, SHAPES, Shape
from tests.kernels_pallas.aot import FUSED_BYTES, run_cases
from tests.kernels_pallas.gpu_compile import NUM_DEVICES
from tests.kernels_pallas.value_aggregation.test_api import (
    TABLES,
    assert_all_close,
    make_inputs,
    output_and_grads,
)

ON_GPU: dict[str, Any] = {"implementation": "pallas_gpu", "platform": "gpu"}
PER_TOKEN = ("indices", "scores", "pre_inputs")
FORWARD = {"value_aggregation_forward"}
BACKWARD = {
    "value_aggregation_backward",
    "value_aggregation_sum_slices",
    "value_aggregation_join_slices",
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses small blocks, so that a few selections fill the rings several times and are split."""
    monkeypatch.setattr(pallas_gpu, "heuristic", lambda *sizes: Blocks(4, 2, 2))
    monkeypatch.setattr(
        table_gradient_gpu, "heuristic", lambda *sizes: table_gradient_gpu.Blocks(16, 4, 2)
    )


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Runs GPU kernels on CPU; detects races, out-of-bounds and uninitialized reads."""
    params = plgpu.InterpretGPUParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    with plgpu.force_gpu_interpret_mode(params):
        yield


def assert_matches_reference(
    inputs: dict[str, Any], activation: Activation | None = None, tolerance: float = 1e-5
) -> None:
    want = output_and_grads(value_aggregation_reference, inputs, activation=activation)
    got = output_and_grads(value_aggregation, inputs, activation=activation, **ON_GPU)
    assert_all_close(got, want, tolerance)


@pytest.mark.slow(fast=["one"])
@pytest.mark.usefixtures("interpreter", "small_blocks")
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        # Eight steps in two splits, the last step overlapping; rows narrower than a tile.
        ({"num_tokens": 2, "num_selected": 30, "value_dim": 24, "pre_value_dim": 16}, "gelu"),
        # Three cores divide the three tiles of a row unevenly; the last tile is padded.
        ({"num_tokens": 2, "num_cores": 3, "value_dim": 132, "pre_value_dim": 68}, "silu"),
        # Fewer selections than a quad.
        (
            {
                "num_tokens": 1,
                "num_selected": 1,
                "value_dim": 8,
                "num_cores": 1,
                "pre_value_dim": 0,
            },
            None,
        ),
    ],
    ids=["refilled", "wide", "one"],
)
def test_kernels_match_the_reference(shape: dict[str, Any], activation: Activation | None) -> None:
    assert_matches_reference(make_inputs(**shape), activation, tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_bfloat16_rows_and_both_ends_of_the_table() -> None:
    indices = np.array([[0, 10, 0, 5, 10], [10, 10, 10, 10, 10], [1, 2, 3, 4, 9]])
    inputs = make_inputs(
        num_tokens=3,
        num_selected=5,
        indices=indices,
        value_dim=16,
        pre_value_dim=8,
        table_dtype=jnp.bfloat16,
    )
    # In float32, the reference does not round each contribution to a table gradient.
    tables = {name: inputs[name].astype(jnp.float32) for name in TABLES}
    want = output_and_grads(value_aggregation_reference, inputs | tables, activation="relu")
    got = output_and_grads(value_aggregation, inputs, activation="relu", **ON_GPU)
    for name, array in want.items():
        tolerance = 2**-8 if name in TABLES else 1e-5
        assert got[name].dtype == (jnp.bfloat16 if name in TABLES else jnp.float32)
        result = got[name].astype(jnp.float32)
        np.testing.assert_allclose(result, array, rtol=tolerance, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_blocks")
@pytest.mark.parametrize("num_selected", [3, 5, 8])
def test_one_token_equal_ids_and_any_number_of_selections(num_selected: int) -> None:
    inputs = make_inputs(
        num_tokens=1,
        num_selected=num_selected,
        indices=np.full((1, num_selected), 10),
        value_dim=8,
        pre_value_dim=8,
    )
    assert_matches_reference(inputs)


def test_tokens_are_split_only_in_small_batches() -> None:
    assert pallas_gpu.heuristic(1, 256, 2560).splits == 64
    assert pallas_gpu.heuristic(8192, 256, 2560).splits == 1


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("infinite", [0, 29])
def test_a_row_fetched_twice_counts_once(infinite: int) -> None:
    # With 30 selections, the last step of four or eight repeats some, which must be masked.
    inputs = make_inputs(num_tokens=1, num_selected=30, value_dim=8, pre_value_dim=0, num_values=40)
    inputs["indices"] = jnp.arange(30, dtype=jnp.int32)[None]
    inputs["scores"] = jnp.abs(inputs["scores"])
    inputs["values"] = inputs["values"].at[infinite, 0].set(jnp.inf).at[27, 1].set(jnp.inf)
    want = value_aggregation_reference(**inputs)
    assert np.isposinf(want).sum() == 2
    np.testing.assert_allclose(value_aggregation(**inputs, **ON_GPU), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_runs_of_equal_rows_are_summed_across_slices() -> None:
    rng = np.random.default_rng(0)
    num_tokens, num_selected, num_cores, dim, num_rows = 9, 5, 2, 16, 7
    blocks = table_gradient_gpu.Blocks(slice_size=4, slice_rows=4, slice_stages=2)
    weights: Any = rng.normal(size=(num_tokens, num_selected, num_cores))
    factors: Any = rng.normal(size=(num_tokens, dim))
    order = rng.permutation(num_tokens * num_selected)
    products = np.repeat(weights.reshape(-1, num_cores), dim // num_cores, axis=1)
    products = (products * np.repeat(factors, num_selected, axis=0))[order]
    sorted_order = jnp.asarray(order, jnp.int32)
    weights, factors = jnp.asarray(weights, jnp.float32), jnp.asarray(factors, jnp.float32)

    @jax.jit
    def sums(rows: jax.Array) -> jax.Array:
        return sum_by_row(rows, sorted_order, weights, factors, num_rows, jnp.float32, blocks)

    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    size = num_tokens * num_selected
    for rows in (
        np.zeros(size),  # one row spans all twelve slices
        np.repeat([1, 2, 6], [3, 41, 1]),  # begins inside a slice, ends at a boundary
        np.repeat([0, 3, 4, 5], [4, 4, 9, 28]),  # begins at a boundary, fills exactly one slice
        np.sort(rng.integers(0, num_rows, size)),
        np.sort(rng.integers(0, 2 * num_rows, size)),  # rows >= num_rows are dropped
    ):
        want = np.zeros((2 * num_rows, dim))
        np.add.at(want, rows.astype(int), products)
        with plgpu.force_gpu_interpret_mode(params):
            got = sums(jnp.asarray(rows, jnp.int32))
        np.testing.assert_allclose(got, want[:num_rows], rtol=1e-5, atol=1e-5)


@pytest.mark.slow(fast=["4"])
@pytest.mark.usefixtures("interpreter", "small_blocks")
@pytest.mark.parametrize("max_rows", [None, 4])
def test_row_sparse_gradients_match_the_dense_ones(max_rows: int | None) -> None:
    inputs = make_inputs(num_tokens=3, num_selected=5, value_dim=16, pre_value_dim=8)
    output_grad = jnp.cos(jnp.arange(48.0)).reshape(3, 16)
    want = output_and_grads(value_aggregation_reference, inputs)
    got = value_aggregation_row_gradients(
        **inputs, output_grad=output_grad, max_rows=max_rows, **ON_GPU
    )
    ids = np.unique(inputs["indices"])
    assert got.num_rows == ids.size > 4
    ids = ids[:max_rows]
    np.testing.assert_array_equal(got.ids[: ids.size], ids)
    for name in ("values", "pre_values"):
        rows = np.asarray(getattr(got, name))
        np.testing.assert_allclose(rows[: ids.size], want[name][ids], rtol=1e-5, atol=1e-5)
        assert not rows[ids.size :].any()
    np.testing.assert_allclose(got.scores, want["scores"], rtol=1e-5, atol=1e-5)
    assert got.pre_inputs is not None
    np.testing.assert_allclose(got.pre_inputs, want["pre_inputs"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_blocks")
def test_vmap_equals_a_python_loop() -> None:
    inputs = make_inputs(num_tokens=2, value_dim=8, pre_value_dim=8)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 2, 3)), jnp.int32)

    @jax.jit
    def value_and_grad(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(values: jax.Array) -> jax.Array:
            arguments = inputs | {"indices": indices, "values": values}
            return jnp.sum(value_aggregation(**arguments, **ON_GPU) ** 2)

        return jax.value_and_grad(loss)(inputs["values"])

    want = [value_and_grad(row) for row in indices]
    assert want[0][0] != want[1][0]
    got = jax.vmap(value_and_grad)(indices)
    for position, mapped in enumerate(got):
        loop = jnp.stack([one[position] for one in want])
        np.testing.assert_allclose(mapped, loop, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_blocks")
def test_inside_shard_map_arrays_may_vary_over_different_axes() -> None:
    inputs = make_inputs(num_tokens=2, value_dim=8, pre_value_dim=8)
    specs = {name: PartitionSpec("data" if name in PER_TOKEN else None) for name in inputs}
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("data",), devices=devices, axis_types=(AxisType.Auto,))

    def sharded(**arrays: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda arrays: value_aggregation(**arrays, **ON_GPU),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec("data"),
        )(arrays)

    want = output_and_grads(value_aggregation_reference, inputs)
    assert_all_close(output_and_grads(sharded, inputs), want)


def test_each_pass_is_one_named_kernel() -> None:
    inputs = make_inputs(value_dim=8, pre_value_dim=8, num_cores=1)
    forward = str(jax.make_jaxpr(lambda: value_aggregation(**inputs, **ON_GPU))())
    both = str(jax.make_jaxpr(lambda: output_and_grads(value_aggregation, inputs, **ON_GPU))())
    for name, count in (("forward", 1), ("backward", 0), ("sum_slices", 0)):
        assert forward.count(f"name=value_aggregation_{name}\n") == count, name
    for name, count in (("forward", 1), ("backward", 1), ("sum_slices", 2)):
        assert both.count(f"name=value_aggregation_{name}\n") == count, name


def test_gelu_and_its_slope_without_erf_match_jax() -> None:
    x = jnp.linspace(-14, 14, 10001)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    gelu, slope = activation_and_slope(x, "gelu")
    np.testing.assert_allclose(gelu, exact(x), rtol=5e-7, atol=5e-7)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact))(x), rtol=1e-6, atol=1e-6)
    assert "erf" not in str(jax.make_jaxpr(lambda x: activation_and_slope(x, "gelu"))(x))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"num_slots": 2}, r"slots are not implemented \(num_slots = 2\)"),
        ({"table_dtype": jnp.float16}, "rows must be float32 or bfloat16, values are float16"),
        ({"value_dim": 6}, "rows must be multiples of 16 bytes, those of values have 24"),
        (
            {"value_dim": 12, "table_dtype": jnp.bfloat16},
            "rows must be multiples of 16 bytes, those of values have 24",
        ),
        ({"pre_value_dim": 5}, "rows must be multiples of 16 bytes, those of pre_values have 20"),
        ({"value_dim": 8000}, r"rows of \[8000, 8\] elements need .* bytes of shared memory"),
        ({"num_tokens": 0}, r"indices is empty, \(0, 3\)"),
    ],
    ids=str,
)
def test_unsupported_calls_raise_if_named_and_fall_back_to_xla_otherwise(
    shape: dict[str, Any], reason: str
) -> None:
    inputs = make_inputs(**{"value_dim": 16, "pre_value_dim": 8} | shape)
    with pytest.raises(UnsupportedError, match=reason):
        value_aggregation(**inputs, **ON_GPU)
    automatic = jax.make_jaxpr(lambda: value_aggregation(**inputs, platform="gpu"))()
    assert "mpmd_map" not in str(automatic)


def test_other_platforms_and_older_gpus_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(value_dim=16, pre_value_dim=8)
    with pytest.raises(UnsupportedError, match="it compiles for GPU, not for tpu"):
        value_aggregation(**inputs, implementation="pallas_gpu", platform="tpu")
    for capability in ("8.0", "gfx942"):
        monkeypatch.setattr(dispatch, "compute_capability", lambda found=capability: found)
        with pytest.raises(UnsupportedError, match=rf"9.0 \(Hopper\) .* has {capability}"):
            value_aggregation(**inputs, **ON_GPU)


def test_invalid_tuned_blocks_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(value_dim=8, pre_value_dim=8)
    for blocks, rule in ((Blocks(2, 2, 1), "rows: got 2"), (Blocks(4, 0, 1), "stages: got 0")):
        monkeypatch.setattr(pallas_gpu, "heuristic", lambda *sizes, found=blocks: found)
        with pytest.raises(ValueError, match=rule):
            jax.make_jaxpr(lambda: value_aggregation(**inputs, **ON_GPU))()
    monkeypatch.undo()
    monkeypatch.setattr(
        table_gradient_gpu, "heuristic", lambda *sizes: table_gradient_gpu.Blocks(6, 4, 1)
    )
    with pytest.raises(ValueError, match="slice_size: got 6, must be a multiple of slice_rows = 4"):
        jax.make_jaxpr(lambda: output_and_grads(value_aggregation, inputs, **ON_GPU))()


@pytest.mark.usefixtures("x64")
def test_float64_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="it accumulates in float32, not in float64"):
        value_aggregation(**make_inputs(dtype=jnp.float64), **ON_GPU)


def gpu_case(shape: Shape, dtype: str, what: str, **others: Any) -> dict[str, Any]:
    arrays = shape.arguments(jnp.dtype(dtype))
    return {
        "operator": "value_aggregation",
        "arguments": {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()},
        "implementation": "pallas_gpu",
        "options": shape.options,
        "what": what,
        **others,
    }


SMALL = Shape("small", "ci", 20, 6, 32, 24, 8, num_cores=2, activation="gelu")


@pytest.mark.slow
def test_forward_compiles_for_an_h200_without_temporaries() -> None:
    cases = [gpu_case(SMALL, dtype, "forward") for dtype in ("float32", "bfloat16")]
    for case, result in zip(
        cases, run_cases("gpu_compile.py", *cases, compiler="h200"), strict=True
    ):
        assert result["kernels"].keys() == FORWARD, case
        assert result["temporaries"] == 0, case


@pytest.mark.slow
def test_gradients_compile_on_a_mesh_under_vmap_and_with_remat() -> None:
    token_grads = gpu_case(SMALL, "bfloat16", "grads", wrt=["scores", "pre_inputs"])
    remat = gpu_case(SMALL, "bfloat16", "grads", remat=True)
    grads, mapped, sharded = (
        gpu_case(SMALL, "bfloat16", what, sharded=list(PER_TOKEN))
        for what in ("grads", "mapped", "sharded")
    )
    assert SMALL.num_tokens % NUM_DEVICES == 0
    results = run_cases(
        "gpu_compile.py", token_grads, grads, mapped, sharded, remat, compiler="h200"
    )
    kernels = [set(result["kernels"]) for result in results]
    assert kernels[0] == FORWARD | {"value_aggregation_backward"}
    assert results[0]["temporaries"] < FUSED_BYTES
    assert kernels[1] == FORWARD | BACKWARD
    assert kernels[2] == FORWARD
    assert FORWARD | {"value_aggregation_sum_slices"} <= kernels[3]
    assert kernels[4] >= BACKWARD


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paper_sizes_compile_without_spills_or_temporaries(dtype: str) -> None:
    shapes = [shape for shape in SHAPES if shape.name in PAPER]
    cases = [gpu_case(shape, dtype, what) for shape in shapes for what in ("forward", "grads")]
    results = iter(run_cases("gpu_compile.py", *cases, compiler="h200"))
    for shape in shapes:
        forward, grads = next(results), next(results)
        selections = shape.num_tokens * shape.num_selected
        rows = 4 * selections * (shape.value_dim + shape.pre_value_dim)
        assert forward["temporaries"] < FUSED_BYTES < rows / 100, shape
        # Arrays per selection and partial sums of slices, but no gathered rows.
        numbers = 4 * selections * (4 + 3 * shape.num_cores)
        assert grads["temporaries"] < numbers + rows / 20 < rows / 4, shape
        assert grads["kernels"].keys() == FORWARD | BACKWARD, shape
        for kernel in grads["kernels"].values():
            assert kernel["spilled"] == 0, shape


def test_slices_give_few_partial_sums_and_many_thread_blocks() -> None:
    assert table_gradient_gpu.heuristic(8192 * 32, 768).slice_size == 256
    assert table_gradient_gpu.heuristic(32, 768).slice_size == 32
