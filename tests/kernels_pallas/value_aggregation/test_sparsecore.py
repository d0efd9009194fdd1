"""The SparseCore kernels of value aggregation: interpreted, and compiled for absent chips."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.value_aggregation import value_aggregation, value_aggregation_row_gradients
from kernels_pallas.value_aggregation.call import AggregationCall
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference
from kernels_pallas.value_aggregation.sparsecore import backend as pallas_sparsecore
from kernels_pallas.value_aggregation.sparsecore import pipeline as sparsecore_pipeline
from kernels_pallas.value_aggregation.sparsecore.pipeline import Chip
from tests.kernels_pallas.aot import FUSED_BYTES, run_cases
from tests.kernels_pallas.sparsecore_interpreter import NUM_SUBCORES, interpreted_sparsecore
from tests.kernels_pallas.value_aggregation.test_api import (
    assert_all_close,
    make_inputs,
    output_and_grads,
)

ON_TPU: dict[str, Any] = {"implementation": "pallas_sparsecore", "platform": "tpu"}
CHIPS = ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")  # v5e has no SparseCores
V6E = Chip(2, 16, 8, 2**18)
SMALL: dict[str, Any] = {
    "num_tokens": 300,
    "num_selected": 6,
    "num_values": 512,
    "value_dim": 72,
    "pre_value_dim": 136,
    "num_cores": 2,
}
# More steps than buffers. A slice of 20 columns is two and a half chunks of lanes.
RAGGED = {"num_tokens": 3, "num_selected": 11, "num_cores": 3, "value_dim": 60, "pre_value_dim": 20}
MANY_WINDOWS = {"num_tokens": 9, "num_selected": 19, "value_dim": 16, "num_cores": 2}
PAPER: dict[str, dict[str, Any]] = {
    "227M": {"num_values": 360**2, "num_selected": 32, "value_dim": 192, "pre_value_dim": 192},
    "1B": {"num_values": 528**2, "num_selected": 128, "value_dim": 768, "pre_value_dim": 384},
    "500M": {"num_values": 964**2, "num_selected": 94, "value_dim": 216, "pre_value_dim": 72},
    # The table of values has more than 2^31 elements.
    "120B": {"num_values": 1696**2, "num_selected": 256, "value_dim": 960, "pre_value_dim": 320},
}


def mesh_of(kind: str) -> AbstractMesh:
    """A mesh that tells JAX the device kind when it is in context."""
    return AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 1, "tpu"))


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted_sparsecore():
        yield


def assert_kernels_match_the_reference(
    inputs: dict[str, Any], activation: Activation | None = None, tolerance: float = 1e-5
) -> None:
    """Compares output, gradients of scores and pre-inputs, and terms of the table gradients."""

    def reference(scores: jax.Array, pre_inputs: jax.Array | None) -> jax.Array:
        tables = {n: x for n, x in inputs.items() if n not in ("scores", "pre_inputs")}
        return value_aggregation_reference(
            **tables, scores=scores, pre_inputs=pre_inputs, activation=activation
        )

    want, vjp = jax.vjp(reference, inputs["scores"], inputs.get("pre_inputs"))
    output_grad = jnp.cos(jnp.arange(want.size, dtype=jnp.float32)).reshape(want.shape)
    scores_grad, pre_inputs_grad = vjp(output_grad)
    got = value_aggregation(**inputs, activation=activation, **ON_TPU)
    call = AggregationCall(**inputs, activation=activation)
    found = pallas_sparsecore.token_gradients(call, output_grad)
    expected = {"output": want, "scores": scores_grad}
    results = {"output": got, "scores": found[0]}
    if pre_inputs_grad is not None and found[1] is not None:
        expected["pre_inputs"], results["pre_inputs"] = pre_inputs_grad, found[1]
    assert_all_close(results, expected, tolerance)


@pytest.mark.slow(fast=["one"])
@pytest.mark.parametrize(
    ("shape", "activation", "chip"),
    [
        (RAGGED, "silu", {"local_bytes": 16_000, "copies": "eager"}),
        ({"num_tokens": 1, "num_selected": 1, "num_cores": 1, "pre_value_dim": 0}, None, {}),
        ({"num_tokens": 2, "indices": np.full((2, 3), 10), "value_dim": 32}, "gelu", {"lanes": 16}),
    ],
    ids=["ragged", "one", "equal_ids"],
)
def test_kernels_match_the_reference(
    shape: dict[str, Any], activation: Activation | None, chip: dict[str, Any]
) -> None:
    inputs = make_inputs(**{"pre_value_dim": 24} | shape)
    with interpreted_sparsecore(**chip):
        assert_kernels_match_the_reference(inputs, activation)


@pytest.mark.parametrize(
    ("shape", "local_bytes"),
    [
        (RAGGED, 16_000),
        (MANY_WINDOWS, 6_000),
    ],
    ids=["ragged", "many_windows"],
)
def test_tests_use_every_buffer_more_than_once(shape: dict[str, Any], local_bytes: int) -> None:
    inputs = make_inputs(**{"pre_value_dim": 0} | shape)
    chip = V6E._replace(local_bytes=local_bytes)
    kernel = pallas_sparsecore._Kernel(AggregationCall(**inputs), chip)
    num_tokens = -(-shape["num_tokens"] // NUM_SUBCORES)
    for held in (kernel.forward_arrays(), kernel.backward_arrays()):
        blocks = sparsecore_pipeline.heuristic(held, chip)
        assert blocks is not None
        assert blocks.rows == 8
        assert shape["num_selected"] % 8 != 0
        assert blocks.slots < num_tokens * -(-shape["num_selected"] // 8)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_dense_and_row_sparse_gradients_match_the_reference() -> None:
    inputs = make_inputs(num_tokens=4, num_selected=3, value_dim=24, pre_value_dim=16)
    want = output_and_grads(value_aggregation_reference, inputs, activation="gelu")
    got = output_and_grads(value_aggregation, inputs, activation="gelu", **ON_TPU)
    assert_all_close(got, want, 1e-5)

    output_grad = jnp.cos(jnp.arange(4.0 * 24)).reshape(4, 24)
    rows = value_aggregation_row_gradients(
        **inputs, output_grad=output_grad, max_rows=11, activation="gelu", **ON_TPU
    )
    assert rows.pre_values is not None
    for name, found in (("values", rows.values), ("pre_values", rows.pre_values)):
        dense = jnp.zeros_like(inputs[name]).at[rows.ids].add(found, mode="drop")
        np.testing.assert_allclose(dense, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_bfloat16_columns_are_split_and_merged(lanes: int) -> None:
    # Selects both ends of the table. A chunk is 16 or 32 columns, a core's slice 36.
    indices = np.array([[0, 1, 10], [10, 0, 0]])
    inputs = make_inputs(
        num_tokens=2, indices=indices, value_dim=72, pre_value_dim=40, table_dtype=jnp.bfloat16
    )
    with interpreted_sparsecore(lanes=lanes):
        assert_kernels_match_the_reference(inputs, "relu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "chip"),
    [
        # 7 and 3 chunks in blocks of 2: several full blocks and one of 1.
        ({"num_tokens": 2, "num_selected": 9, "value_dim": 56, "pre_value_dim": 24}, {}),
        # 6 1/2 and 4 1/2 chunks: the last one starts early.
        ({"num_tokens": 2, "num_selected": 9, "value_dim": 52, "pre_value_dim": 36}, {}),
        # The same with windows of 8 rows: sums are loaded, updated and stored per block.
        ({"num_tokens": 3, "num_selected": 19, "value_dim": 52}, {"local_bytes": 10_000}),
        (MANY_WINDOWS, {"local_bytes": 6_000}),
    ],
    ids=["blocks", "uneven_blocks", "blocks_and_windows", "many_windows"],
)
def test_kernels_match_the_reference_in_blocks_and_windows(
    shape: dict[str, Any], chip: dict[str, Any]
) -> None:
    inputs = make_inputs(**{"pre_value_dim": 0, "num_cores": 1} | shape)
    with interpreted_sparsecore(block_registers=2, **chip):
        assert_kernels_match_the_reference(inputs, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_vmap_equals_a_python_loop() -> None:
    tables = make_inputs(num_tokens=2, value_dim=16, pre_value_dim=8)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 2, 3)), jnp.int32)

    def output(indices: jax.Array) -> jax.Array:
        return value_aggregation(**tables | {"indices": indices}, **ON_TPU)

    want = jnp.stack([output(row) for row in indices])
    assert not np.array_equal(want[0], want[1])
    np.testing.assert_allclose(jax.vmap(output)(indices), want, rtol=1e-6)


def test_each_pass_is_one_named_kernel_also_under_remat() -> None:
    inputs = make_inputs(value_dim=16, pre_value_dim=8)

    def forward(**arrays: Any) -> jax.Array:
        return value_aggregation(**arrays, implementation="pallas_sparsecore")

    def remat(**arrays: Any) -> jax.Array:
        return jax.checkpoint(lambda arrays: forward(**arrays))(arrays)

    with use_abstract_mesh(mesh_of("TPU v6 lite")):
        once = str(jax.make_jaxpr(lambda: forward(**inputs))())
        both = str(jax.make_jaxpr(lambda: output_and_grads(forward, inputs))())
        again = str(jax.make_jaxpr(lambda: output_and_grads(remat, inputs))())
    for jaxpr, num_forward, num_backward in ((once, 1, 0), (both, 1, 1), (again, 1, 1)):
        assert jaxpr.count("name=value_aggregation_forward") == num_forward
        assert jaxpr.count("name=value_aggregation_backward") == num_backward


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"num_slots": 2}, r"slots are not implemented \(num_slots = 2\)"),
        ({"table_dtype": jnp.float16}, "rows must be float32 or bfloat16, values are float16"),
        ({"num_cores": 3}, "a vector holds 8 columns, a slice of values for one core has 4"),
        (
            {"value_dim": 34, "table_dtype": jnp.bfloat16, "num_cores": 2},
            "bfloat16 columns come in pairs, a slice of values for one core has 17",
        ),
        ({"pre_value_dim": 5}, "a vector holds 8 columns, a slice of pre_values for one core has"),
        ({"value_dim": 6000}, "two windows of 8 rows do not fit a local memory of 262144 bytes"),
        ({"num_tokens": 0}, r"indices is empty, \(0, 3\)"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("interpreter")
def test_unsupported_calls_raise_if_named_and_fall_back_to_xla_otherwise(
    shape: dict[str, Any], reason: str
) -> None:
    inputs = make_inputs(**{"num_cores": 1, "pre_value_dim": 8} | shape)
    with pytest.raises(UnsupportedError, match=reason):
        value_aggregation(**inputs, **ON_TPU)
    automatic = jax.make_jaxpr(lambda: value_aggregation(**inputs, platform="tpu"))()
    assert "mpmd_map" not in str(automatic)


@pytest.mark.usefixtures("x64")
def test_float64_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="it accumulates in float32, not in float64"):
        value_aggregation(**make_inputs(dtype=jnp.float64), **ON_TPU)


def test_support_depends_on_the_chip_which_must_be_known() -> None:
    inputs = make_inputs(value_dim=16, pre_value_dim=8)

    def trace(kind: str) -> str:
        with use_abstract_mesh(mesh_of(kind)):
            call = jax.make_jaxpr(
                lambda: value_aggregation(**inputs, implementation="pallas_sparsecore")
            )
            return str(call())

    with pytest.raises(UnsupportedError, match=r"chip is unknown, .* with their mesh in context"):
        value_aggregation(**inputs, **ON_TPU)
    with pytest.raises(UnsupportedError, match="TPU v5 lite has no SparseCores"):
        trace("TPU v5 lite")
    with pytest.raises(UnsupportedError, match="a vector holds 16 columns, a slice of values"):
        trace("TPU7x")
    assert "num_cores=2" in trace("TPU v6 lite")
    assert "num_cores=4" in trace("TPU v5")


@pytest.mark.parametrize(("width", "padded"), [(216, True), (208, False), (72, True)])
def test_only_unpadded_rows_are_fetched_by_streams(width: int, padded: bool) -> None:
    table = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)
    assert sparsecore_pipeline.has_padded_rows(table) == padded
    assert not sparsecore_pipeline.has_padded_rows(table.update(dtype=jnp.float32))


@pytest.mark.slow
def test_kernels_compile_for_every_chip_without_temporaries() -> None:
    cases: list[dict[str, Any]] = [
        {"topology": chip, "what": what, "table_dtype": dtype, "activation": "gelu", **SMALL}
        for chip in CHIPS
        for what in ("forward", "token_grads")
        for dtype in ("float32", "bfloat16")
    ]
    for case, result in zip(cases, run_cases("sparsecore_compile.py", *cases), strict=True):
        name = "forward" if case["what"] == "forward" else "backward"
        assert result["kernels"] == [f"value_aggregation_{name}"], case
        assert result["temporaries"] < FUSED_BYTES / 4, case


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_on_a_mesh_and_under_vmap_and_overlap_other_work(chip: str) -> None:
    kinds = ("grads", "sharded", "mapped", "beside_products", "packed")
    case = {"topology": chip, "table_dtype": "float32", "activation": "silu", **SMALL}
    cases = [{"what": kind, **case} for kind in kinds]
    # With rows of 128, the default layout is the one that the kernels read.
    cases[-1] |= PAPER["227M"] | {"num_tokens": 1024}
    results = dict(zip(kinds, run_cases("sparsecore_compile.py", *cases), strict=True))
    for kind in ("grads", "sharded"):
        assert "value_aggregation_backward" in results[kind]["kernels"], kind
    assert results["mapped"]["kernels"] == ["value_aggregation_forward"]
    assert results["beside_products"]["products_meanwhile"]
    assert results["packed"]["temporaries"] < FUSED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "token_grads"])
@pytest.mark.parametrize("chip", CHIPS)
def test_paper_sizes_need_no_temporaries(chip: str, what: str) -> None:
    cases: list[dict[str, Any]] = [
        {
            "topology": chip,
            "what": what,
            "table_dtype": dtype,
            "num_tokens": 8192,
            "num_cores": 2,
            **shape,
        }
        for shape in PAPER.values()
        for dtype in ("float32", "bfloat16")
    ]
    for case, result in zip(cases, run_cases("sparsecore_compile.py", *cases), strict=True):
        rows = 4 * 8192 * case["num_selected"] * (case["value_dim"] + case["pre_value_dim"])
        assert result["temporaries"] < FUSED_BYTES < rows / 100, case
