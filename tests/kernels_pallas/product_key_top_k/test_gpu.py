"""The Hopper kernel of product-key top-k: interpreted, and compiled for an absent GPU."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import dispatch
from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.product_key_top_k import product_key_top_k
from kernels_pallas.product_key_top_k.call import TopKCall
from kernels_pallas.product_key_top_k.gpu import backend as pallas_gpu
from kernels_pallas.product_key_top_k.gpu import pairs as pallas_gpu_pairs
from kernels_pallas.product_key_top_k.gpu import select
from kernels_pallas.product_key_top_k.gpu.memory import Plan
from kernels_pallas.product_key_top_k.reference import product_key_top_k_reference
from kernels_pallas.product_key_top_k.shapes import PAPER, SHAPES, Shape
from tests.kernels_pallas.aot import FUSED_BYTES, run_cases
from tests.kernels_pallas.product_key_top_k.test_api import (
    assert_all_close,
    make_inputs,
    results_and_grads,
)

ON_GPU: dict[str, Any] = {"implementation": "pallas_gpu", "platform": "gpu"}
PAPER_SHAPES = [shape for shape in SHAPES if shape.name in PAPER]
# Numbers of keys and row offsets that are not multiples of 4, so that keys are padded.
ODD = Shape("odd", "model", 1001, 203, 21, 30, 24, num_heads=3)
ADDITIVE = Shape("additive", "model", 1024, 300, 20, 40, 64, rank=1, num_cores=0)


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Runs GPU kernels on CPU; detects races and reads of uninitialized memory."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        yield


def assert_matches_reference(
    inputs: dict[str, Any], *, top_m: int, shortlist: int, tolerance: float = 1e-5
) -> None:
    sizes: dict[str, Any] = {"top_m": top_m, "shortlist": shortlist}
    expected = results_and_grads(product_key_top_k_reference, inputs, **sizes)
    got = results_and_grads(product_key_top_k, inputs, **sizes, **ON_GPU)
    assert_all_close(got, expected, tolerance)


def best_by_kernel(scores: np.ndarray, count: int, depth: int) -> tuple[Array, Array]:
    """Indices of the best of [4, n] scores, and whether the tournament result was doubtful."""
    num_candidates = scores.shape[1]
    padded = np.pad(scores, ((0, 0), (0, -num_candidates % select.LANES)))

    def kernel(scores: Any, places: Any, doubts: Any, output: Any, flags: Any) -> None:
        def visit(body: Any, carry: Any) -> Any:
            def visit_some(index: Array, carry: Any) -> Any:
                first = index * select.LANES
                number = select.lane() + first
                sort_key = select.sort_key(select.load(scores.at[:, pl.ds(first, select.LANES)]))
                sort_key = select.where(number < num_candidates, sort_key, select.EMPTY)
                return body(carry, [sort_key, number])

            return lax.fori_loop(0, padded.shape[1] // select.LANES, visit_some, carry)

        *_, doubt = select._tournament(visit, count, depth, 2, [output])
        select.store(doubts, doubt)
        select.best(visit, count, depth, 2, [output], flags)
        for first in range(0, places.shape[1], select.LANES):
            columns = pl.ds(first, select.LANES)
            select.store(places.at[:, columns], select.load(output.at[:, columns]))

    size = (select.TOKENS, count + -count % select.LANES)
    places, doubts = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(size, jnp.int32),
            jax.ShapeDtypeStruct(size[:1], jnp.int32),
        ],
        scratch_types=[plgpu.SMEM(size, jnp.int32), plgpu.SMEM(size[:1], jnp.int32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(jnp.asarray(padded, jnp.float32))
    return places[:, :count], doubts


def best_by_sorting(scores: np.ndarray, count: int) -> np.ndarray:
    """NaN first, then in descending order of scores; ties by index."""
    keys = np.where(np.isnan(scores), np.inf, scores)
    order = [np.lexsort((-row, ~np.isnan(one))) for row, one in zip(keys, scores, strict=True)]
    return np.array(order)[:, :count]


@pytest.mark.usefixtures("interpreter")
def test_best_matches_sorting_with_ties_nan_and_signed_zeros() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 70))
    scores[1] = rng.integers(-2, 3, 70) * rng.choice([-1.0, 1.0], 70)
    scores[2, [3, 40]], scores[2, [4, 69]], scores[2, 7] = np.nan, np.inf, -np.inf
    scores[3] = rng.choice([0.0, -0.0], 70)
    places, doubts = best_by_kernel(scores, 35, depth=3)
    np.testing.assert_array_equal(places, best_by_sorting(scores, 35))
    assert not np.any(doubts)


@pytest.mark.usefixtures("interpreter")
def test_an_overflowing_lane_list_is_detected_and_corrected() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 128))
    scores[2, 5::32] += 10  # the four best are all in lane 5, whose list holds two
    places, doubts = best_by_kernel(scores, 5, depth=2)
    np.testing.assert_array_equal(places, best_by_sorting(scores, 5))
    assert doubts[2] == 1


@pytest.mark.slow(fast=["one_token"])
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("shape", "sizes", "integers"),
    [
        # Two tiles of 8 tokens, the last one ragged; keys of sides and ranks are not tile-aligned.
        (
            {"num_tokens": 9, "num_keys": 74, "num_heads": 1, "key_dim": 20},
            {"top_m": 5, "shortlist": 7},
            True,
        ),
        ({"num_tokens": 1, "num_heads": 1}, {"top_m": 9, "shortlist": 3}, False),
        pytest.param(
            {"num_tokens": 3, "rank": 1, "num_cores": 0},
            {"top_m": 6, "shortlist": 6},
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ragged", "one_token", "additive"],
)
def test_kernel_matches_the_reference(
    shape: dict[str, Any], sizes: dict[str, int], integers: bool
) -> None:
    assert_matches_reference(make_inputs(**shape, integers=integers), **sizes)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_key_products_have_float32_accuracy(dtype: Any) -> None:
    shape = Shape("products", "ci", 2, 80, 4, 4, 96, query_ranks=1)
    inputs = shape.inputs(dtype=dtype)
    query, keys = (np.asarray(inputs[name], np.float64) for name in ("query", "keys"))
    by_key = np.einsum("hsrtq,hsrnq->thsrn", np.tile(query, (1, 1, 2, 1, 1)), keys)
    call = TopKCall(**inputs, top_m=4, shortlist=4)
    _, addresses, chosen = pallas_gpu.forward(call, with_chosen=True)
    assert chosen is not None
    sides = np.stack(np.divmod(np.asarray(addresses), 80), axis=1)[:, None, :, None]
    wanted = np.take_along_axis(by_key, sides, axis=-1).swapaxes(1, 2)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(chosen, wanted, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_doubtful_tokens_are_selected_from_the_full_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only token 2 has a component in the second rank, which the shortlist ignores.
    sizes: dict[str, Any] = {"top_m": 4, "shortlist": 12}
    inputs = make_inputs(4, 20, num_heads=1, num_cores=1, key_dim=1, query_ranks=2, seed=1)
    query = inputs["query"].at[:, :, 1].set(0.0).at[:, :, 1, 2].set(3.0)
    first = jnp.array([[1.0, 0.0]])
    inputs |= {"query": query, "u": first, "v": first, "cores": jnp.eye(2)[None, None]}
    _, want = product_key_top_k_reference(**inputs, **sizes)
    _, got = product_key_top_k(**inputs, **sizes, **ON_GPU)
    np.testing.assert_array_equal(got, want)

    def no_doubts(grid: Any, last: Any) -> Array:
        del grid, last
        return jnp.max(select.full(0), axis=1)

    monkeypatch.setattr(pallas_gpu_pairs.Grid, "doubts", no_doubts)
    _, unchecked = product_key_top_k(**inputs, **sizes, **ON_GPU)
    np.testing.assert_array_equal(np.flatnonzero((unchecked != want).any(axis=-1)), [2])


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("num_cores", "bad"), [(0, np.nan), (2, np.nan), (0, np.inf)])
def test_a_key_with_a_nonfinite_score_is_chosen_and_its_score_returned(
    num_cores: int, bad: float
) -> None:
    rank = 2 if num_cores else 1
    inputs = make_inputs(3, 40, 1, rank, num_cores, integers=True)
    halves = {name: inputs[name].astype(jnp.bfloat16) for name in ("query", "keys")}
    inputs |= halves
    inputs["keys"] = inputs["keys"].at[0, :, 0, 17, 0].set(bad)
    sizes: dict[str, Any] = {"top_m": 9, "shortlist": 12}
    scores, addresses = product_key_top_k(**inputs, **sizes, **ON_GPU)
    expected = product_key_top_k_reference(**inputs, **sizes)
    np.testing.assert_array_equal(addresses, expected[1])
    np.testing.assert_array_equal(scores, expected[0])
    assert not np.isfinite(scores).all()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_short_lane_lists_fall_back_to_an_exact_scan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shallow(plan: Plan, heuristic: Callable[[Plan], Any] = pallas_gpu.heuristic) -> Any:
        return dataclasses.replace(heuristic(plan), key_depth=1, pair_depth=1)

    monkeypatch.setattr(pallas_gpu, "heuristic", shallow)
    inputs = make_inputs(2, 96, num_heads=1, integers=True)
    assert_matches_reference(inputs, top_m=9, shortlist=14)


_IN_CLUSTERS = """
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels_pallas.product_key_top_k.call import TopKCall
from kernels_pallas.product_key_top_k.gpu import backend
from kernels_pallas.product_key_top_k.gpu.memory import Blocks, Plan
from kernels_pallas.product_key_top_k.reference import product_key_top_k_reference
from kernels_pallas.product_key_top_k.shapes import Shape

# Two thread blocks of two warpgroups; ten blocks of keys, each in two buffers of columns.
shape = Shape("clusters", "ci", 9, 300, 3, 4, 32)
inputs = shape.inputs(dtype=jnp.bfloat16, numbers="integer")
call = TopKCall(**inputs, top_m=4, shortlist=3)
params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
with plgpu.force_gpu_interpret_mode(params):
    got = backend._launch(Plan.of(call), Blocks(8, 2, 2, 16, 2, 2), call)
exact = {n: x.astype(jnp.float32) for n, x in inputs.items()}
want = product_key_top_k_reference(**exact, top_m=4, shortlist=3)
np.testing.assert_array_equal(got[1], want[1])
np.testing.assert_array_equal(got[0], want[0])
"""


@pytest.mark.slow
def test_thread_blocks_of_a_cluster_share_reads() -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "JAX_PLATFORMS": "cpu",
        # Waiting warpgroups block interpreter threads; with one thread per core, it would deadlock.
        "NPROC": "16",
    }
    process = subprocess.run(
        [sys.executable, "-c", _IN_CLUSTERS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_vmap_equals_a_python_loop() -> None:
    shared = make_inputs(2, 12, num_heads=1)
    batch = jnp.stack([make_inputs(2, 12, num_heads=1, seed=seed)["query"] for seed in (1, 2)])

    def results(query: Array) -> tuple[Array, Array]:
        return product_key_top_k(**shared | {"query": query}, top_m=3, shortlist=3, **ON_GPU)

    looped = [results(query) for query in batch]
    assert not np.array_equal(looped[0][1], looped[1][1])
    for got, want in zip(jax.vmap(results)(batch), zip(*looped, strict=True), strict=True):
        np.testing.assert_array_equal(got, jnp.stack(want))


def test_the_forward_pass_is_one_named_kernel() -> None:
    inputs = make_inputs()
    sizes: dict[str, Any] = {"top_m": 5, "shortlist": 6}

    def kernels(function: Callable[[], Any]) -> int:
        return str(jax.make_jaxpr(function)()).count("product_key_top_k_forward")

    forward = functools.partial(product_key_top_k, **inputs, **sizes)
    assert kernels(functools.partial(forward, implementation="xla")) == 0
    once = kernels(functools.partial(forward, **ON_GPU))
    both = functools.partial(results_and_grads, product_key_top_k, inputs, **sizes, **ON_GPU)
    assert once == kernels(both) > 0


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ({"dtype": jnp.float16}, {}, "query must be float32 or bfloat16, is float16"),
        ({"num_keys": 4000}, {}, "4000 keys of rank 2, .* need .* bytes of shared memory, only"),
        ({}, {"platform": "tpu"}, "it compiles for GPU, not for tpu"),
    ],
    ids=str,
)
def test_unsupported_calls_raise_if_named_and_fall_back_to_xla_otherwise(
    shape: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    inputs = make_inputs(**shape)
    sizes: dict[str, Any] = {"top_m": 5, "shortlist": 6}
    with pytest.raises(UnsupportedError, match=reason):
        product_key_top_k(**inputs, **sizes, **ON_GPU | options)
    platform = {"platform": "gpu"} | options
    automatic = jax.make_jaxpr(lambda: product_key_top_k(**inputs, **sizes, **platform))()
    assert "mpmd_map" not in str(automatic)  # which Mosaic GPU kernels are


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_gpus_without_hopper_matrix_instructions_are_unsupported(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(dispatch, "compute_capability", lambda: capability)
    with pytest.raises(UnsupportedError, match=rf"9.0 \(Hopper\), the device has {capability}"):
        product_key_top_k(**make_inputs(), top_m=5, shortlist=6, **ON_GPU)


@pytest.mark.usefixtures("x64")
def test_float64_is_unsupported() -> None:
    inputs = make_inputs(dtype=jnp.float64)
    with pytest.raises(UnsupportedError, match="it accumulates in float32, not in float64"):
        product_key_top_k(**inputs, top_m=5, shortlist=6, **ON_GPU)


def compile_case(shape: Shape, dtype: str, what: str = "forward", **more: Any) -> dict[str, Any]:
    arguments = {
        name: None if x is None else [x.shape, x.dtype.name]
        for name, x in shape.arguments(jnp.dtype(dtype)).items()
    }
    return {
        "operator": "product_key_top_k",
        "implementation": "pallas_gpu",
        "arguments": arguments,
        "options": shape.options,
        "what": what,
        **more,
    }


def assert_fused(shape: Shape, result: dict[str, Any]) -> None:
    """Checks that there are no temporaries and no spills."""
    assert result["temporaries"] < FUSED_BYTES, shape
    assert result["kernels"]["product_key_top_k_forward"]["spilled"] == 0, shape


@pytest.mark.slow
def test_kernel_compiles_for_an_h200_without_temporaries_or_spills() -> None:
    shapes = [PAPER_SHAPES[0], ADDITIVE]
    results = run_cases(
        "gpu_compile.py", *(compile_case(shape, "bfloat16") for shape in shapes), compiler="h200"
    )
    for shape, result in zip(shapes, results, strict=True):
        assert_fused(shape, result)


@pytest.mark.slow
def test_gradients_compile_on_one_device_on_a_mesh_and_under_vmap() -> None:
    heads = ["query", "keys"]
    cases = [
        compile_case(ODD, "bfloat16", "grads"),
        compile_case(ADDITIVE, "bfloat16", "mapped"),
        compile_case(
            Shape("heads", "model", 64, 300, 20, 40, 64, num_heads=4, rank=1, num_cores=0),
            "float32",
            "sharded",
            sharded=heads,
        ),
    ]
    for case, result in zip(
        cases, run_cases("gpu_compile.py", *cases, compiler="h200"), strict=True
    ):
        assert "product_key_top_k_forward" in result["kernels"], case["what"]


@pytest.mark.slow
def test_paper_sizes_need_no_temporaries() -> None:
    shapes = [(shape, dtype) for shape in PAPER_SHAPES for dtype in ("float32", "bfloat16")]
    results = run_cases(
        "gpu_compile.py", *(compile_case(shape, dtype) for shape, dtype in shapes), compiler="h200"
    )
    for (shape, _), result in zip(shapes, results, strict=True):
        assert 4 * shape.num_tokens * 2 * shape.rank * shape.num_keys > 20 * FUSED_BYTES
        assert_fused(shape, result)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_results_vary_as_the_arguments_do(check_vma: bool) -> None:
    # One device only: with more, the interpreter frees shared memory that is still in use.
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    inputs = make_inputs(2, 12, num_heads=1)
    sizes: dict[str, Any] = {"top_m": 3, "shortlist": 3}
    specs = {
        name: PartitionSpec(None, None, None, "data") if name == "query" else PartitionSpec()
        for name in inputs
    }

    def sharded(**arrays: Array) -> Any:
        return jax.shard_map(
            lambda arrays: product_key_top_k(**arrays, **sizes, **ON_GPU),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec("data"),
            check_vma=check_vma,
        )(arrays)

    got = results_and_grads(sharded, inputs)
    assert_all_close(got, results_and_grads(product_key_top_k_reference, inputs, **sizes))
