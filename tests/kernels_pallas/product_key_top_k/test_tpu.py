"""The TPU kernels of product-key top-k: interpreted, and compiled for absent chips."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.product_key_top_k import product_key_top_k
from kernels_pallas.product_key_top_k.call import TopKCall
from kernels_pallas.product_key_top_k.reference import product_key_top_k_reference
from kernels_pallas.product_key_top_k.shapes import PAPER, SHAPES
from kernels_pallas.product_key_top_k.tpu import backend as pallas_tpu
from kernels_pallas.product_key_top_k.tpu import backward as pallas_tpu_backward
from kernels_pallas.product_key_top_k.tpu import select
from kernels_pallas.product_key_top_k.tpu.select import Staircase
from tests.kernels_pallas.aot import CHIPS, FUSED_BYTES, run_cases
from tests.kernels_pallas.product_key_top_k.test_api import (
    assert_all_close,
    make_inputs,
    results_and_grads,
)

ON_TPU: dict[str, Any] = {"implementation": "pallas_tpu", "platform": "tpu"}
SMALL: dict[str, Any] = {
    "num_tokens": 1100,
    "num_keys": 300,
    "shortlist": 20,
    "top_m": 30,
    "key_dim": 24,
    "num_heads": 2,
}
PAPER_SHAPES: dict[str, dict[str, Any]] = {
    shape.name: {
        name: getattr(shape, name)
        for name in ("num_tokens", "num_keys", "shortlist", "top_m", "key_dim")
    }
    for shape in SHAPES
    if shape.name in PAPER
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses tiles of 8 tokens and networks of 4 items, so that small cases have several of each."""
    monkeypatch.setattr(select, "RADIX", 4)
    monkeypatch.setattr(pallas_tpu, "_KEYS_PER_TILE", (8,))
    monkeypatch.setattr(pallas_tpu_backward, "_KEYS_PER_PRODUCT", 8)
    monkeypatch.setattr(pallas_tpu_backward, "_REGISTERS", 2)
    monkeypatch.setattr(pallas_tpu_backward, "_TOKENS_PER_TILE", (8,))
    for module in (pallas_tpu, pallas_tpu_backward):
        monkeypatch.setattr(module, "_SUBLANES", 2)
        monkeypatch.setattr(module, "_LANES", 4)


@pytest.fixture
def interpreter(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Runs TPU kernels on two CPU cores; detects races, out-of-bounds and uninitialized reads."""
    params = pltpu.InterpretParams(
        num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles without optimizations, which take longer than they save for sorting networks."""
    options = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "fusion"}
    return jax.jit(function, compiler_options=options)


def top_k_of(sizes: dict[str, Any]) -> Callable[..., Any]:
    return compiled(lambda inputs: product_key_top_k(**inputs, **sizes, **ON_TPU))


def kernel_results_and_grads(inputs: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    return compiled(lambda inputs: results_and_grads(product_key_top_k, inputs, **sizes, **ON_TPU))(
        inputs
    )


def assert_same_selection(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow(fast=["one"])
@pytest.mark.usefixtures("interpreter", "small_tiles")
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        # 11 tokens make two tiles, 21 keys three; lists of 6 and 7 are padded to 8.
        ({"num_tokens": 11, "num_keys": 21}, {"top_m": 7, "shortlist": 6}),
        (
            {"num_tokens": 1, "num_keys": 1, "rank": 1, "query_ranks": 1},
            {"top_m": 1, "shortlist": 1},
        ),
    ],
    ids=["ragged", "one"],
)
def test_selections_and_gradients_match_the_reference(
    shape: dict[str, Any], sizes: dict[str, Any]
) -> None:
    # Integers give many ties and make scores independent of the order of summation.
    inputs = make_inputs(**shape, integers=True)
    want = results_and_grads(product_key_top_k_reference, inputs, **sizes)
    assert_all_close(kernel_results_and_grads(inputs, sizes), want)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_tiles")
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (
            {"num_tokens": 9, "rank": 1, "num_cores": 0, "query_heads": 1},
            {"top_m": 12, "shortlist": 9},
        ),
        (
            {"num_tokens": 9, "rank": 3, "num_cores": 1, "query_heads": 1, "query_ranks": 1},
            {"top_m": 4, "shortlist": 9},
        ),
        ({"num_tokens": 17, "num_heads": 1, "dtype": jnp.bfloat16}, {"top_m": 25, "shortlist": 5}),
    ],
    ids=["additive", "shared_query", "bfloat16"],
)
def test_other_shapes_match_the_reference(shape: dict[str, Any], sizes: dict[str, Any]) -> None:
    inputs = make_inputs(**shape, integers=True)
    want = results_and_grads(product_key_top_k_reference, inputs, **sizes)
    got = kernel_results_and_grads(inputs, sizes)
    # Gradients are rounded to bfloat16 once; the selection is exact in both.
    np.testing.assert_array_equal(got["addresses"], want["addresses"])
    halves = shape.get("dtype") == jnp.bfloat16
    assert_all_close(got, want, 2**-7 if halves else 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_tiles")
def test_pairs_outside_the_staircase_and_special_values_match_the_reference() -> None:
    sizes: dict[str, Any] = {"top_m": 4, "shortlist": 8}
    shape: dict[str, Any] = {
        "num_tokens": 8,
        "num_keys": 24,
        "num_heads": 1,
        "num_cores": 1,
        "key_dim": 1,
    }
    inputs = make_inputs(**shape, query_ranks=2, seed=1)
    run = top_k_of(sizes)

    # Only token 3 has a component in the second rank, which shortlist and block order ignore.
    query = inputs["query"].at[:, :, 1].set(0.0).at[:, :, 1, 3].set(3.0)
    first = jnp.array([[1.0, 0.0]])
    inputs |= {"query": query, "u": first, "v": first, "cores": jnp.eye(2)[None, None]}
    want = product_key_top_k_reference(**inputs, **sizes)
    ahead = blocks_ahead(inputs, want[1], **sizes)
    assert ahead[3] > 2 * np.delete(ahead, 3).max()
    assert_same_selection(run(inputs), want)

    all_equal = inputs | {"query": jnp.zeros_like(query)}
    scores, addresses = run(all_equal)
    np.testing.assert_array_equal(addresses, np.tile(np.arange(4), (8, 1)))
    np.testing.assert_array_equal(scores, 0)

    ones = jnp.ones_like(query)
    of_both_signs = jnp.where(jnp.arange(24) % 2 == 0, 0.0, -0.0)[:, None]
    zeros = inputs | {"query": ones, "keys": jnp.broadcast_to(of_both_signs, (1, 2, 2, 24, 1))}
    np.testing.assert_array_equal(run(zeros)[1], np.tile(np.arange(4), (8, 1)))

    for bad in (np.nan, -np.nan, np.inf):
        keys = inputs["keys"].at[0, 0, 0, 17, 0].set(bad).at[0, 1, 0, 5, 0].set(-bad)
        broken = inputs | {"keys": keys, "query": jnp.abs(query)}
        got, want = run(broken), product_key_top_k_reference(**broken, **sizes)
        assert np.isnan(want[0]).any(), bad
        assert_same_selection(got, want)


def blocks_ahead(inputs: dict[str, Any], addresses: Any, *, top_m: int, shortlist: int) -> Any:
    """For each token, the index of the last block of the staircase with a chosen pair."""
    num_keys = inputs["keys"].shape[3]
    padded = 1 << (shortlist - 1).bit_length()
    blocks = Staircase(shortlist, padded, max(select.RADIX, top_m)).blocks
    number = np.zeros((padded, padded), int)
    for i, (row, column, log_width) in enumerate(blocks):
        width = 1 << log_width
        number[row : row + max(select.RADIX, top_m) // width, column : column + width] = i
    query, keys = inputs["query"][0], inputs["keys"][0]
    places = []
    for side, weights in enumerate((inputs["u"], inputs["v"])):
        ranking = np.einsum("atq,anq,a->tn", query[side], keys[side], weights[0])
        order = np.argsort(-ranking, axis=1, kind="stable")
        ids = np.asarray(addresses) // num_keys if side == 0 else np.asarray(addresses) % num_keys
        places.append(np.argmax(order[:, None] == ids[:, :, None], axis=2))
    return number[places[0], places[1]].max(axis=1)


def test_networks_sort_every_sequence_of_zeros_and_ones() -> None:
    # By the zero-one principle, the networks then sort any sequence.
    keys = jnp.asarray(np.array(list(itertools.product([0, 1], repeat=16))).T, jnp.int32)
    assert keys.shape == (16, 2**16)
    items = [(key, jnp.full_like(key, i)) for i, key in enumerate(keys)]
    found = jnp.stack([key for key, _ in select._sorted(items)])
    np.testing.assert_array_equal(found, -jnp.sort(-keys, axis=0))
    # Ties go to the lower id.
    ids = jnp.stack([id_ for _, id_ in select._sorted(items)])
    np.testing.assert_array_equal(ids, jnp.argsort(-keys, axis=0, stable=True))

    halves = [*select._sorted(items[:8]), *select._sorted(items[8:])]
    merged = jnp.stack([id_ for _, id_ in select._merged(halves)])
    np.testing.assert_array_equal(merged, ids)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_lists_longer_than_the_registers_are_sorted_and_merged() -> None:
    # Few distinct keys, so that ids decide.
    size = 256
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, size, 2, 4)), jnp.int32)

    def kernel(keys: Any, best_keys: Any, best_ids: Any, work_keys: Any, work_ids: Any) -> None:
        best, work = select.Items(best_keys, best_ids), select.Items(work_keys, work_ids)
        select.clear(best, size)
        for half in range(2):

            def items(place: Any, half: int = half) -> list[Any]:
                some = keys[half, pl.ds(place, select.RADIX)]
                ids = jax.lax.broadcasted_iota(jnp.int32, some.shape, 0) + half * size + place
                return list(zip(some, ids, strict=True))

            select.sort(work, size, items)
            select.keep_best(best, work, size)

    lists = jax.ShapeDtypeStruct((size, 2, 4), jnp.int32)
    scratch = [pltpu.VMEM(lists.shape, jnp.int32)] * 2
    run = compiled(pl.pallas_call(kernel, out_shape=(lists, lists), scratch_shapes=scratch))
    both = np.asarray(keys).reshape(2 * size, 2, 4)
    order = np.argsort(-both, axis=0, kind="stable")[:size]
    best_keys, best_ids = run(keys)
    np.testing.assert_array_equal(best_ids, order)
    np.testing.assert_array_equal(best_keys, np.take_along_axis(both, order, axis=0))


def test_sort_keys_have_the_order_of_scores_with_nan_first() -> None:
    scores = jnp.array([-jnp.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, 1e30, jnp.inf, jnp.nan])
    keys = select.key_of(scores)
    steps = np.diff(np.asarray(keys, np.int64))
    np.testing.assert_array_equal(np.flatnonzero(steps == 0), [3])
    assert (steps >= 0).all() and keys[0] > select.NOTHING
    np.testing.assert_array_equal(select.score_of(keys), scores)
    np.testing.assert_array_equal(select.key_of(-scores[-1:]), keys[-1:])
    assert jnp.isnan(select.score_of(jnp.int32(select.NOTHING)))


@pytest.mark.parametrize(
    ("shortlist", "top_m"), [(1, 1), (3, 9), (20, 30), (32, 32), (94, 94), (128, 256), (100, 7)]
)
def test_blocks_tile_the_grid_in_the_order_of_staircases(shortlist: int, top_m: int) -> None:
    padded, size = pallas_tpu._power_of_two(shortlist), pallas_tpu._power_of_two(top_m)
    visits = np.full((padded, padded), -1)
    for number, (row, column, log_width) in enumerate(Staircase(shortlist, padded, size).blocks):
        width = 1 << log_width
        block = visits[row : row + size // width, column : column + width]
        assert block.size == size and width % (select.RADIX // 2) == 0
        assert (block == -1).all()
        block[...] = number
    assert (visits[:shortlist, :shortlist] >= 0).all()
    # For every reach, blocks that overlap (i + 1) (j + 1) <= reach come before the others.
    numbers = np.arange(1, padded + 1)
    reach = np.full(visits.max() + 1, padded**2)
    np.minimum.at(reach, visits[visits >= 0], np.outer(numbers, numbers)[visits >= 0])
    assert (np.diff(reach) >= 0).all()


def test_each_pass_is_one_named_kernel() -> None:
    inputs = make_inputs()
    sizes: dict[str, Any] = {"top_m": 5, "shortlist": 6}
    forward = str(jax.make_jaxpr(lambda: product_key_top_k(**inputs, **sizes, **ON_TPU))())
    both = str(
        jax.make_jaxpr(lambda: results_and_grads(product_key_top_k, inputs, **sizes, **ON_TPU))()
    )
    assert forward.count("pallas_call[") == 1
    assert "name=product_key_top_k_forward" in forward
    assert both.count("pallas_call[") == 2
    assert "name=product_key_top_k_backward" in both


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": jnp.float16}, "query must be float32 or bfloat16, got float16"),
        ({"num_keys": 9000}, "it needs .* bytes of VMEM, only 58720256 are available"),
        (
            {"num_keys": 2000, "key_dim": 2048, "num_heads": 1, "query_ranks": 1},
            "the backward pass needs .* bytes of VMEM, only 58720256 are available",
        ),
    ],
    ids=str,
)
def test_unsupported_calls_raise_if_named_and_fall_back_to_xla_otherwise(
    shape: dict[str, Any], reason: str
) -> None:
    inputs = make_inputs(**shape)
    with pytest.raises(UnsupportedError, match=reason):
        product_key_top_k(**inputs, top_m=3, shortlist=3, **ON_TPU)
    automatic = jax.make_jaxpr(
        lambda: product_key_top_k(**inputs, top_m=3, shortlist=3, platform="tpu")
    )()
    assert "pallas_call" not in str(automatic)


def test_empty_batches_are_unsupported() -> None:
    with pytest.raises(UnsupportedError, match=r"query is empty, \(2, 2, 2, 0, 4\)"):
        product_key_top_k(**make_inputs(num_tokens=0), top_m=3, shortlist=3, **ON_TPU)


def test_blocks_that_do_not_fill_registers_are_rejected() -> None:
    call = TopKCall(**make_inputs(), top_m=3, shortlist=20)
    with pytest.raises(ValueError, match="keys: got 64, must be a multiple of 128"):
        pallas_tpu._Plan(call, pallas_tpu.Blocks(keys=64))
    with pytest.raises(ValueError, match="tokens: got 64, must be a multiple of 128"):
        pallas_tpu_backward._Plan(call, pallas_tpu_backward.Blocks(tokens=64))


@pytest.mark.usefixtures("x64")
def test_float64_is_unsupported() -> None:
    inputs = make_inputs(dtype=jnp.float64)
    with pytest.raises(UnsupportedError, match="it accumulates in float32, not in float64"):
        product_key_top_k(**inputs, top_m=3, shortlist=3, **ON_TPU)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "small_tiles")
def test_vmap_equals_a_python_loop() -> None:
    sizes: dict[str, Any] = {"top_m": 3, "shortlist": 4}
    inputs = make_inputs(num_tokens=3, num_keys=6, num_heads=1)
    queries = jnp.stack([inputs["query"], -inputs["query"]])
    run = top_k_of(sizes)
    want = [run(inputs | {"query": query}) for query in queries]
    assert not np.array_equal(want[0][1], want[1][1])
    mapped = jax.vmap(lambda query: run(inputs | {"query": query}))(queries)
    for got, expected in zip(mapped, zip(*want, strict=True), strict=True):
        np.testing.assert_array_equal(got, jnp.stack(expected))


@pytest.mark.slow
def test_kernels_compile_for_every_chip_without_temporaries() -> None:
    cases = [
        {"topology": chip, "what": what, "dtype": dtype, "shape": SMALL}
        for chip in CHIPS
        for what, dtype in (("forward", "float32"), ("backward", "bfloat16"))
    ]
    results = run_cases("tpu_compile_top_k.py", *cases)
    for case, result in zip(cases, results, strict=True):
        assert result["kernels"] == [f"product_key_top_k_{case['what']}"], case
        assert result["temporaries"] < FUSED_BYTES, case


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_on_one_device_on_a_mesh_and_under_vmap(chip: str) -> None:
    kinds = ("grads", "sharded", "mapped")
    cases = [
        {"topology": chip, "what": kind, "dtype": "bfloat16", "shape": SMALL} for kind in kinds
    ]
    grads, sharded, mapped = run_cases("tpu_compile_top_k.py", *cases)
    both = ["product_key_top_k_forward", "product_key_top_k_backward"]
    assert grads["kernels"] == sharded["kernels"] == both
    assert mapped["kernels"] == both[:1]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_paper_sizes_need_no_temporaries(chip: str) -> None:
    shapes = [(shape, "float32") for shape in PAPER_SHAPES.values()]
    # Shared queries and bfloat16 conversions take the most memory.
    largest = PAPER_SHAPES["120B"] | {"query_ranks": 1}
    shapes += [(largest, "float32"), (largest, "bfloat16")]
    cases: list[dict[str, Any]] = [
        {"topology": chip, "what": what, "dtype": dtype, "shape": shape}
        for shape, dtype in shapes
        for what in ("forward", "backward")
    ]
    for case, result in zip(cases, run_cases("tpu_compile_top_k.py", *cases), strict=True):
        shape = case["shape"]
        grids = 4 * shape["num_tokens"] * shape["shortlist"] ** 2
        assert result["kernels"] == [f"product_key_top_k_{case['what']}"], case
        assert result["temporaries"] < FUSED_BYTES < grids / 10, case
