"""The TPU kernels of value aggregation: interpreted, and compiled for absent chips."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import row_products
from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.row_products.reference import row_products_reference
from kernels_pallas.tables import pack_rows
from kernels_pallas.value_aggregation import value_aggregation
from kernels_pallas.value_aggregation.call import AggregationCall
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference
from kernels_pallas.value_aggregation.tpu import backend as pallas_tpu
from kernels_pallas.value_aggregation.tpu import blocks
from tests.kernels_pallas.aot import CHIPS, FUSED_BYTES, run_cases
from tests.kernels_pallas.value_aggregation.test_api import (
    assert_all_close,
    make_inputs,
    output_and_grads,
)

ON_TPU: dict[str, Any] = {"implementation": "pallas_tpu", "platform": "tpu"}

SMALL: dict[str, Any] = {
    "num_tokens": 300,
    "num_selected": 6,
    "num_values": 512,
    "value_dim": 24,
    "pre_value_dim": 136,
}
PAPER: dict[str, dict[str, Any]] = {
    "227M": {"num_values": 360**2, "num_selected": 32, "value_dim": 192, "pre_value_dim": 192},
    "1B": {"num_values": 528**2, "num_selected": 128, "value_dim": 768, "pre_value_dim": 384},
    "500M": {"num_values": 964**2, "num_selected": 94, "value_dim": 216, "pre_value_dim": 72},
    # The table of values has more than 2^31 elements.
    "120B": {"num_values": 1696**2, "num_selected": 256, "value_dim": 960, "pre_value_dim": 320},
}
# Of both tables, by number of rows, where 8192 tokens select enough of them: rows of 128 words, and
# of 384 and 256.
PACKED_BYTES = {360**2: 360**2 * 2 * 512, 528**2: 528**2 * (1536 + 1024)}


@pytest.fixture
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the lanes, so that few tokens and narrow rows span several blocks."""
    monkeypatch.setattr(pallas_tpu, "_LANES", 8)


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Runs TPU kernels on two CPU cores; detects races, out-of-bounds and uninitialized reads."""
    params = pltpu.InterpretParams(
        num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def assert_matches_reference(
    inputs: dict[str, Any], activation: Activation | None = None, tolerance: float = 1e-5
) -> None:
    want = output_and_grads(value_aggregation_reference, inputs, activation=activation)
    got = output_and_grads(value_aggregation, inputs, activation=activation, **ON_TPU)
    assert_all_close(got, want, tolerance)


@pytest.mark.slow(fast=["one"])
@pytest.mark.usefixtures("interpreter", "few_lanes")
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        # 19 tokens make three blocks of 8, the last one ragged, in two parts; rows are two or three
        # chunks of 8 lanes, which three cores divide unevenly.
        ({"num_tokens": 19, "num_cores": 3, "value_dim": 21, "pre_value_dim": 10}, "silu"),
        ({"num_tokens": 1, "num_selected": 1, "num_cores": 1, "pre_value_dim": 0}, None),
        ({"num_tokens": 3, "num_selected": 5, "indices": np.full((3, 5), 10)}, "gelu"),
    ],
    ids=["ragged", "one", "equal_ids"],
)
def test_kernels_match_the_reference(shape: dict[str, Any], activation: Activation | None) -> None:
    assert_matches_reference(make_inputs(**shape), activation)


@pytest.mark.slow(fast=["0"])
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("pre_value_dim", [0, 5])
def test_bfloat16_rows_are_picked_from_pairs(pre_value_dim: int) -> None:
    # Selects both ends of the table and both rows of a pair.
    indices = np.array([[0, 1, 11], [10, 0, 0]])
    inputs = make_inputs(
        num_tokens=2,
        num_values=12,
        indices=indices,
        pre_value_dim=pre_value_dim,
        table_dtype=jnp.bfloat16,
    )
    # Table gradients are rounded to bfloat16 once; the output is float32.
    assert_matches_reference(inputs, "relu" if pre_value_dim else None, tolerance=2**-7)
    want = value_aggregation_reference(**inputs)
    got = value_aggregation(**inputs, **ON_TPU)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def bfloat16_inputs(num_values: int = 3, num_tokens: int = 3) -> dict[str, Any]:
    """Rows of two registers, the second one partly filled, which two cores divide unevenly."""
    return make_inputs(
        num_tokens=num_tokens,
        num_selected=3,
        num_values=num_values,
        indices=np.arange(3 * num_tokens).reshape(-1, 3) % num_values,
        value_dim=192,
        pre_value_dim=136,
        table_dtype=jnp.bfloat16,
    )


@pytest.mark.usefixtures("interpreter")
def test_bfloat16_rows_are_unpacked_from_words() -> None:
    inputs = bfloat16_inputs()
    assert "u32[3,128]" in str(jax.make_jaxpr(lambda: value_aggregation(**inputs, **ON_TPU))())
    want = value_aggregation_reference(**inputs, activation="relu")
    got = value_aggregation(**inputs, activation="relu", **ON_TPU)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
def test_row_products_unpack_words() -> None:
    inputs = bfloat16_inputs()
    arrays = inputs["values"], inputs["indices"], jnp.cos(jnp.arange(3 * 192.0)).reshape(3, 192)
    assert "u32[3,128]" in str(jax.make_jaxpr(lambda: row_products(*arrays, **ON_TPU))())
    got, want = row_products(*arrays, **ON_TPU), row_products_reference(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_packed_rows_give_what_pairs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bfloat16_inputs(num_values=4)

    def program(**arguments: Any) -> jax.Array:
        return value_aggregation(**arguments, activation="gelu", **ON_TPU)

    packed_program = str(jax.make_jaxpr(lambda: program(**inputs))())
    packed = output_and_grads(program, inputs)
    for module in (pallas_tpu, blocks):
        monkeypatch.setattr(module, "is_packed", lambda table, call: False)
    pairs_program = str(jax.make_jaxpr(lambda: program(**inputs))())
    assert ["u32[4,128]" in text for text in (packed_program, pairs_program)] == [True, False]
    for name, pairs in output_and_grads(program, inputs).items():
        np.testing.assert_array_equal(packed[name], pairs, err_msg=name)


@pytest.mark.usefixtures("interpreter")
def test_a_packed_copy_is_read_instead_of_the_table() -> None:
    inputs = bfloat16_inputs()
    packed = {
        f"packed_{name}": pack_rows(inputs[name])
        for name in ("values", "pre_values")
        if name in inputs
    }
    unread = {name: jnp.full_like(inputs[name], jnp.nan) for name in inputs if "values" in name}
    want = output_and_grads(value_aggregation, inputs, **ON_TPU)
    got = output_and_grads(value_aggregation, inputs | unread, **ON_TPU, **packed)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.usefixtures("no_runtime_shape_checks")
def test_packed_rows_of_another_table_are_refused() -> None:
    inputs = bfloat16_inputs()
    with pytest.raises(ValueError, match=r"packed_values.shape: got .* as by pack_rows"):
        value_aggregation(**inputs, packed_values=pack_rows(inputs["values"])[1:], **ON_TPU)
    wide = {name: x.astype(jnp.float32) for name, x in inputs.items() if "values" in name}
    with pytest.raises(ValueError, match="packed_values: got given, must be of a bfloat16 table"):
        value_aggregation(**inputs | wide, packed_values=pack_rows(inputs["values"]), **ON_TPU)


def test_bfloat16_tables_are_packed_if_that_moves_fewer_bytes() -> None:
    def packed(num_tokens: int, dim: int, dtype: Any = jnp.bfloat16) -> bool:
        arrays: dict[str, Any] = {
            "values": jax.ShapeDtypeStruct((360**2, dim), dtype),
            "indices": jax.ShapeDtypeStruct((num_tokens, 32), jnp.int32),
            "scores": jax.ShapeDtypeStruct((num_tokens, 32, 1), jnp.float32),
        }
        return blocks.is_packed("values", AggregationCall(**arrays))

    # 8192 tokens fetch 2^18 rows. A packed row saves 512 bytes, and costs 1024 to pack.
    assert packed(8192, 192)
    assert not packed(8000, 192)
    assert not packed(8192, 128)
    assert not packed(8192, 192, jnp.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ({"num_tokens": 131, "num_selected": 2, "num_cores": 1}, "relu"),
        ({"num_tokens": 17, "num_selected": 9, "value_dim": 264, "pre_value_dim": 136}, None),
        ({"num_tokens": 2, "num_selected": 94, "value_dim": 24}, "gelu"),
    ],
    ids=["two_lane_blocks", "several_registers", "many_selected"],
)
def test_kernels_match_the_reference_at_full_lanes(
    shape: dict[str, Any], activation: Activation | None
) -> None:
    assert_matches_reference(make_inputs(**shape), activation, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "few_lanes")
def test_vmap_equals_a_python_loop() -> None:
    tables = make_inputs(num_tokens=2)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 2, 3)), jnp.int32)

    def output(indices: jax.Array) -> jax.Array:
        return value_aggregation(**tables | {"indices": indices}, **ON_TPU)

    want = jnp.stack([output(row) for row in indices])
    assert not np.array_equal(want[0], want[1])
    np.testing.assert_allclose(jax.vmap(output)(indices), want, rtol=1e-6)


def test_each_pass_has_named_kernels() -> None:
    inputs = make_inputs()
    forward = str(jax.make_jaxpr(lambda: value_aggregation(**inputs, **ON_TPU))())
    both = str(jax.make_jaxpr(lambda: output_and_grads(value_aggregation, inputs, **ON_TPU))())
    assert forward.count("pallas_call[") == 1
    assert "name=value_aggregation_forward" in forward
    assert both.count("pallas_call[") == 4
    assert "name=value_aggregation_backward" in both
    assert both.count("name=value_aggregation_row_sums") == 2  # one for each table


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"num_slots": 2}, r"slots are not implemented \(num_slots = 2\)"),
        ({"table_dtype": jnp.float16}, "rows must be float32 or bfloat16, values are float16"),
        ({"table_dtype": jnp.bfloat16}, "bfloat16 rows are fetched in pairs, values has 11"),
        (
            {"num_selected": 1000},
            "num_selected = 1000 needs 1024000 bytes of SMEM, only 917504 are available",
        ),
        ({"num_selected": 800, "value_dim": 2048}, "num_selected = 800 needs .* bytes of VMEM"),
        ({"num_tokens": 0}, r"indices is empty, \(0, 3\)"),
    ],
    ids=str,
)
def test_unsupported_calls_raise_if_named_and_fall_back_to_xla_otherwise(
    shape: dict[str, Any], reason: str
) -> None:
    inputs = make_inputs(**shape)
    with pytest.raises(UnsupportedError, match=reason):
        value_aggregation(**inputs, **ON_TPU)
    automatic = jax.make_jaxpr(lambda: value_aggregation(**inputs, platform="tpu"))()
    assert "pallas_call" not in str(automatic)


@pytest.mark.usefixtures("x64")
def test_float64_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="it accumulates in float32, not in float64"):
        value_aggregation(**make_inputs(dtype=jnp.float64), **ON_TPU)


@pytest.mark.slow
def test_kernels_compile_for_every_chip_without_temporaries() -> None:
    cases: list[dict[str, Any]] = [
        {"topology": chip, "what": "forward", "table_dtype": dtype, "num_cores": 2, **SMALL}
        for chip in CHIPS
        for dtype in ("float32", "bfloat16")
    ]
    for case, result in zip(cases, run_cases("tpu_compile.py", *cases), strict=True):
        assert result["kernels"] == ["value_aggregation_forward"], case
        # Packed pre-values, 512 rows of 128 words, if they are not in VMEM.
        packed = 512 * 512 if case["table_dtype"] == "bfloat16" else 0
        assert result["temporaries"] <= packed, case


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_on_one_device_on_a_mesh_and_under_vmap(chip: str) -> None:
    kinds = ("token_grads", "grads", "sharded", "mapped")
    cases: list[dict[str, Any]] = [
        {
            "topology": chip,
            "what": kind,
            "table_dtype": "bfloat16",
            "num_cores": 2,
            "activation": "gelu",
            **SMALL,
        }
        for kind in kinds
    ]
    results = dict(zip(kinds, run_cases("tpu_compile.py", *cases), strict=True))
    for kind in ("token_grads", "grads", "sharded"):
        assert "value_aggregation_backward" in results[kind]["kernels"], kind
    assert results["token_grads"]["temporaries"] < FUSED_BYTES
    assert results["mapped"]["kernels"] == ["value_aggregation_forward"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_paper_sizes_need_no_temporaries_but_packed_tables(chip: str) -> None:
    cases: list[dict[str, Any]] = [
        {
            "topology": chip,
            "what": "forward",
            "table_dtype": dtype,
            "num_tokens": 8192,
            "num_cores": 2,
            **shape,
        }
        for shape in PAPER.values()
        for dtype in ("float32", "bfloat16")
    ]
    for case, result in zip(cases, run_cases("tpu_compile.py", *cases), strict=True):
        rows = 4 * 8192 * case["num_selected"] * (case["value_dim"] + case["pre_value_dim"])
        # XLA may keep packed tables in VMEM.
        packed = PACKED_BYTES.get(case["num_values"], 0) * (case["table_dtype"] == "bfloat16")
        assert result["temporaries"] < packed + FUSED_BYTES, case
        assert FUSED_BYTES < rows / 100, case
