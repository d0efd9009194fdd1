"""Product-key top-k against its reference, by hand, and under JAX's transformations."""

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

from kernels_pallas.product_key_top_k import product_key_top_k, xla
from kernels_pallas.product_key_top_k.reference import product_key_top_k_reference

DIFFERENTIABLE = ("query", "keys", "cores")


def make_inputs(
    num_tokens: int = 7,
    num_keys: int = 20,
    num_heads: int = 2,
    rank: int = 2,
    num_cores: int = 2,
    key_dim: int = 4,
    query_heads: int | None = None,
    query_ranks: int | None = None,
    second_value: float = 0.15,
    integers: bool = False,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Random arguments of the operator, by name; without cores, scores are additive.

    The sum of a head's cores has the singular value 2, to which u and v belong; its other singular
    values are `second_value`. With `integers`, every sum is exact, so scores do not depend on how
    they are computed, and many of them are equal.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape) if integers else rng.normal(size=shape)

    query_shape = (query_heads or num_heads, 2, query_ranks or rank, num_tokens, key_dim)
    arrays: dict[str, Any] = {
        "query": normal(*query_shape),
        "keys": normal(num_heads, 2, rank, num_keys, key_dim),
        "u": None,
        "v": None,
        "cores": None,
    }
    if num_cores:
        left, right = (np.linalg.qr(rng.normal(size=(num_heads, rank, rank)))[0] for _ in range(2))
        core = left * ([2.0] + [second_value] * (rank - 1)) @ right.swapaxes(1, 2)
        arrays["u"], arrays["v"] = left[..., 0], right[..., 0]
        parts = rng.normal(size=(num_cores, num_heads, rank, rank))
        arrays["cores"] = parts + (core - parts.sum(axis=0)) / num_cores
        if integers:
            for name in ("u", "v", "cores"):
                arrays[name] = np.round(2 * arrays[name])
    return {name: None if x is None else jnp.asarray(x, dtype) for name, x in arrays.items()}


def results_and_grads(
    function: Callable[..., Any], inputs: dict[str, Any], **options: Any
) -> dict[str, Array]:
    """Scores, addresses and the gradients of a weighted sum of scores, by name."""
    arrays = {name: inputs[name] for name in DIFFERENTIABLE if inputs[name] is not None}
    others = {name: value for name, value in inputs.items() if name not in arrays}

    def loss(arrays: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        scores, addresses = function(**others | arrays, **options)
        weights = jnp.cos(jnp.arange(scores.size, dtype=scores.dtype)).reshape(scores.shape)
        return jnp.sum(scores * weights), (scores, addresses)

    (_, results), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"scores": results[0], "addresses": results[1], **grads}


def assert_all_close(
    got: dict[str, Array], expected: dict[str, Array], tolerance: float = 1e-5
) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        got_array, want_array = (np.asarray(x, np.float64) for x in (got[name], want))
        assert np.isfinite(want_array).all(), name
        if name == "addresses":
            np.testing.assert_array_equal(got_array, want_array)
        else:
            scale = max(1.0, np.abs(want_array).max())
            np.testing.assert_allclose(
                got_array, want_array, rtol=tolerance, atol=tolerance * scale, err_msg=name
            )


def assert_matches_reference(
    inputs: dict[str, Any],
    *,
    top_m: int,
    shortlist: int,
    chunk_size: int | None = None,
    tolerance: float = 1e-5,
) -> None:
    sizes = {"top_m": top_m, "shortlist": shortlist}
    expected = results_and_grads(product_key_top_k_reference, inputs, **sizes)
    got = results_and_grads(product_key_top_k, inputs, **sizes, chunk_size=chunk_size)
    assert_all_close(got, expected, tolerance)


def staircase_and_grid(
    inputs: dict[str, Any], *, top_m: int, shortlist: int
) -> tuple[Array, Array, Array]:
    """Selections by staircase, which tokens of these are doubtful, and selections by full grid."""
    additive = inputs["cores"] is None
    staircase = xla._Staircase(shortlist, top_m * (1 if additive else xla.TUCKER_REACH))
    assert len(staircase.places) < xla.MAX_INSIDE_FRACTION * shortlist**2

    @jax.jit
    def run(inputs: dict[str, Any]) -> tuple[Array, Array, Array]:
        query, dtype = jnp.moveaxis(inputs["query"], 3, 0), jnp.dtype(jnp.float32)
        scores = xla._key_scores(query, inputs["keys"], dtype)
        _, rows = xla._shortlist(scores[:, 0], inputs["u"], shortlist)
        _, columns = xla._shortlist(scores[:, 1], inputs["v"], shortlist)
        rows = rows if additive else xla._times_core(rows, inputs["cores"])
        found, doubtful = xla._search(staircase, rows, columns, additive, top_m)
        return found, doubtful, xla.best(xla._full_grid(rows, columns, additive), top_m)

    return run(inputs)


def test_additive_scores_of_two_tokens_by_hand() -> None:
    # Row keys score 1, 2, 4 and column keys 10, 20, 25; the second token negates them.
    keys = jnp.array([[1.0, 2.0, 4.0], [10.0, 20.0, 25.0]])[None, :, None, :, None]
    query = jnp.array([[1.0, -1.0], [1.0, -1.0]])[None, :, None, :, None]
    scores, addresses = product_key_top_k(query, keys, None, None, None, top_m=3, shortlist=2)
    np.testing.assert_array_equal(scores[..., 0], [[29, 27, 24], [-11, -12, -21]])
    np.testing.assert_array_equal(addresses, [[8, 5, 7], [0, 3, 1]])


def test_tucker_scores_by_hand() -> None:
    # By rank, row keys are (1, 0), (0, 1), (1, 1) and column keys (1, 0), (0, 1), (2, 0).
    rows = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    columns = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    keys = jnp.stack([rows, columns])[None, ..., None]
    cores = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]])[:, None]
    first = jnp.array([[1.0, 0.0]])
    query = jnp.ones((1, 2, 2, 1, 1))
    # u and v exclude row 1 and column 1, whose pair would be among the best.
    scores, addresses = product_key_top_k(query, keys, first, first, cores, top_m=2, shortlist=2)
    np.testing.assert_array_equal(addresses, [[0 * 3 + 2, 2 * 3 + 2]])
    np.testing.assert_array_equal(scores, [[[2.0, 0.0], [2.0, 0.0]]])
    # With both ranks in the shortlist, pair (2, 1) wins by its second core, followed by (1, 1).
    both = jnp.array([[1.0, 1.0]])
    scores, addresses = product_key_top_k(query, keys, both, both, cores, top_m=3, shortlist=3)
    np.testing.assert_array_equal(addresses, [[2 * 3 + 1, 1 * 3 + 1, 2 * 3 + 2]])
    np.testing.assert_array_equal(scores, [[[0.0, 5.0], [0.0, 5.0], [2.0, 0.0]]])


@pytest.mark.slow(fast=["{}-", "'rank': 1, 'num_cores': 0}", "'num_keys': 1"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, {"top_m": 5, "shortlist": 6}),
        ({"rank": 1, "num_cores": 1}, {"top_m": 20, "shortlist": 16}),
        ({"rank": 3, "num_cores": 3, "num_heads": 1}, {"top_m": 17, "shortlist": 19}),
        ({"num_heads": 3, "query_heads": 1}, {"top_m": 24, "shortlist": 20}),
        ({"query_ranks": 1}, {"top_m": 1, "shortlist": 1}),
        ({"query_heads": 1, "query_ranks": 1}, {"top_m": 16, "shortlist": 4}),
        ({"rank": 1, "num_cores": 0}, {"top_m": 20, "shortlist": 16}),
        ({"rank": 1, "num_cores": 0, "query_heads": 1}, {"top_m": 36, "shortlist": 6}),
        ({"num_tokens": 1}, {"top_m": 12, "shortlist": 12}),
        ({"num_keys": 1, "num_tokens": 2}, {"top_m": 1, "shortlist": 1}),
    ],
    ids=str,
)
def test_every_shape_matches_the_reference(shape: dict[str, Any], sizes: dict[str, int]) -> None:
    assert_matches_reference(make_inputs(**shape), **sizes, chunk_size=3)
    assert_matches_reference(make_inputs(**shape, integers=True), **sizes)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float64_matches_the_reference_to_float64_precision() -> None:
    inputs = make_inputs(num_tokens=33, num_keys=60, dtype=jnp.float64)
    assert_matches_reference(inputs, top_m=40, shortlist=40, chunk_size=8, tolerance=1e-12)
    scores, addresses = product_key_top_k(**inputs, top_m=4, shortlist=4)
    assert (scores.dtype, addresses.dtype) == (jnp.float64, jnp.int32)


@pytest.mark.slow
def test_bfloat16_arrays_match_the_reference_in_float32() -> None:
    inputs = make_inputs(integers=True)
    halves = {name: inputs[name].astype(jnp.bfloat16) for name in ("query", "keys")}
    # Gradients are rounded to bfloat16 once, from float32 sums that may differ in the last bit.
    sizes: dict[str, Any] = {"top_m": 8, "shortlist": 10}
    assert_matches_reference(inputs | halves, **sizes, chunk_size=2, tolerance=2**-7)
    scores, addresses = product_key_top_k(**inputs | halves, **sizes)
    expected = product_key_top_k(**inputs, **sizes)
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(addresses, expected[1])


@pytest.mark.parametrize("num_cores", [0, 2])
def test_ties_match_the_reference(num_cores: int) -> None:
    rank = 2 if num_cores else 1
    sizes: dict[str, Any] = {"top_m": 9, "shortlist": 12}
    inputs = make_inputs(3, 15, 1, rank, num_cores, key_dim=1, integers=True)
    numbers = 2 * rank * (3 + 15)

    @jax.jit
    def got_and_expected(entries: Array) -> tuple[Any, Any]:
        query, keys = jnp.split(entries, [2 * rank * 3])
        arrays = {
            "query": query.reshape(inputs["query"].shape),
            "keys": keys.reshape(inputs["keys"].shape),
        }
        got = product_key_top_k(**inputs | arrays, **sizes, chunk_size=2)
        return got, product_key_top_k_reference(**inputs | arrays, **sizes)

    @given(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), min_size=numbers, max_size=numbers)
    )
    def check(entries: list[float]) -> None:
        got, expected = got_and_expected(jnp.asarray(entries, jnp.float32))
        np.testing.assert_array_equal(got[1], expected[1])
        np.testing.assert_array_equal(got[0], expected[0])

    check()


@pytest.mark.slow
def test_equal_scores_select_the_first_pairs_without_a_fallback() -> None:
    inputs = make_inputs(num_keys=40) | {"query": jnp.zeros((2, 2, 2, 7, 4))}
    scores, addresses = product_key_top_k(**inputs, top_m=40, shortlist=30)
    expected = [*range(30), *range(40, 50)]
    np.testing.assert_array_equal(addresses, np.tile(expected, (7, 2)))
    np.testing.assert_array_equal(scores, 0)
    _, doubtful, _ = staircase_and_grid(inputs, top_m=40, shortlist=30)
    assert not doubtful.any()


def test_zeros_of_both_signs_are_equal() -> None:
    keys = jnp.array([[-0.0, 0.0], [0.0, -0.0]])[None, :, None, :, None]
    inputs = (jnp.ones((1, 2, 1, 1, 1)), keys, None, None, None)
    _, addresses = product_key_top_k(*inputs, top_m=4, shortlist=2)
    np.testing.assert_array_equal(addresses, [[0, 1, 2, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("second_value", [0.15, 1.0, 8.0])
def test_doubtful_tokens_are_selected_from_the_full_grid(second_value: float) -> None:
    sizes = {"top_m": 20, "shortlist": 30}
    inputs = make_inputs(64, 50, second_value=second_value)
    found, doubtful, full = staircase_and_grid(inputs, **sizes)
    wrong = np.any(np.asarray(found != full), axis=1)
    assert not np.any(wrong & ~np.asarray(doubtful))
    assert wrong.mean() < 0.1 if second_value < 1 else wrong.mean() > 0.1
    for chunk_size in (64, 4):
        assert_matches_reference(inputs, **sizes, chunk_size=chunk_size)


def test_a_single_doubtful_token_is_selected_again() -> None:
    # Only token 3 has a component in the second rank, which the shortlist ignores.
    sizes = {"top_m": 4, "shortlist": 16}
    inputs = make_inputs(40, 24, num_heads=1, num_cores=1, key_dim=1, query_ranks=2, seed=1)
    query = inputs["query"].at[:, :, 1].set(0.0).at[:, :, 1, 3].set(3.0)
    first = jnp.array([[1.0, 0.0]])
    inputs |= {"query": query, "u": first, "v": first, "cores": jnp.eye(2)[None, None]}
    found, doubtful, full = staircase_and_grid(inputs, **sizes)
    np.testing.assert_array_equal(np.flatnonzero(doubtful), [3])
    np.testing.assert_array_equal(np.flatnonzero((found != full).any(axis=1)), [3])
    assert_matches_reference(inputs, **sizes, chunk_size=40)


def test_a_tie_outside_the_staircase_goes_to_the_earlier_pair() -> None:
    # Integers and two equal singular values give many ties, anywhere in the grid.
    sizes = {"top_m": 4, "shortlist": 16}
    inputs = make_inputs(32, 24, num_heads=1, key_dim=1, integers=True, seed=3, second_value=2.0)
    found, _, full = staircase_and_grid(inputs, **sizes)
    assert np.any(found != full)
    assert_matches_reference(inputs, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("num_cores", [0, 2])
@pytest.mark.parametrize("bad", [np.nan, -np.nan])
def test_a_key_that_scores_nan_is_chosen_and_its_nan_returned(num_cores: int, bad: float) -> None:
    rank = 2 if num_cores else 1
    inputs = make_inputs(num_keys=40, rank=rank, num_cores=num_cores)
    inputs["keys"] = inputs["keys"].at[0, 0, 0, 17, 0].set(bad)
    sizes: dict[str, Any] = {"top_m": 20, "shortlist": 30}
    scores, addresses = product_key_top_k(**inputs, **sizes, chunk_size=2)
    expected = product_key_top_k_reference(**inputs, **sizes)
    np.testing.assert_array_equal(addresses, expected[1])
    np.testing.assert_array_equal(np.isnan(scores), np.isnan(expected[0]))
    assert np.isnan(scores[:, :20]).all()  # first head: pairs of row key 17
    assert np.isfinite(scores[:, 20:]).all()
    np.testing.assert_array_equal(addresses[:, :20] // 40, 17)


def test_infinities_of_both_signs_give_a_nan_that_is_returned() -> None:
    keys = np.stack([np.arange(12.0), np.arange(12.0)])
    keys[0, 3], keys[1, 5] = np.inf, -np.inf
    table = jnp.asarray(keys[None, :, None, :, None], jnp.float32)
    inputs = (jnp.ones((1, 2, 1, 1, 1)), table, None, None, None)
    scores, addresses = product_key_top_k(*inputs, top_m=12, shortlist=12)
    assert np.isnan(scores[0, 0, 0])
    assert addresses[0, 0] == 3 * 12 + 5


@pytest.mark.slow(fast=["0"])
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_cores", [0, 2])
def test_gradients_match_finite_differences(num_cores: int) -> None:
    rank = 2 if num_cores else 1
    inputs = make_inputs(3, 9, 1, rank, num_cores, dtype=jnp.float64)
    names = [name for name in DIFFERENTIABLE if inputs[name] is not None]
    arrays = [inputs.pop(name) for name in names]

    @jax.jit
    def function(*arrays: Array) -> Array:
        named: dict[str, Any] = dict(zip(names, arrays, strict=True))
        return product_key_top_k(**inputs | named, top_m=4, shortlist=5, chunk_size=2)[0]

    check_grads(function, arrays, order=1, modes=["rev"], rtol=1e-6, eps=1e-5)


def test_singular_vectors_have_no_gradient() -> None:
    inputs = make_inputs()

    def total(u: Array, v: Array) -> Array:
        return product_key_top_k(**inputs | {"u": u, "v": v}, top_m=4, shortlist=5)[0].sum()

    for grad in jax.grad(total, (0, 1))(inputs["u"], inputs["v"]):
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.slow(fast=["1"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunked_equals_unchunked_though_only_one_loops(chunk_size: int) -> None:
    inputs, sizes = make_inputs(), {"top_m": 12, "shortlist": 12}

    def jaxpr(chunk_size: int) -> str:
        options = sizes | {"chunk_size": chunk_size}
        return str(
            jax.make_jaxpr(lambda: results_and_grads(product_key_top_k, inputs, **options))()
        )

    assert "scan[" in jaxpr(chunk_size)
    assert "scan[" not in jaxpr(7)
    chunked = results_and_grads(product_key_top_k, inputs, **sizes, chunk_size=chunk_size)
    assert_all_close(chunked, results_and_grads(product_key_top_k, inputs, **sizes, chunk_size=7))


@pytest.mark.slow
def test_vmap_equals_a_python_loop() -> None:
    shared = make_inputs(num_keys=30)
    batch = jnp.stack([make_inputs(seed=seed, second_value=1.0)["query"] for seed in (1, 2)])

    @jax.jit
    def results(query: Array) -> dict[str, Array]:
        options = {"top_m": 12, "shortlist": 16, "chunk_size": 3}
        return results_and_grads(product_key_top_k, shared | {"query": query}, **options)

    looped = [results(query) for query in batch]
    assert not np.array_equal(looped[0]["addresses"], looped[1]["addresses"])
    stacked = {name: jnp.stack([result[name] for result in looped]) for name in looped[0]}
    assert_all_close(jax.vmap(results)(batch), stacked)


@pytest.mark.slow
def test_scan_over_layers_with_checkpoint_equals_a_python_loop() -> None:
    inputs = make_inputs(num_heads=1)
    keys = jnp.stack([inputs.pop("keys"), make_inputs(num_heads=1, seed=1)["keys"]])
    query = inputs.pop("query")

    def layer(query: Array, keys: Array) -> tuple[Array, None]:
        scores, _ = product_key_top_k(query, keys, **inputs, top_m=12, shortlist=12, chunk_size=3)
        return query + 0.01 * scores.sum(axis=(1, 2))[None, None, None, :, None], None

    def scanned(keys: Array, query: Array) -> Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), query, keys)[0] ** 2)

    def looped(keys: Array, query: Array) -> Array:
        for i in range(2):
            query, _ = layer(query, keys[i])
        return jnp.sum(query**2)

    assert "prevent_cse" in str(jax.make_jaxpr(jax.grad(scanned))(keys, query))
    assert "prevent_cse" not in str(jax.make_jaxpr(jax.grad(looped))(keys, query))
    got = jax.jit(jax.grad(scanned, (0, 1)))(keys, query)
    want = jax.jit(jax.grad(looped, (0, 1)))(keys, query)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.slow(fast=["AxisType.Explicit-True-2"])
@pytest.mark.parametrize(
    ("axis_type", "check_vma", "num_cores"),
    [(AxisType.Auto, True, 0), (AxisType.Explicit, True, 2), (AxisType.Explicit, False, 2)],
)
def test_inside_shard_map_replicated_keys_get_the_gradient_of_all_tokens(
    axis_type: AxisType, check_vma: bool, num_cores: int
) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))
    rank = 2 if num_cores else 1
    inputs = make_inputs(4 * jax.device_count(), rank=rank, num_cores=num_cores)
    given = {name: array for name, array in inputs.items() if array is not None}
    sizes: dict[str, Any] = {"top_m": 12, "shortlist": 12}
    tokens = PartitionSpec(None, None, None, "data")
    specs = {name: tokens if name == "query" else PartitionSpec() for name in given}

    def sharded(**arrays: Array | None) -> Any:
        arrays = {name: arrays[name] for name in given}
        return jax.shard_map(
            lambda arrays: product_key_top_k(**inputs | arrays, **sizes, chunk_size=3),
            in_specs=(specs,),
            out_specs=PartitionSpec("data"),
            check_vma=check_vma,
        )(arrays)

    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(given[name], specs[name]) for name in given}
        got = results_and_grads(sharded, inputs | placed)
    assert_all_close(got, results_and_grads(product_key_top_k, inputs, **sizes))


@pytest.mark.slow
def test_memory_is_far_below_that_of_scores_and_grids() -> None:
    num_tokens, num_keys, shortlist = 8192, 360, 32
    inputs = {
        "query": jax.ShapeDtypeStruct((1, 2, 2, num_tokens, 8), jnp.float32),
        "keys": jax.ShapeDtypeStruct((1, 2, 2, num_keys, 8), jnp.float32),
        "u": jax.ShapeDtypeStruct((1, 2), jnp.float32),
        "v": jax.ShapeDtypeStruct((1, 2), jnp.float32),
        "cores": jax.ShapeDtypeStruct((2, 1, 2, 2), jnp.float32),
    }

    def temporary_bytes(function: Callable[..., Any], chunk_size: int) -> int:
        options = {"top_m": shortlist, "shortlist": shortlist, "chunk_size": chunk_size}
        compiled = jax.jit(lambda inputs: function(**inputs, **options)).lower(inputs).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    scores_bytes = num_tokens * 4 * num_keys * 4
    assert temporary_bytes(product_key_top_k, num_tokens) > scores_bytes
    assert temporary_bytes(product_key_top_k, 128) < scores_bytes / 10


@pytest.mark.usefixtures("no_runtime_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": jnp.ones((2, 2, 2, 4))},
            r"query.shape: got \(2, 2, 2, 4\), must be \[num_heads",
        ),
        (
            {"query": jnp.ones((3, 2, 2, 7, 4))},
            r"query.shape: got \(3, .*must be \[2 or 1, 2, 2 or",
        ),
        ({"query": jnp.ones((2, 2, 2, 7, 5))}, "query.shape: .*, 4] to match keys"),
        ({"keys": jnp.ones((2, 2, 2, 20, 4), int)}, "keys.dtype: got int32, must be a floating"),
        ({"keys": jnp.ones((2, 3, 2, 20, 4))}, r"keys.shape\[1\]: got 3, must be 2 \(rows and"),
        ({"u": None}, "u absent, v given, cores given, must be all or none"),
        ({"u": None, "v": None, "cores": None}, r"keys.shape\[2\]: got 2, must be 1 without cores"),
        ({"v": jnp.ones((2, 3))}, r"v.shape: got \(2, 3\), must be .* = \(2, 2\)"),
        (
            {"cores": jnp.ones((2, 2, 2, 3))},
            r"cores.shape\[1:\]: got \(2, 2, 3\), must be .*2, 2\)",
        ),
        ({"cores": jnp.ones((0, 2, 2, 2))}, r"cores.shape\[0\]: got 0, must be at least 1"),
        ({"shortlist": 21}, "shortlist: got 21, must be from 1 to num_keys = 20"),
        ({"top_m": 0}, "top_m: got 0, must be from 1 to shortlist squared = 25"),
        ({"top_m": 26}, "top_m: got 26, must be from 1 to shortlist squared = 25"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', must be None or one of xla"),
        ({"chunk_size": 0}, "chunk_size: got 0, must be at least 1"),
    ],
)
def test_a_wrong_argument_is_reported_with_name_value_and_rule(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        product_key_top_k(**make_inputs() | {"top_m": 4, "shortlist": 5} | changes)


def test_keys_beyond_int32_addresses_are_rejected() -> None:
    inputs = make_inputs(num_cores=0, rank=1)

    def function(keys: Array) -> Any:
        return product_key_top_k(**inputs | {"keys": keys}, top_m=4, shortlist=4)

    largest = jax.ShapeDtypeStruct((2, 2, 1, 46340, 4), jnp.float32)
    assert jax.eval_shape(function, largest)[1].dtype == jnp.int32
    with pytest.raises(ValueError, match=r"keys.shape\[3\]: got 46341, must be at most 46340"):
        jax.eval_shape(function, jax.ShapeDtypeStruct((2, 2, 1, 46341, 4), jnp.float32))
