import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parity.common import small_model
from tests.tiny_run import logged
from umv2.interop.tensor_files import InteropError
from umv2.interop.ultramem import QueryLayout, ReleasedMemory, convert_memory
from umv2.model.memory import retrieval
from umv2.model.memory.layer import MemoryLayer
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import ABSTRACT, Buffer
from umv2.model.slots import Observe

GOLDEN = Path(__file__).parents[1] / "golden"
V1, V2 = "ultramem_v1", "ultramem_v2_shared_query_layer0"


def read(case: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """Returns a layer's state dict, the metadata of the file, and its input and output."""
    with np.load(GOLDEN / f"{case}.npz") as file:
        arrays = dict(file)
    prefixes = ("param.", "buffer.")
    state = {n.split(".", 1)[1]: array for n, array in arrays.items() if n.startswith(prefixes)}
    return state, json.loads(str(arrays["meta_json"])), {n: arrays[n] for n in ("x", "y")}


def convert(case: str, **changes: Any) -> ReleasedMemory:
    state, meta, _ = read(case)
    query: QueryLayout = "per_rank" if meta["derived"]["query_mode"] == "per_rank" else "released"
    return convert_memory(state | changes, [""], ["" if case == V1 else "full."], query=query)


def run(converted: ReleasedMemory, case: str) -> np.ndarray:
    """Runs our layer with the converted arrays on the file's input."""
    _, meta, tensors = read(case)
    given, derived = meta["config"], meta["derived"]
    untold = {
        "num_keys": math.isqrt(derived["value_num"]),
        "key_expansion": math.isqrt(derived["groups"]),
        "top_m": given["knn"],
        "shortlist": given["knn"],
        "activation": "gelu" if given.get("mem_use_glu_act") else "none",
    }
    for name in untold.keys() & converted.sizes.keys():
        assert converted.sizes[name] == untold[name]
    config = small_model(
        "float64",
        hidden_size=given["hidden_size"],
        epsilon=given["rms_eps"],
        **untold | converted.sizes,
    )
    graphdef, *states = nnx.split(MemoryLayer(config, init=ABSTRACT), nnx.Param, Buffer)
    arrays = [
        {name: jnp.asarray(a[0]) for name, a in tree.items()}
        for tree in (converted.params, converted.buffers)
    ]
    for state, ours in zip(states, arrays, strict=True):
        expected = nnx.to_pure_dict(state)
        assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in expected.items()}
    tables: dict[str, Any] = jax.tree.map(jnp.asarray, converted.tables)
    store = ValueStore(**tables)
    window = StoreWindow(store=store, start=derived["offset"])
    with jax.default_matmul_precision("highest"):
        layer = nnx.merge(graphdef, *arrays)
        y, _ = layer(jnp.asarray(tensors["x"]), window=window, observe=Observe())
        return np.asarray(y)


@pytest.mark.parametrize(
    ("case", "query"),
    [
        (V1, "shared"),
        (V2, "shared"),
        ("ultramem_v2_shared_query_layer2", "shared"),
        ("ultramem_v2_query_per_rank_layer0", "per_rank"),
        ("ultramem_v2_no_pre", "shared"),
        ("ultramem_v2_key_expand2", "shared"),
        ("ultramem_v2_glu_act", "shared"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_converted_layers_match_the_published_output(case: str, query: str) -> None:
    converted = convert(case)
    assert converted.sizes["query"] == query
    y = read(case)[2]["y"]
    np.testing.assert_allclose(run(converted, case), y, rtol=0, atol=1e-10 * np.abs(y).max())


@pytest.mark.usefixtures("x64")
def test_the_unused_half_of_the_query_is_dropped() -> None:
    state, _, tensors = read(V2)
    with logged() as messages:
        converted = convert(V2)
    assert messages == [
        "query_proj.weight: dropped the second half, which no head reads in the released layout"
    ]
    weight = state["query_proj.weight"]
    assert converted.params["query"].shape == (1, weight.shape[1], len(weight) // 2)
    lower = np.where(np.arange(len(weight))[:, None] >= len(weight) // 2, 7.0, weight)
    same = convert(V2, **{"query_proj.weight": lower})
    np.testing.assert_array_equal(run(same, V2), run(converted, V2))
    # The other half has an effect.
    upper = np.where(np.arange(len(weight))[:, None] < len(weight) // 2, 7.0, weight)
    other = run(convert(V2, **{"query_proj.weight": upper}), V2)
    assert np.abs(other - tensors["y"]).max() > 0.1 * np.abs(tensors["y"]).max()


def test_three_heads_read_all_four_chunks() -> None:
    state, _, _ = read(V2)
    of_three = {
        "keys": np.repeat(state["keys"], 3, axis=0),
        "tucker_core": np.repeat(state["tucker_core"], 3, axis=1),
        "tucker_core_u": np.repeat(state["tucker_core_u"], 3, axis=1),
        "tucker_core_v": np.repeat(state["tucker_core_v"], 3, axis=1),
    }
    with logged() as messages:
        converted = convert(V2, **of_three)
    assert not messages
    assert (converted.sizes["query"], converted.sizes["num_heads"]) == ("released", 3)
    np.testing.assert_array_equal(converted.params["query"][0].T, state["query_proj.weight"])
    with pytest.raises(InteropError, match="at most 4 heads, not 6"):
        convert(V2, **{n: np.repeat(a, 2, axis=int(n != "keys")) for n, a in of_three.items()})


def test_layers_are_found_in_a_complete_state_dict() -> None:
    state, _, _ = read(V1)
    state_dict = {"transformer.wte.weight": np.zeros((3, 2))}
    for i in range(2):
        prefix = f"transformer.blocks.{i}.memory."
        state_dict |= {prefix + name: array + i for name, array in state.items()}
        state_dict[prefix + "shuffle_index"] = state["shuffle_index"]
        # As in the published code.
        cores = state_dict.pop(prefix + "tucker_core")
        state_dict |= {f"{prefix}tucker_core.{c}": core for c, core in enumerate(cores)}
    prefixes = [f"transformer.blocks.{i}.memory." for i in range(2)]
    converted = convert_memory(state_dict, prefixes, prefixes)
    single = convert(V1)
    assert converted.sizes == single.sizes
    for name, array in converted.params.items():
        np.testing.assert_array_equal(array[:1], single.params[name])
        np.testing.assert_array_equal(array[1:], single.params[name] + 1)
    assert converted.buffers["shuffle"].dtype == np.int32
    values = state["values_for_look_up"]
    np.testing.assert_array_equal(converted.tables["values"], np.concatenate([values, values + 1]))
    assert converted.tables["pre_values"] is None


@pytest.mark.parametrize("group", [1, 2, 4, 6])
def test_windows_start_as_in_the_published_code(group: int) -> None:
    """Layer l of the published code sees the tables l, l + 1, ..., and wraps around."""
    num_layers = 6
    state, _, _ = read(V2)
    tables = np.repeat(np.arange(float(num_layers)), 9)[:, None]
    state_dict = {f"{i}.{name}": array for i in range(num_layers) for name, array in state.items()}
    state_dict["values_for_look_up"] = np.broadcast_to(tables, (len(tables), 16))
    state_dict["pre_values_for_look_up"] = np.broadcast_to(tables, (len(tables), 8))
    layer_prefixes = [f"{i}." for i in range(num_layers)]
    converted = convert_memory(state_dict, layer_prefixes, [""], share_group=group)
    starts = retrieval.window_starts(num_layers, "ring" if group > 1 else "none", group)
    for rows in converted.tables.values():
        assert rows is not None
        for layer, start in enumerate(starts):
            seen = [rows[(start + i) % num_layers * 9, 0] for i in range(group)]
            assert seen == [(layer + i) % num_layers for i in range(group)]


CHANGES: list[tuple[str, Any, str]] = [
    ("query_proj.bias", np.zeros(3), "not of a memory layer: query_proj.bias"),
    ("keys", None, r"missing from this memory layer: keys"),
    ("full.values_for_look_up", None, "missing value tables: full.values_for_look_up"),
    ("full.pre_values_for_look_up", None, "missing value tables: full.pre_values"),
    ("full.pre_values_for_look_up", np.zeros((9, 8)), "must have 432 rows, as "),
    ("full.values_for_look_up", np.zeros((432, 15)), "width must be a multiple of 2 cores"),
    ("full.values_for_look_up", np.zeros((432, 8)), "into 1, 4, 9"),
    ("keys", np.zeros((1, 3, 14, 8, 2)), r"keys of shape \[1, 3, 14, 8, 2\]: must be"),
    ("keys_norm.weight", np.zeros(7), r"keys_norm.weight of shape \[7\]: must have shape \[8\]"),
    ("tucker_core", np.zeros((2, 1, 3, 3)), "tucker_core of shape"),
    ("tucker_core_u", np.zeros((1, 2)), "tucker_core_u of shape"),
    ("query_proj.weight", np.zeros((24, 32)), "must have 2 or 4 chunks of 8 rows"),
    ("pre_values_proj.weight", np.zeros((8, 31)), r"must have shape \[8, 32\]"),
    ("shuffle_index", np.zeros(196, int), "must be a permutation"),
]


@pytest.mark.parametrize(("name", "array", "message"), CHANGES)
def test_mismatched_arrays_are_named(name: str, array: np.ndarray | None, message: str) -> None:
    state, _, _ = read(V2)
    state[name] = np.zeros(0) if array is None else array
    if array is None:
        del state[name]
    with pytest.raises(InteropError, match=message):
        convert_memory(state, [""], ["full."])


def test_layers_of_different_sizes_are_rejected() -> None:
    state, _, _ = read(V2)
    other, _, _ = read("ultramem_v2_no_pre")
    both = {f"0.{n}": a for n, a in state.items()} | {f"1.{n}": a for n, a in other.items()}
    with pytest.raises(InteropError, match=r"1\.: sizes .* differ from those of "):
        convert_memory(both, ["0.", "1."], ["0.full."])
    with pytest.raises(InteropError, match="2 memory layers and 3 tables"):
        convert_memory(both, ["0.", "1."], ["0.full."] * 3)
