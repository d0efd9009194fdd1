"""Row-sparse gradients of value aggregation, and the TPU kernel that sums table gradients."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from kernels_pallas import RowGradients, value_aggregation_row_gradients
from kernels_pallas.table_gradient.call import Term
from kernels_pallas.table_gradient.tpu import backend as table_gradient_tpu
from kernels_pallas.table_gradient.tpu.backend import Blocks, heuristic, sum_by_row
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference
from tests.kernels_pallas.aot import CHIPS, run_cases
from tests.kernels_pallas.value_aggregation.test_api import (
    DIFFERENTIABLE,
    TABLES,
    assert_all_close,
    make_inputs,
    temporary_bytes,
)
from tests.kernels_pallas.value_aggregation.test_tpu import ON_TPU, PAPER, SMALL


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Runs TPU kernels on two CPU cores; detects races, out-of-bounds and uninitialized reads."""
    params = pltpu.InterpretParams(
        num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def output_gradient(inputs: dict[str, Any]) -> Array:
    """An arbitrary output gradient, in the dtype of the scores."""
    width = inputs["values"].shape[1] * inputs.get("num_slots", 1)
    shape = (inputs["indices"].shape[0], width)
    elements = np.cos(np.arange(np.prod(shape))).reshape(shape)
    return jnp.asarray(elements, inputs["scores"].dtype)


def reference_gradients(
    inputs: dict[str, Any], activation: Activation | None = None
) -> dict[str, Array]:
    """Dense reference gradients by argument name, computed in the dtype of the scores."""
    dtype = inputs["scores"].dtype
    arrays = {name: inputs[name].astype(dtype) for name in DIFFERENTIABLE if name in inputs}
    others = {name: value for name, value in inputs.items() if name not in arrays}

    def output(arrays: dict[str, Any]) -> Array:
        return value_aggregation_reference(**arrays, **others, activation=activation)

    return jax.vjp(output, arrays)[1](output_gradient(inputs))[0]


def rows_of(inputs: dict[str, Any], **options: Any) -> RowGradients:
    """The operator under test, under jit, because eager execution takes far longer."""
    arrays = {name: x for name, x in inputs.items() if name != "num_slots"}
    options["num_slots"] = inputs.get("num_slots", 1)
    arrays["output_grad"] = output_gradient(inputs)
    return jax.jit(lambda arrays: value_aggregation_row_gradients(**arrays, **options))(arrays)


def sums_of(arguments: dict[str, Any], num_rows: int, **options: Any) -> Array:
    return jax.jit(lambda arrays: sum_by_row(**arrays, num_rows=num_rows, **options))(arguments)


def dense(gradients: RowGradients, num_values: int) -> dict[str, Array]:
    """Row-sparse gradients, by argument name, with table gradients made dense."""

    def to_dense(rows: Array) -> Array:
        table = jnp.zeros((num_values, rows.shape[1]), rows.dtype)
        return table.at[gradients.ids].add(rows, mode="drop")

    grads = {name: getattr(gradients, name) for name in DIFFERENTIABLE}
    grads = {name: grad for name, grad in grads.items() if grad is not None}
    return {name: to_dense(grad) if name in TABLES else grad for name, grad in grads.items()}


def assert_matches_reference(
    inputs: dict[str, Any],
    activation: Activation | None = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> None:
    num_values = inputs["values"].shape[0]
    got = rows_of(inputs, activation=activation, **options)
    ids = np.unique(inputs["indices"])
    assert got.num_rows == ids.size
    padding = np.full(got.ids.size - ids.size, num_values)
    np.testing.assert_array_equal(got.ids, np.concatenate([ids, padding]))
    want = reference_gradients(inputs, activation)
    assert_all_close(dense(got, num_values), want, tolerance)


@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ({}, None),
        ({"num_slots": 3}, "gelu"),
        ({"num_cores": 3, "num_slots": 2, "pre_value_dim": 0}, None),
        ({"num_tokens": 1, "num_selected": 5}, "silu"),
        (
            {"num_tokens": 1, "num_selected": 1, "num_values": 1, "num_cores": 1, "value_dim": 1},
            "relu",
        ),
        ({"table_dtype": jnp.bfloat16}, None),
    ],
    ids=str,
)
def test_rows_match_the_dense_reference_gradient(
    shape: dict[str, Any], activation: Activation | None
) -> None:
    assert_matches_reference(make_inputs(**shape), activation, chunk_size=2)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float64_rows_have_float64_precision() -> None:
    inputs = make_inputs(num_slots=2, dtype=jnp.float64)
    assert_matches_reference(inputs, "gelu", tolerance=1e-12, chunk_size=3)


@pytest.mark.parametrize("row", [0, 10])
def test_equal_ids_at_either_end_of_the_table_give_one_row(row: int) -> None:
    inputs = make_inputs(indices=np.full((7, 3), row))
    assert_matches_reference(inputs, chunk_size=2)
    got = rows_of(inputs)
    assert got.ids[0] == row
    assert got.num_rows == 1
    assert np.abs(got.values[0]).min() > 0
    assert not np.any(got.values[1:])


def test_any_ids_give_ascending_distinct_ids_and_the_reference_rows() -> None:
    inputs = make_inputs(num_tokens=5, num_values=6)

    @jax.jit
    def got_and_expected(indices: Array) -> tuple[RowGradients, dict[str, Array]]:
        chosen = inputs | {"indices": indices}
        return rows_of(chosen, chunk_size=2), reference_gradients(chosen)

    @given(st.lists(st.integers(0, 5), min_size=15, max_size=15))
    def check(indices: list[int]) -> None:
        got, want = got_and_expected(jnp.asarray(indices, jnp.int32).reshape(5, 3))
        ids = sorted(set(indices))
        assert got.num_rows == len(ids)
        np.testing.assert_array_equal(got.ids, ids + [6] * (6 - len(ids)))
        assert_all_close(dense(got, 6), want)

    check()


@pytest.mark.parametrize("max_rows", [1, 3])
def test_max_rows_drops_the_largest_ids_and_num_rows_reports_it(max_rows: int) -> None:
    inputs = make_inputs()
    every = rows_of(inputs)
    got = rows_of(inputs, max_rows=max_rows)
    assert got.num_rows == every.num_rows > max_rows == got.ids.size
    for name in ("ids", "values", "pre_values"):
        np.testing.assert_array_equal(getattr(got, name), getattr(every, name)[:max_rows])
    np.testing.assert_array_equal(got.scores, every.scores)


def test_rows_beyond_the_distinct_ids_are_padding() -> None:
    inputs = make_inputs(num_tokens=2)
    got = rows_of(inputs, max_rows=20)
    assert got.num_rows <= 6
    assert got.values.shape == (20, 12)
    np.testing.assert_array_equal(got.ids[6:], np.full(14, 11))
    assert got.pre_values is not None
    assert not np.any(got.values[6:])
    assert not np.any(got.pre_values[6:])
    assert_all_close(dense(got, 11), reference_gradients(inputs))


def test_unselected_rows_are_never_read() -> None:
    inputs = make_inputs(indices=np.full((7, 3), 4))
    infinite = jnp.full_like(inputs["values"], jnp.inf).at[4].set(inputs["values"][4])
    got = rows_of(inputs | {"values": infinite}, chunk_size=2)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(got))


@pytest.mark.slow
def test_vmap_equals_a_python_loop() -> None:
    tables = make_inputs()
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 7, 3)), jnp.int32)

    @jax.jit
    def rows(indices: Array) -> RowGradients:
        return rows_of(tables | {"indices": indices}, chunk_size=2)

    looped = [rows(chosen) for chosen in indices]
    assert not np.array_equal(looped[0].ids, looped[1].ids)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    got = jax.vmap(rows)(indices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_rows_are_those_of_the_local_tokens(check_vma: bool) -> None:
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("data",))
    inputs = make_inputs(num_tokens=4 * num_devices, num_slots=2)
    num_slots = inputs.pop("num_slots")
    inputs["output_grad"] = output_gradient(inputs | {"num_slots": num_slots})
    specs = {name: PartitionSpec(None if name in TABLES else "data") for name in inputs}

    def local(inputs: dict[str, Any]) -> RowGradients:
        got = value_aggregation_row_gradients(**inputs, num_slots=num_slots, chunk_size=3)
        return got._replace(num_rows=got.num_rows[None])

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            local, in_specs=(specs,), out_specs=PartitionSpec("data"), check_vma=check_vma
        )
        placed = {name: jax.device_put(inputs[name], specs[name]) for name in inputs}
        got = jax.device_get(jax.jit(mapped)(placed))
    assert len(set(np.asarray(got.num_rows))) > 1
    del inputs["output_grad"]
    want = reference_gradients(inputs | {"num_slots": num_slots})
    assert_all_close(dense(got, 11), want)


def test_neither_a_table_nor_all_products_are_materialized() -> None:
    num_tokens, num_selected, width, num_values = 8192, 32, 192, 2**20
    shapes = {
        "values": jax.ShapeDtypeStruct((num_values, width), jnp.bfloat16),
        "indices": jax.ShapeDtypeStruct((num_tokens, num_selected), jnp.int32),
        "scores": jax.ShapeDtypeStruct((num_tokens, num_selected, 2), jnp.float32),
        "pre_values": jax.ShapeDtypeStruct((num_values, width), jnp.bfloat16),
        "pre_inputs": jax.ShapeDtypeStruct((num_tokens, width), jnp.float32),
        "output_grad": jax.ShapeDtypeStruct((num_tokens, width), jnp.float32),
    }
    products_bytes, table_bytes = num_tokens * num_selected * width * 4, num_values * width * 4

    def temporaries(chunk_size: int) -> int:
        options = {"max_rows": 1000, "chunk_size": chunk_size}
        return temporary_bytes(value_aggregation_row_gradients, shapes, **options)

    assert temporaries(num_tokens) > products_bytes
    assert temporaries(128) < products_bytes / 5 < table_bytes / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_grad": jnp.ones((7, 24))}, r"output_grad.shape: got \(7, 24\), .*\(7, 12\)"),
        ({"output_grad": jnp.ones((7, 12), int)}, "output_grad.dtype: got int32, must be a float"),
        ({"max_rows": -1}, "max_rows: got -1, must be at least 0"),
        ({"activation": "tanh"}, "activation: got 'tanh', must be one of"),
    ],
    ids=["shape", "dtype", "max_rows", "activation"],
)
@pytest.mark.usefixtures("no_runtime_shape_checks")
def test_a_wrong_argument_is_reported_with_name_value_and_rule(
    changes: dict[str, Any], message: str
) -> None:
    inputs = make_inputs()
    arguments = inputs | {"output_grad": output_gradient(inputs)} | changes
    with pytest.raises(ValueError, match=message):
        value_aggregation_row_gradients(**arguments)


# The TPU kernel.


def drawn_selections(
    num_selections: int, num_tokens: int, num_rows: int, dim: int, num_cores: int
) -> dict[str, Any]:
    """The array arguments of `sum_by_row`."""
    rng = np.random.default_rng(0)
    return {
        "rows": jnp.asarray(np.sort(rng.integers(0, num_rows, num_selections)), jnp.int32),
        "tokens": jnp.asarray(rng.integers(0, num_tokens, num_selections), jnp.int32),
        "weights": [jnp.asarray(rng.normal(size=num_selections), jnp.float32)] * num_cores,
        "factors": jnp.asarray(rng.normal(size=(num_tokens, dim)), jnp.float32),
    }


def sums_by_numpy(arguments: dict[str, Any], num_rows: int) -> np.ndarray:
    factors = np.asarray(arguments["factors"], np.float64)
    dim, num_cores = factors.shape[1], len(arguments["weights"])
    weights = np.repeat(np.stack(arguments["weights"], 1), dim // num_cores, axis=1)
    sums = np.zeros((max(num_rows, int(arguments["rows"].max()) + 1), dim))
    np.add.at(sums, np.asarray(arguments["rows"]), weights * factors[arguments["tokens"]])
    return sums[:num_rows]


@pytest.mark.slow(fast=["one_row"])
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("shape", "num_rows", "dtype", "blocks"),
    [
        # Five blocks in two parts, the last one ragged; four chunks; three cores divide two
        # registers of lanes unevenly; two groups of columns, the second one ragged.
        ((50, 5, 70, 150, 3), 70, jnp.float32, Blocks(16, 16, 1)),
        ((50, 5, 70, 300, 1), 70, jnp.bfloat16, Blocks(32, 8, 2)),
        # Rows >= 40 are dropped, although they share a block with rows that are not.
        ((50, 5, 70, 12, 2), 40, jnp.float32, Blocks(16, 64, 1)),
        # Runs of equal rows span several chunks; a block with most of the rows is empty.
        ((40, 3, 1, 8, 1), 50, jnp.float32, Blocks(16, 8, 1)),
        ((1, 1, 1, 1, 1), 1, jnp.float32, None),
    ],
    ids=["ragged", "bfloat16", "left_out", "one_row", "one"],
)
def test_kernel_matches_numpy(
    shape: tuple[int, int, int, int, int], num_rows: int, dtype: DTypeLike, blocks: Blocks | None
) -> None:
    arguments = drawn_selections(*shape)
    got = sums_of(arguments, num_rows, dtype=dtype, blocks=blocks)
    assert got.dtype == dtype
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    want = sums_by_numpy(arguments, num_rows)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_sums_are_bitwise_independent_of_the_blocks() -> None:
    arguments = drawn_selections(30, 4, 20, 16, 2)

    def sums(arguments: dict[str, Any], blocks: Blocks) -> Array:
        return sums_of(arguments, 20, dtype=jnp.float32, blocks=blocks)

    small, large = Blocks(16, 8, 1), Blocks(32, 64, 1)
    few, many = (
        table_gradient_tpu._Visits.of(arguments["rows"], 20, blocks.rows, blocks.chunk).blocks
        for blocks in (large, small)
    )
    assert few.size < many.size
    want = sums(arguments, large)
    np.testing.assert_array_equal(sums(arguments, small), want)
    backwards = {name: arguments[name][::-1] for name in ("rows", "tokens")}
    backwards["rows"] = 19 - backwards["rows"]
    backwards["weights"] = [weight[::-1] for weight in arguments["weights"]]
    other_order = sums(arguments | backwards, large)[::-1]
    np.testing.assert_allclose(other_order, want, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(other_order, want)  # so the bits do depend on the order


@pytest.mark.slow(fast=["one_token"])
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("shape", "activation", "max_rows"),
    [
        ({"num_tokens": 5, "num_selected": 3, "num_cores": 3}, "silu", None),
        ({"num_tokens": 1, "num_selected": 5, "pre_value_dim": 0}, None, 3),
    ],
    ids=["ragged", "one_token"],
)
def test_rows_on_tpu_match_xla(
    shape: dict[str, Any], activation: Activation | None, max_rows: int | None
) -> None:
    inputs = make_inputs(**shape)
    options = {"activation": activation, "max_rows": max_rows}
    want = rows_of(inputs, **options)
    got = rows_of(inputs, **options, **ON_TPU)
    np.testing.assert_array_equal(got.ids, want.ids)
    assert got.num_rows == want.num_rows
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_vmap_of_the_kernel_equals_a_python_loop() -> None:
    arguments = drawn_selections(10, 3, 12, 8, 1)
    rows = jnp.stack([arguments["rows"], arguments["rows"] // 2])

    def sums(rows: Array) -> Array:
        return sums_of(arguments | {"rows": rows}, 12, dtype=jnp.float32)

    want = jnp.stack([sums(chosen) for chosen in rows])
    assert not np.array_equal(want[0], want[1])
    np.testing.assert_array_equal(jax.vmap(sums)(rows), want)


@pytest.mark.parametrize(
    ("num_tokens", "dim", "sublanes"),
    [(8192, 72, 1), (8192, 192, 2), (8192, 320, 4), (8192, 960, 8), (2**14, 960, 4), (1, 4096, 8)],
)
def test_column_groups_are_as_wide_as_their_factors_fit(
    num_tokens: int, dim: int, sublanes: int
) -> None:
    assert heuristic(num_tokens, dim).sublanes == sublanes


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("num_tokens", "parts"), [(53, "f32[3,18,24]"), (50, "f32[5,10,24]")], ids=["padded", "equal"]
)
def test_factors_that_do_not_fit_vmem_are_summed_in_parts(
    num_tokens: int, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.integers(0, 40, (num_tokens, 3)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(num_tokens, 3, 2)), jnp.float32)
    terms = [Term(weights, jnp.asarray(rng.normal(size=(num_tokens, 24)), jnp.float32))]
    tables = [jax.ShapeDtypeStruct((40, 24), jnp.bfloat16)]

    def sums() -> tuple[list[jax.Array], list[Any], str]:
        traced = jax.make_jaxpr(
            lambda: table_gradient_tpu.dense_gradients(tables, indices, terms)
        )()
        sparse = table_gradient_tpu.row_sparse_gradients(indices, 40, 30, terms)
        return table_gradient_tpu.dense_gradients(tables, indices, terms), sparse, str(traced)

    dense, sparse, program = sums()
    monkeypatch.setattr(
        table_gradient_tpu, "_FACTOR_BYTES", 20 * 4 * 128
    )  # three parts of 17 tokens
    parts_dense, parts_sparse, parts_program = sums()
    assert (parts in parts_program) and (parts not in program)
    np.testing.assert_allclose(
        parts_dense[0].astype(jnp.float32), dense[0].astype(jnp.float32), rtol=2**-7
    )
    assert parts_dense[0].dtype == dense[0].dtype
    for got, want in zip(parts_sparse, sparse, strict=True):
        np.testing.assert_array_equal(got.ids, want.ids)
        assert got.num_rows == want.num_rows > 30
        np.testing.assert_allclose(got.rows, want.rows, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_for_every_chip(chip: str) -> None:
    sums = "value_aggregation_row_sums"
    cases: list[dict[str, Any]] = [
        {"topology": chip, "what": what, "table_dtype": "bfloat16", "num_cores": 2, **SMALL}
        for what in ("dense", "rows")
    ]
    for case, result in zip(cases, run_cases("table_gradient_compile.py", *cases), strict=True):
        assert sorted(result["kernels"]) == ["value_aggregation_backward", sums, sums], case


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_sums_at_paper_sizes_need_neither_products_nor_a_second_table(chip: str) -> None:
    cases: list[dict[str, Any]] = [
        {
            "topology": chip,
            "what": "sums",
            "table_dtype": "bfloat16",
            "num_tokens": 8192,
            "num_cores": num_cores,
            "dim": shape[name],
            **shape,
        }
        for shape in PAPER.values()
        for name, num_cores in (("value_dim", 2), ("pre_value_dim", 1))
    ]
    for case, result in zip(cases, run_cases("table_gradient_compile.py", *cases), strict=True):
        products = 4 * 8192 * case["num_selected"] * case["dim"]
        table = 2 * case["num_values"] * case["dim"]
        # Padded arrays: factors, and selections on their way to SMEM.
        assert result["temporaries"] < 80 * 2**20 < products, case
        assert result["temporaries"] < table / 2, case
