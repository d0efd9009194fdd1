"""Converts UltraMem's published PyTorch weights (arXiv 2411.12364, 2508.18756) to memory layers.

Supports the layers of V1 and V2 under the names of their state dicts. There, linear weights are
[out, in], keys [head, side, key, width, rank], and cores one tensor each or stacked.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from umv2.config.schema import first_names
from umv2.interop.tensor_files import InteropError

Arrays = Mapping[str, np.ndarray]
# Meaning of a query projection with two chunks per rank, which its shape does not determine.
QueryLayout = Literal["released", "per_rank"]

_VALUES, _PRE_VALUES = "values_for_look_up", "pre_values_for_look_up"
_PRE_PROJECTION = "pre_values_proj.weight"
_TABLE = re.compile(rf"(full\.)?({_VALUES}|{_PRE_VALUES})")
_CORE = re.compile(r"tucker_core\.(\d+)")


@dataclasses.dataclass(frozen=True)
class ReleasedMemory:
    """Memory layers stacked along axis 0, as in `params["memory"]`, and the value tables.

    `sizes` are the fields of `model.memory` that the shapes determine; `tables` are the fields of a
    `ValueStore`. Arrays are NumPy arrays in their original dtype.
    """

    sizes: dict[str, Any]
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    tables: dict[str, np.ndarray | None]


def convert_memory(
    state: Arrays,
    layers: Sequence[str],
    tables: Sequence[str],
    *,
    query: QueryLayout = "released",
    share_group: int = 1,
) -> ReleasedMemory:
    """Converts the memory layers of a state dict, which may contain other modules too.

    The caller must configure what the shapes do not determine: num_keys, top_m, shortlist,
    activation, sharing, and key_expansion unless every block has its own projection.

    Args:
      state: the arrays by name.
      layers: prefix of each layer, in order, e.g. "transformer.blocks.3.memory.".
      tables: prefix of each value table: one per layer (V1), or a single shared one (V2).
      query: meaning of a projection with four chunks. "released" (V2's code): head i reads chunks
        2 (i // 2) and 2 (i // 2) + 1 for all ranks; with up to two heads, chunks 2 and 3 are never
        read and are dropped. "per_rank" (V2's paper): each rank reads its own chunks.
      share_group: g, the number of tables that a layer sees. The published window starts at the
        layer's own table and ours (g - 1) // 2 tables before it, so the tables are rolled by that.

    Raises:
      InteropError: names or shapes are not those of such layers, or contradict each other; the
        message names the tensor and the rule.
    """
    if not layers or len(tables) not in (1, len(layers)):
        raise InteropError(
            f"{len(layers)} memory layers and {len(tables)} tables: must be equally many, or one"
            " table"
        )
    converted = [_convert_layer(state, prefix, query) for prefix in layers]
    sizes, pooled_size = converted[0].sizes, converted[0].pooled_size
    for prefix, layer in zip(layers, converted, strict=True):
        if (layer.sizes, layer.pooled_size) != (sizes, pooled_size):
            raise InteropError(
                f"{prefix}: sizes {layer.sizes} differ from those of {layers[0]}, {sizes}"
            )
    values = _table(state, tables, _VALUES)
    pre_values = None
    if sizes["pre_value_dim"]:
        pre_values = _table(state, tables, _PRE_VALUES)
        _require(
            pre_values.shape == (len(values), sizes["pre_value_dim"]),
            tables[0] + _PRE_VALUES,
            pre_values,
            f"must have {len(values)} rows, as {_VALUES}, and the width of {_PRE_PROJECTION}",
        )
    if share_group > 1:
        rows = -((share_group - 1) // 2) * (len(values) // len(layers))
        values = np.roll(values, rows, axis=0)
        pre_values = None if pre_values is None else np.roll(pre_values, rows, axis=0)
    return ReleasedMemory(
        sizes=sizes | _value_sizes(tables[0] + _VALUES, values, pooled_size, sizes),
        params=_stacked([layer.params for layer in converted]),
        buffers=_stacked([layer.buffers for layer in converted]),
        tables={"values": values, "pre_values": pre_values},
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    sizes: dict[str, Any]
    pooled_size: int
    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]


def _convert_layer(state: Arrays, prefix: str, query: QueryLayout) -> _Layer:
    arrays = _layer_arrays(state, prefix)

    def check(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = arrays[name]
        _require(array.shape == shape, prefix + name, array, f"must have shape {list(shape)}")
        return array

    keys, projection = arrays["keys"], arrays["query_proj.weight"]
    _require(
        keys.ndim == 5 and keys.shape[1] == 2,
        f"{prefix}keys",
        keys,
        "must be [head, 2, key, width, rank]",
    )
    heads, _, keys_per_side, key_dim, rank = keys.shape
    _require(projection.ndim == 2, f"{prefix}query_proj.weight", projection, "must be [out, in]")
    hidden = projection.shape[1]
    cores = check("tucker_core", (len(arrays["tucker_core"]), heads, rank, rank))
    output = check("values_proj.weight", (hidden, arrays["values_proj.weight"].shape[-1]))
    layout, projection = _arrange_query(prefix, projection, key_dim, heads, rank, query)
    shuffle = check("shuffle_index", (keys_per_side**2,))
    _require(
        np.array_equal(np.sort(shuffle), np.arange(len(shuffle))),
        f"{prefix}shuffle_index",
        shuffle,
        "must be a permutation",
    )
    params = {
        "query": projection.T,
        "keys": np.moveaxis(keys, -1, 2),
        "query_norm": check("query_norm.weight", (key_dim,)),
        "key_norm": check("keys_norm.weight", (key_dim,)),
        "cores": cores,
        "output": output.T,
    }
    pre_value_dim = 0
    if _PRE_PROJECTION in arrays:
        pre_value_dim = len(arrays[_PRE_PROJECTION])
        params["pre"] = check(_PRE_PROJECTION, (pre_value_dim, hidden)).T
    vectors = (1, heads, 1, rank)
    return _Layer(
        sizes={
            "key_dim": key_dim,
            "tucker_rank": rank,
            "num_cores": len(cores),
            "num_heads": heads,
            "scoring": "tucker",
            "query": layout,
            "query_norm": "rms",
            "key_norm": "rms",
            "shuffle": True,
            "pre_value_dim": pre_value_dim,
        },
        pooled_size=output.shape[1],
        params=params,
        buffers={
            "core_u": check("tucker_core_u", vectors)[0, :, 0],
            "core_v": check("tucker_core_v", vectors)[0, :, 0],
            "shuffle": shuffle.astype(np.int32),
        },
    )


def _layer_arrays(state: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """Returns a layer's arrays, without tables, by name without prefix; stacks its cores."""
    arrays = {
        name.removeprefix(prefix): np.asarray(array)
        for name, array in state.items()
        if name.startswith(prefix) and not _TABLE.fullmatch(name.removeprefix(prefix))
    }
    cores = {int(match[1]): name for name in arrays if (match := _CORE.fullmatch(name))}
    if cores and "tucker_core" not in arrays and sorted(cores) == list(range(len(cores))):
        arrays["tucker_core"] = np.stack([arrays.pop(cores[i]) for i in range(len(cores))])
    required = {
        "query_proj.weight",
        "values_proj.weight",
        "query_norm.weight",
        "keys_norm.weight",
        "keys",
        "tucker_core",
        "shuffle_index",
        "tucker_core_u",
        "tucker_core_v",
    }
    missing, unknown = required - arrays.keys(), arrays.keys() - required - {_PRE_PROJECTION}
    if missing:
        raise InteropError(
            f"{prefix}*: missing from this memory layer: {first_names(sorted(missing))}"
        )
    if unknown:
        raise InteropError(f"{prefix}*: not of a memory layer: {first_names(sorted(unknown))}")
    return arrays


def _arrange_query(
    prefix: str, projection: np.ndarray, key_dim: int, heads: int, rank: int, query: QueryLayout
) -> tuple[str, np.ndarray]:
    """Returns our name of the projection's layout, and the part of the projection that is read."""
    chunks, rest = divmod(len(projection), key_dim)
    name = f"{prefix}query_proj.weight"
    _require(
        rest == 0 and chunks in (2, 2 * rank),
        name,
        projection,
        f"must have 2 or {2 * rank} chunks of {key_dim} rows",
    )
    if chunks == 2:
        return "shared", projection
    if query == "per_rank":
        return "per_rank", projection
    _require(rank == 2, name, projection, f"the released layout requires rank 2, not {rank}")
    _require(heads <= 4, name, projection, f"the released layout has at most 4 heads, not {heads}")
    if heads > 2:
        return "released", projection
    logging.info("%s: dropped the second half, which no head reads in the released layout", name)
    return "shared", projection[: 2 * key_dim]


def _table(state: Arrays, prefixes: Sequence[str], name: str) -> np.ndarray:
    """Returns one table, or the concatenation of several."""
    names = [prefix + name for prefix in prefixes]
    if missing := [n for n in names if n not in state]:
        raise InteropError(f"missing value tables: {first_names(missing)}")
    parts = [np.asarray(state[n]) for n in names]
    for n, part in zip(names, parts, strict=True):
        _require(
            part.ndim == 2 and part.shape == parts[0].shape,
            n,
            part,
            f"must be [row, width], of the shape of {names[0]}",
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _value_sizes(
    name: str, values: np.ndarray, pooled_size: int, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    value_dim = values.shape[1]
    num_cores = sizes["num_cores"]
    _require(
        value_dim % num_cores == 0, name, values, f"width must be a multiple of {num_cores} cores"
    )
    slots, rest = divmod(pooled_size, value_dim)
    expansion = math.isqrt(slots)
    _require(
        rest == 0 and slots > 0 and expansion**2 == slots,
        name,
        values,
        f"width must divide {pooled_size} columns of values_proj.weight into 1, 4, 9, ... slots",
    )
    if slots == 1:
        return {"value_dim": value_dim, "projection": "single"}
    return {"value_dim": value_dim, "projection": "per_block", "key_expansion": expansion}


def _require(condition: bool, name: str, array: np.ndarray, rule: str) -> None:
    if not condition:
        raise InteropError(f"{name} of shape {list(array.shape)}: {rule}")


def _stacked(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
