"""Sharded tables give the same outputs and gradients as replicated ones."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from umv2.kernels import RARE
from umv2.model.memory import exchange

_TOKENS = PartitionSpec("memory")
_TABLES = {
    "replicated": PartitionSpec(),
    "columns": PartitionSpec(None, None, "memory"),
    "rows": PartitionSpec(None, "memory", None),
}
_NUM_TABLES, _NUM_ROWS, _VALUE_DIM, _PRE_VALUE_DIM = 2, 24, 16, 8


def _mesh(size: int) -> Mesh:
    devices = np.asarray(jax.devices()[:size])
    return Mesh(devices, ("memory",), axis_types=(AxisType.Explicit,))


def _arrays(
    *, num_tokens: int, top_m: int = 6, num_cores: int = 1, num_slots: int = 1, pre: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns random arguments: the differentiable ones, and the integers."""
    random = np.random.default_rng(0)
    shape = (num_tokens, top_m)
    tables = (_NUM_TABLES, _NUM_ROWS)
    floats = {
        "values": random.normal(size=(*tables, _VALUE_DIM)),
        "weights": random.normal(size=(*shape, num_cores)),
    }
    if pre:
        floats["pre_values"] = random.normal(size=(*tables, _PRE_VALUE_DIM))
        floats["pre_inputs"] = random.normal(size=(num_tokens, _PRE_VALUE_DIM))
    integers = {"rows": random.integers(0, _NUM_TABLES * _NUM_ROWS, shape)}
    if num_slots > 1:
        integers["slots"] = random.integers(0, num_slots, shape)
    dtype = jax.dtypes.canonicalize_dtype(float)
    return (
        {name: jnp.asarray(array, dtype) for name, array in floats.items()},
        {name: jnp.asarray(array, jnp.int32) for name, array in integers.items()},
    )


def _pool(
    layout: exchange.Layout, floats: dict[str, Any], integers: dict[str, Any], **options: Any
) -> jax.Array:
    options = {"activation": None, "num_slots": 1, "chunk_size": None} | options
    return exchange.aggregate(
        layout,
        floats["values"],
        integers["rows"],
        floats["weights"],
        pre_values=floats.get("pre_values"),
        pre_inputs=floats.get("pre_inputs"),
        slots=integers.get("slots"),
        implementation="auto",
        **({"dtype": floats["values"].dtype} | options),
    )


def _place(layout: exchange.Layout, mesh: Mesh, arrays: dict[str, Any]) -> dict[str, Any]:
    """Shards tables according to the layout, and everything else by tokens."""
    return {
        name: jax.device_put(
            array, NamedSharding(mesh, _TABLES[layout] if "values" in name else _TOKENS)
        )
        for name, array in arrays.items()
    }


def _on_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function of one device's (floats, integers) over all devices of the mesh."""
    return jax.shard_map(function, out_specs=_TOKENS)


def _output_and_gradients(
    layout: exchange.Layout, floats: Any, integers: Any, size: int = 1, **options: Any
) -> tuple[jax.Array, Any]:
    mesh = _mesh(size)
    floats, integers = _place(layout, mesh, floats), _place(layout, mesh, integers)
    pool = _on_devices(functools.partial(_pool, layout, **options))

    @jax.jit
    def run(floats: Any, integers: Any, output_grad: Any) -> tuple[jax.Array, Any]:
        output, vjp = jax.vjp(lambda floats: pool(floats, integers), floats)
        return output, vjp(output_grad.astype(output.dtype))[0]

    shape = (len(floats["weights"]), options["num_slots"] * _VALUE_DIM)
    output_grad = np.random.default_rng(1).normal(size=shape)
    with jax.set_mesh(mesh):
        output_grad = jax.device_put(output_grad, NamedSharding(mesh, _TOKENS))
        return jax.device_get(run(floats, integers, output_grad))


def _assert_same(left: Any, right: Any, tolerance: float) -> None:
    """Compares each array relative to its largest element."""

    def compare(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, left, right)


_CASES = [
    pytest.param(2, {}, None, id="2"),
    pytest.param(4, {"num_cores": 2, "num_slots": 2}, "gelu", id="4, cores, slots, gelu"),
    pytest.param(8, {"num_cores": 2, "pre": False}, None, id="8, cores, no pre-values"),
    pytest.param(2, {"num_cores": 4, "num_slots": 3}, "relu", id="2, more cores than devices"),
    pytest.param(8, {"num_tokens": 8, "top_m": 40, "num_slots": 2}, "silu", id="8, one token each"),
]


@pytest.mark.slow(fast=["4, cores", "2, more"])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize(("size", "sizes", "activation"), _CASES)
def test_sharded_tables_give_the_same_output_and_gradients(
    layout: exchange.Layout, size: int, sizes: dict[str, Any], activation: str | None
) -> None:
    floats, integers = _arrays(**({"num_tokens": 48} | sizes))
    options: dict[str, Any] = {"activation": activation, "num_slots": sizes.get("num_slots", 1)}
    expected = _output_and_gradients("replicated", floats, integers, **options)
    assert all(np.any(grad) for grad in expected[1].values())
    sharded = _output_and_gradients(layout, floats, integers, size, **options)
    _assert_same(sharded, expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_sharded_tables_agree_to_float64_precision(x64: None, layout: exchange.Layout) -> None:
    floats, integers = _arrays(num_tokens=24, num_cores=2, num_slots=2)
    assert floats["values"].dtype == jnp.float64
    options: dict[str, Any] = {"activation": "gelu", "num_slots": 2}
    expected = _output_and_gradients("replicated", floats, integers, **options)
    sharded = _output_and_gradients(layout, floats, integers, 4, **options)
    _assert_same(sharded, expected, 1e-13)


# --- rounds ---


def _num_rounds(rows: jax.Array, size: int) -> int:
    route = functools.partial(
        exchange.route, slots=None, own_rows=_NUM_ROWS // size, num_slots=1, axis="memory"
    )
    mesh = _mesh(size)
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, NamedSharding(mesh, _TOKENS))
        rounds = jax.shard_map(lambda rows: route(rows).num_rounds, out_specs=PartitionSpec())(rows)
    return int(rounds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "skew", "rounds"),
    [
        # Of 24 tokens x 3 pairs of rows, 40 fit into the first round and 8 into a later one.
        pytest.param(8, lambda rows: 0 * rows + 29, 5, id="all select one row"),
        # Of 96 tokens x 2 groups of rows, 160 fit into the first round and 24 into a later one: the
        # first device needs three rounds.
        pytest.param(
            2, lambda rows: jnp.where(jnp.arange(192)[:, None] < 96, rows % 12, rows), 3, id="half"
        ),
    ],
)
def test_overflow_is_sent_in_further_rounds(
    size: int,
    skew: Callable[[jax.Array], jax.Array],
    rounds: int,
) -> None:
    floats, integers = _arrays(num_tokens=192, num_cores=2)
    assert _num_rounds(integers["rows"], size) == 1
    integers["rows"] = skew(integers["rows"])
    assert _num_rounds(integers["rows"], size) == rounds
    options: dict[str, Any] = {"activation": "silu", "num_slots": 1}
    expected = _output_and_gradients("replicated", floats, integers, **options)
    sharded = _output_and_gradients("rows", floats, integers, size, **options)
    _assert_same(sharded, expected, 2e-6)

    # A program without later rounds drops the overflow; afterwards JAX compiles anew.
    with exchange.first_round_only(True):
        output, grads = _output_and_gradients("rows", floats, integers, size, **options)
    for some, every in ((output, sharded[0]), *((grads[name], sharded[1][name]) for name in grads)):
        assert np.abs(some - every).max() > 0.01 * np.abs(every).max()


def test_a_program_of_the_first_round_is_compiled_separately() -> None:
    floats, integers = _arrays(num_tokens=16)
    mesh = _mesh(2)
    pool = jax.jit(_on_devices(functools.partial(_pool, "rows")))
    arguments = _place("rows", mesh, floats), _place("rows", mesh, integers)
    with jax.set_mesh(mesh):
        complete = pool.lower(*arguments).as_text(debug_info=True)
        with exchange.first_round_only(True):
            first = pool.lower(*arguments).as_text(debug_info=True)
        assert pool.lower(*arguments).as_text(debug_info=True) == complete
    assert RARE in complete
    assert RARE not in first
    assert complete.count("stablehlo.all_to_all") == 2 * first.count("stablehlo.all_to_all") > 0


# --- within a model ---


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_tokens_may_be_sharded_over_more_axes_and_layers_scanned(layout: exchange.Layout) -> None:
    # Two replicas and two devices along `tensor` have different tokens and the same tables.
    floats, integers = _arrays(num_tokens=48, num_cores=2, num_slots=2)
    mesh = jax.make_mesh(
        (2, 2, 2), ("replica", "memory", "tensor"), axis_types=(AxisType.Explicit,) * 3
    )
    tokens = PartitionSpec(("replica", "memory", "tensor"))

    def loss(floats: Any, integers: Any, layout: exchange.Layout, pool: Any) -> jax.Array:
        @jax.checkpoint
        def layer(weights: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            pooled = pool(floats | {"weights": weights}, integers)
            return weights * 0.9, jnp.sum(jnp.tanh(pooled) ** 2)

        return jnp.sum(jax.lax.scan(layer, floats["weights"], length=2)[1])

    options: dict[str, Any] = {"activation": "silu", "num_slots": 2}
    pool = functools.partial(_pool, "replicated", **options)
    expected = jax.jit(jax.value_and_grad(lambda f, i: loss(f, i, "replicated", pool)))(
        floats, integers
    )
    pool = jax.shard_map(functools.partial(_pool, layout, **options), out_specs=tokens)
    with jax.set_mesh(mesh):
        placed = [
            {
                name: jax.device_put(
                    array, NamedSharding(mesh, _TABLES[layout] if "values" in name else tokens)
                )
                for name, array in arrays.items()
            }
            for arrays in (floats, integers)
        ]
        sharded = jax.jit(jax.value_and_grad(lambda f, i: loss(f, i, layout, pool)))(*placed)
    assert "memory" in jax.typeof(sharded[1]["values"]).sharding.spec
    _assert_same(jax.device_get(sharded), jax.device_get(expected), 2e-6)


@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_floating_point_arrays_are_exchanged_in_the_compute_dtype(layout: exchange.Layout) -> None:
    floats, integers = _arrays(num_tokens=16, num_cores=2, num_slots=2)
    options: dict[str, Any] = {"num_slots": 2, "dtype": jnp.bfloat16}
    output, grads = _output_and_gradients(layout, floats, integers, 4, **options)
    expected = _output_and_gradients("replicated", floats, integers, num_slots=2)
    _assert_same((output, grads), expected, 3e-2)
    assert {x.dtype for x in jax.tree.leaves((output, grads))} == {np.dtype("float32")}

    mesh = _mesh(4)
    pool = _on_devices(functools.partial(_pool, layout, **options))
    arguments = _place(layout, mesh, floats), _place(layout, mesh, integers)
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda floats, integers: jnp.sum(jnp.sin(pool(floats, integers)))))
        text = grad.lower(*arguments).as_text()
    kinds = r"stablehlo\.(all_gather|reduce_scatter|all_to_all)"
    exchanged = re.findall(kinds + r".*?: \(tensor<[\dx]*x(\w+)>\) -> ", text, re.DOTALL)
    assert len(exchanged) >= 8
    assert {dtype for _, dtype in exchanged} - {"ui8"} == {"bf16", "i32"}  # slots are bytes


def test_only_the_gradients_of_tables_are_scattered_into() -> None:
    # Groups are sent and summed by gathers, in both directions.
    floats, integers = _arrays(num_tokens=16, num_cores=2, num_slots=2)
    mesh = _mesh(4)
    pool = _on_devices(functools.partial(_pool, "rows", num_slots=2))
    arguments = _place("rows", mesh, floats), _place("rows", mesh, integers)
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda floats, integers: jnp.sum(jnp.sin(pool(floats, integers)))))
        text = grad.lower(*arguments).as_text()
    scatters = r'"stablehlo\.scatter".*?\) -> tensor<([\dx]*)xf32>'
    own_rows = _NUM_TABLES * _NUM_ROWS // 4
    tables = {f"{own_rows}x{_VALUE_DIM}", f"{own_rows}x{_PRE_VALUE_DIM}"}
    assert set(re.findall(scatters, text, re.DOTALL)) == tables


# --- sizes ---


@pytest.mark.parametrize(
    ("num_tokens", "top_m", "size"), [(4096, 128, 64), (4096, 32, 4), (256, 128, 16), (8, 128, 16)]
)
def test_random_rows_take_one_round(num_tokens: int, top_m: int, size: int) -> None:
    groups = exchange.groups(num_tokens, top_m, 1, size)
    random = np.random.default_rng(0)
    for _ in range(4):
        owners = random.integers(size, size=(num_tokens, top_m))
        counts = np.stack([np.sum(owners == owner, axis=1) for owner in range(size)])
        assert np.max(np.sum(-(-counts // groups.size), axis=1)) <= groups.capacity
    # An eighth more capacity than an even load needs, or more for small ones.
    even = np.mean(np.sum(-(-counts // groups.size), axis=1))
    assert 1.1 * even < groups.capacity < 1.2 * even or even < 1600


@pytest.mark.parametrize(("top_m", "size"), [(32, 8), (128, 64), (128, 4), (256, 128), (32, 512)])
def test_the_group_size_balances_padding_against_the_number_of_groups(
    top_m: int, size: int
) -> None:
    owners = np.random.default_rng(0).integers(size, size=(1000, top_m))
    counts = np.stack([np.sum(owners == owner, axis=1) for owner in range(size)])

    def traffic(group: int) -> float:
        """In units of the traffic of a row."""
        return np.sum(-(-counts // group)) * (group + 4)

    chosen = exchange.groups(1000, top_m, 1, size).size
    others = (1, 2, *range(4, top_m + 1, 4))
    assert traffic(chosen) <= 1.01 * min(map(traffic, others))
    assert traffic(chosen) < 0.9 * max(map(traffic, others))


def test_sizes_that_do_not_divide_the_tables_are_rejected_with_a_suggestion() -> None:
    assert exchange.column_fault(768, 384, 2, 64) is None
    assert exchange.column_fault(768, 384, 2, 1) is None
    assert exchange.column_fault(768, 0, 1, 256) is None
    fault = exchange.column_fault(480, 160, 2, 64)
    assert fault == (
        "must divide value_dim=480 and pre_value_dim=160, and be a divisor or a multiple of"
        " num_cores=2; 80 would do"
    )
    # 4 of 6 cores would need 1.5 slices of the row.
    assert exchange.column_fault(48, 0, 6, 4) is not None
    assert exchange.column_sizes(48, 0, 6) == [1, 2, 3, 6, 12, 24, 48]
    assert exchange.row_fault(129_600, 64) is None
    assert exchange.row_fault(36, 8) == "must divide the 36 rows of a table; 9 would do"
