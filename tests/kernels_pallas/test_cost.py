"""The FLOPs and bytes that each kernel declares, against sums written out by hand.

The sums name their terms in the order in which the kernel reads and writes the arrays.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import use_abstract_mesh

from kernels_pallas import compat, product_key_top_k, row_products, value_aggregation
from kernels_pallas.common import tiled_bytes
from kernels_pallas.table_gradient.gpu import backend as table_gradient_gpu
from kernels_pallas.value_aggregation.gpu import backend as aggregation_gpu
from kernels_pallas.value_aggregation.gpu.tokens import Blocks
from tests.kernels_pallas.aot import run_cases
from tests.kernels_pallas.value_aggregation.test_sparsecore import mesh_of

# FLOPs, transcendentals and bytes of a kernel.
Cost = tuple[int, int, int]

INT, BFLOAT = jnp.int32, jnp.bfloat16


def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, also inside those of its calls, but not inside kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name not in ("pallas_call", "mpmd_map"):
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


def declared(function: Callable[..., Any], *arguments: Any) -> list[tuple[str, Cost]]:
    """Name and cost of each kernel of a function, in order."""
    found = []
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name not in ("pallas_call", "mpmd_map"):
            continue
        params = equation.params
        if params["cost_estimate"] is None:  # Mosaic GPU of jax 0.11
            cost = json.loads(equation.ctx.xla_metadata[compat.COST_NAME])
        else:
            cost = vars(params["cost_estimate"])
        name = params.get("name") or params["name_and_src_info"].name
        found.append((name, (cost["flops"], cost["transcendentals"], cost["bytes_accessed"])))
    return found


def gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's output and its gradients by all floating-point arguments."""

    def both(arguments: dict[str, Any]) -> Any:
        floats = {n: x for n, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        output, pullback = jax.vjp(lambda floats: function(**arguments | floats), floats)
        return output, pullback(jax.tree.map(jnp.ones_like, output))

    return both


def aggregation_inputs(
    num_tokens: int,
    num_selected: int,
    value_dim: int,
    pre_value_dim: int,
    num_values: int,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Shapes of the arguments of value aggregation with two cores."""
    return {
        "values": shaped((num_values, value_dim), dtype),
        "indices": shaped((num_tokens, num_selected), INT),
        "scores": shaped((num_tokens, num_selected, 2)),
        "pre_values": shaped((num_values, pre_value_dim), dtype),
        "pre_inputs": shaped((num_tokens, pre_value_dim)),
    }


def aggregate(**options: Any) -> Callable[..., Any]:
    return lambda **arguments: value_aggregation(**arguments, activation="gelu", **options)


def top_k_inputs() -> dict[str, Any]:
    """Two heads that share queries, rank 2, 16 tokens, 20 keys of dim 24, two cores."""
    return {
        "query": shaped((1, 2, 1, 16, 24)),
        "keys": shaped((2, 2, 2, 20, 24)),
        "u": shaped((2, 2)),
        "v": shaped((2, 2)),
        "cores": shaped((2, 2, 2, 2)),
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "want"),
    [
        ((9, 129), jnp.float32, 16 * 256 * 4),
        ((3, 5, 128), jnp.float32, 3 * 8 * 128 * 4),
        ((2, 3, 128), jnp.float32, 2 * 4 * 128 * 4),
        ((1, 200), jnp.float32, 256 * 4),
        ((9, 128), BFLOAT, 16 * 128 * 2),
        ((1, 128), BFLOAT, 2 * 128 * 2),
        ((129,), jnp.float32, 256 * 4),
        ((300,), jnp.float32, 512 * 4),
        ((1500,), jnp.float32, 2048 * 4),
    ],
    ids=str,
)
def test_arrays_in_the_memory_of_a_tpu_are_padded_to_tiles(
    shape: tuple[int, ...], dtype: Any, want: int
) -> None:
    # The wanted sizes are those that XLA reports for arguments of these shapes on a v5e.
    assert tiled_bytes(shaped(shape, dtype)) == want


def test_value_aggregation_on_tpu() -> None:
    inputs = aggregation_inputs(16, 8, value_dim=192, pre_value_dim=64, num_values=1000)
    function = aggregate(implementation="pallas_tpu", platform="tpu")
    # 128 selections; the rows of both tables take 256 and 128 columns.
    rows = 128 * (1024 + 512)
    ids, scores, pre_inputs, output = 4096, 2 * 4096, 16 * 512, 16 * 1024
    visits = 4 * 512
    assert declared(gradients(function), inputs) == [
        (
            "value_aggregation_forward",
            (2 * 128 * (192 + 64), 128, rows + ids + scores + pre_inputs + output),
        ),
        (
            "value_aggregation_backward",
            (
                2 * 128 * (192 + 64 + 64),
                128,
                rows + ids + scores + pre_inputs + output  # the latter: its gradient
                + scores + scores + ids + pre_inputs,  # of scores, weights, of pre-scores, -inputs
            ),
        ),
        (
            "value_aggregation_row_sums",  # rows, tokens and two weights; factors; the table
            (2 * 128 * 192, 0, visits + 4 * 512 + 16 * 1024 + 1000 * 1024),
        ),
        (
            "value_aggregation_row_sums",
            (2 * 128 * 64, 0, visits + 3 * 512 + 16 * 512 + 1000 * 512),
        ),
    ]  # fmt: skip


def test_packed_rows_on_tpu() -> None:
    inputs = aggregation_inputs(32, 8, value_dim=192, pre_value_dim=320, num_values=40)
    function = aggregate(implementation="pallas_tpu", platform="tpu")

    def bytes_accessed(dtype: Any) -> int:
        tables = {name: shaped(inputs[name].shape, dtype) for name in ("values", "pre_values")}
        ((_, (_, _, found)),) = declared(lambda x: function(**x), inputs | tables)
        return found

    # 256 selections; ids, scores, pre-inputs, output.
    others = 4096 + 2 * 4096 + 32 * 1536 + 32 * 1024
    assert bytes_accessed(jnp.float32) == 256 * (1024 + 1536) + others
    # The second 64 columns of pre-values take another register of words.
    assert bytes_accessed(BFLOAT) == 256 * (512 + 1024) + others


def test_table_gradient_in_several_sweeps_on_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels_pallas.table_gradient.tpu import backend

    monkeypatch.setattr(backend, "heuristic", lambda *sizes: backend.Blocks(512, 128, 1))
    indices, weights = shaped((16, 8), INT), shaped((16, 8, 1))

    def sums(indices: Any, weights: Any, factors: Any) -> Any:
        ids, tokens, columns = backend._sort_selections(indices, [backend.Term(weights, factors)])
        return backend.sum_by_row(ids, tokens, columns[0], factors, 1000, jnp.float32)

    # Two groups of 128 columns and two parts of 512 rows: factors are read for each group and part.
    visits, selections, factors = 4 * 512, 3 * 512, 2 * 16 * 512
    want = (2 * 128 * 192, 0, visits + 2 * selections + 2 * factors + 1000 * 1024)
    assert declared(sums, indices, weights, shaped((16, 192))) == [
        ("value_aggregation_row_sums", want)
    ]


def test_row_products_on_tpu() -> None:
    arrays = shaped((1000, 192)), shaped((16, 8), INT), shaped((16, 192))

    def function(*arrays: Any) -> Any:
        return row_products(*arrays, implementation="pallas_tpu", platform="tpu")

    # 128 rows, ids, scores (unused), inputs, products.
    want = (2 * 128 * 192, 0, 128 * 1024 + 4096 + 4096 + 16 * 1024 + 4096)
    assert declared(function, *arrays) == [("value_aggregation_backward", want)]


def test_value_aggregation_on_sparsecores() -> None:
    inputs = aggregation_inputs(16, 6, 72, 136, num_values=1000, dtype=BFLOAT)
    function = aggregate(implementation="pallas_sparsecore")
    with use_abstract_mesh(mesh_of("TPU v5")):
        found = declared(gradients(function), inputs)[:2]
    # 96 selections. In granules of 32 bytes: rows of 144 and 272, six ids or scores.
    rows = 96 * (160 + 288)
    ids, scores, pre_inputs, output = 16 * 32, 16 * 2 * 32, 16 * 544, 16 * 288
    assert found == [
        (
            "value_aggregation_forward",
            (2 * 96 * (72 + 136), 96, rows + ids + scores + pre_inputs + output),
        ),
        (
            "value_aggregation_backward",
            (
                2 * 96 * (72 + 136 + 136),
                96,
                rows + ids + scores + pre_inputs + output + scores + scores + ids + pre_inputs,
            ),
        ),
    ]


def test_value_aggregation_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation_gpu, "heuristic", lambda *sizes: Blocks(4, 2, 2))
    gradient_blocks = table_gradient_gpu.Blocks(16, 4, 2)
    monkeypatch.setattr(table_gradient_gpu, "heuristic", lambda *sizes: gradient_blocks)
    inputs = aggregation_inputs(3, 14, value_dim=12, pre_value_dim=8, num_values=40)
    function = aggregate(implementation="pallas_gpu", platform="gpu")
    # Per token, four steps of four selections in two splits. Rows of 48 bytes lie in two sectors.
    rows = 3 * 16 * (64 + 32 + 4 + 2 * 4)  # with ids and scores
    pre_inputs, output = 3 * 32, 3 * 48
    per_selection = 3 * 14 * 4
    joins = ("value_aggregation_join_slices", (0, 0, 3 * 16))
    assert declared(gradients(function), inputs) == [
        (
            "value_aggregation_forward",
            (2 * 42 * (12 + 8), 42, rows + 2 * pre_inputs + 2 * output),
        ),
        (
            "value_aggregation_backward",
            (
                2 * 42 * (12 + 8 + 8),
                42,
                rows + 2 * pre_inputs + 2 * output  # the latter: its gradient
                + 2 * per_selection + 2 * per_selection + per_selection + 2 * pre_inputs,
            ),
        ),
        # 42 selections in three slices of 16: row, token and weights; each factor once, from the L2
        # cache later on; at most 40 rows.
        (
            "value_aggregation_sum_slices",
            (2 * 48 * 12, 0, 48 * (4 + 4 + 8) + 3 * 64 + 40 * 64 + 3 * 16),
        ),
        joins,
        (
            "value_aggregation_sum_slices",
            (2 * 48 * 8, 0, 48 * (4 + 4 + 4) + 3 * 32 + 40 * 32 + 3 * 16),
        ),
        joins,
    ]  # fmt: skip


def test_row_products_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation_gpu, "heuristic", lambda *sizes: Blocks(4, 2, 1))
    arrays = shaped((40, 16), BFLOAT), shaped((3, 8), INT), shaped((3, 16))

    def function(*arrays: Any) -> Any:
        return row_products(*arrays, implementation="pallas_gpu", platform="gpu")

    want = (2 * 24 * 16, 0, 24 * (32 + 4 + 4) + 3 * 64 + 24 * 4)
    assert declared(function, *arrays) == [("value_aggregation_backward", want)]


def test_product_key_top_k_on_tpu() -> None:
    def function(**arguments: Any) -> Any:
        options: dict[str, Any] = {"implementation": "pallas_tpu", "platform": "tpu"}
        return product_key_top_k(**arguments, top_m=4, shortlist=5, **options)[0]

    # In tiles: 24 columns take 128; four pairs take four rows.
    query, keys = 2 * 16 * 512, 8 * 24 * 512
    scores, addresses, chosen = 4 * 4 * 512, 2 * 4 * 512, 8 * 4 * 512
    blocks, weights, cores = 512, 512, 512
    # The heads share queries, so each head reads them.
    read = keys + 2 * query
    products = 16 * 2 * 2 * 2 * 20 * 24
    assert declared(gradients(function), top_k_inputs()) == [
        (
            "product_key_top_k_forward",
            (2 * products, 0, read + blocks + weights + cores + scores + addresses + chosen),
        ),
        (
            "product_key_top_k_backward",
            (
                4 * products,
                0,
                addresses + chosen + scores + read + cores
                + 2 * query + keys + 4 * 8 * 512 * 4,  # cores: by head, side, entry and token
            ),
        ),
    ]  # fmt: skip


def test_product_key_top_k_in_several_tiles_on_tpu() -> None:
    inputs = top_k_inputs() | {"query": shaped((2, 2, 2, 1100, 24))}

    def function(**arguments: Any) -> Any:
        options: dict[str, Any] = {"implementation": "pallas_tpu", "platform": "tpu"}
        return product_key_top_k(**arguments, top_m=4, shortlist=5, **options)[0]

    # 1100 tokens: two tiles of 1024 read the keys; in the backward pass, three of 512.
    query, keys = 8 * 1104 * 512, 8 * 24 * 512
    columns = 9 * 128  # of arrays with tokens along the lanes
    scores, addresses, chosen = (n * 4 * columns * 4 for n in (4, 2, 8))
    small = 512
    products = 1100 * 2 * 2 * 2 * 20 * 24
    assert declared(gradients(function), inputs) == [
        (
            "product_key_top_k_forward",
            (2 * products, 0, 2 * keys + query + 3 * small + scores + addresses + chosen),
        ),
        (
            "product_key_top_k_backward",
            # Each side and rank reads the pairs again.
            (
                4 * products,
                0,
                2 * 2 * (addresses + chosen + scores) + query + keys + small
                + query + keys + 2 * 2 * 2 * 8 * 512 * 4,
            ),
        ),
    ]  # fmt: skip


def test_product_key_top_k_on_gpu() -> None:
    def function(arguments: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"implementation": "pallas_gpu", "platform": "gpu"}
        return product_key_top_k(**arguments, top_m=4, shortlist=5, **options)

    # 16 queries for each side, and 8 times 20 keys padded to 72; both padded to 32 columns. Each is
    # read from device memory once, and from the L2 cache by every thread block.
    read = (2 * 16 + 8 * 72) * 128
    weights, cores, core, places = 8 * 4, 16 * 4, 8 * 4, 32 * 4
    scores, addresses = 16 * 8 * 2 * 4, 16 * 8 * 4
    want = (
        2 * 16 * 2 * 2 * 2 * 20 * 24,
        0,
        read + weights + cores + core + places + scores + addresses,
    )
    assert declared(function, top_k_inputs()) == [("product_key_top_k_forward", want)]


@pytest.mark.slow
def test_compiled_programs_carry_the_costs() -> None:
    sizes = {"num_tokens": 16, "num_selected": 8, "num_cores": 2, "num_values": 1000}
    case = sizes | {"value_dim": 192, "pre_value_dim": 64, "table_dtype": "float32"}
    on_tpu = case | {"topology": "v5p:2x2x1", "activation": "gelu", "what": "forward"}
    on_gpu = {
        "operator": "value_aggregation",
        "implementation": "pallas_gpu",
        "what": "forward",
        "options": {"activation": "gelu"},
        "arguments": {
            "values": ((1000, 192), "float32"),
            "indices": ((16, 8), "int32"),
            "scores": ((16, 8, 2), "float32"),
            "pre_values": ((1000, 64), "float32"),
            "pre_inputs": ((16, 64), "float32"),
        },
    }
    flops = 2 * 128 * (192 + 64)
    # Rows, ids, scores, pre-inputs, output; see the tests above.
    tiled = 128 * (1024 + 512) + 4096 + 2 * 4096 + 16 * 512 + 16 * 1024
    exact = 128 * (768 + 256) + 16 * 32 + 2 * 16 * 32 + 16 * 256 + 16 * 768
    (tensorcore,) = run_cases("tpu_compile.py", on_tpu)
    assert tensorcore["costs"] == [[flops, 128, tiled]]
    (sparsecore,) = run_cases("sparsecore_compile.py", on_tpu)
    assert sparsecore["costs"] == [[flops, 128, exact]]
    (gpu,) = run_cases("gpu_compile.py", on_gpu, compiler="h200")
    assert gpu["costs"] == [[flops, 128, exact]]
