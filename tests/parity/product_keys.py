"""PKM, PEER and Memory+ compared with the published PyTorch layers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.parity.common import (
    Arrays,
    Dtype,
    Meta,
    Traced,
    observe,
    parameters,
    replace_all,
    run_with_gradients,
    small_model,
)
from umv2.config import MemoryConfig
from umv2.model import layers
from umv2.model.memory import store
from umv2.model.memory.layer import MemoryLayer
from umv2.model.parameter import ABSTRACT
from umv2.model.slots import memory_layer

# Conversions from the golden layout to ours, given the layer's configuration.
Convert = Callable[[jax.Array, MemoryConfig], jax.Array]


def _as_it_is(array: jax.Array, _: MemoryConfig) -> jax.Array:
    return array


def _transposed(weight: jax.Array, _: MemoryConfig) -> jax.Array:
    return weight.T


def _gate_weight(weight: jax.Array, _: MemoryConfig) -> jax.Array:
    """[1, h], or without the axis of one -> [h, 1]."""
    return weight.reshape(-1, 1)


def _side_major_query(weight: jax.Array, sizes: MemoryConfig) -> jax.Array:
    """[(side, head, dim), h] -> [h, (head, side, dim)]."""
    split = weight.reshape(2, sizes.num_heads, sizes.key_dim, -1)
    return split.swapaxes(0, 1).reshape(weight.shape).T


def _keys_before_sides(keys: jax.Array, _: MemoryConfig) -> jax.Array:
    """[head, key, side, dim] -> [head, side, rank 1, key, dim]."""
    return keys.swapaxes(1, 2)[:, :, None]


def _flat_keys(keys: jax.Array, sizes: MemoryConfig) -> jax.Array:
    """[(head, side, key), dim], or the same unflattened -> [head, side, rank 1, key, dim]."""
    return keys.reshape(sizes.num_heads, 2, 1, sizes.num_keys, sizes.key_dim)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a published layer maps to ours: its parameters and its configuration.

    `parameters` gives for each golden name our name and the conversion; `tables` has the golden
    name of each table. Names in `unused` are unused upstream, too.
    """

    parameters: dict[str, tuple[str, Convert]]
    tables: dict[str, str]
    memory: Callable[[dict[str, Any]], dict[str, Any]]
    width: str = "dim"
    unused: tuple[str, ...] = ()


def _pkm(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_keys": given["num_keys"],
        "key_dim": given["dim_head"],
        "num_heads": given["heads"],
        "top_m": given["topk"],
        "value_dim": given["dim"],
        "query_norm": "layer",
        "projection": "none",
    }


_OWN_EXPERTS = "umv2.model.memory.own_experts:OwnExperts"
_GATED = "umv2.model.memory.gated:GatedMemory"
# Single-neuron experts, which read the input itself, instead of values.
_EXPERTS = {
    "pre_projection": False,
    "activation": "gelu",
    "projection": "none",
}


def _peer(given: dict[str, Any]) -> dict[str, Any]:
    competing = not given.get("non_competing_scores", True)
    return _EXPERTS | {
        "layer": _OWN_EXPERTS if given.get("separate_embed_per_head") else "product_key",
        "num_keys": math.isqrt(given["num_experts"]),
        "key_dim": given["dim_key"],
        "num_heads": given["heads"],
        # Without competition the published layer always keeps one expert per head.
        "top_m": given["num_experts_per_head"] if competing else 1,
        "shortlist": given["num_experts_per_head"],
        "score_activation": "softmax" if competing else "relu",
        "value_dim": given["dim"],
        "pre_value_dim": given["dim"],
    }


def _memory_plus_meta(given: dict[str, Any]) -> dict[str, Any]:
    width = given["output_dim"] if given.get("mem_v_dim", -1) <= 0 else given["mem_v_dim"]
    # The PEER variant never has projections.
    peer = any("peer" in name and value for name, value in given.items())
    variant = _EXPERTS | {"pre_value_dim": given["input_dim"]} if peer else {}
    gated = any("gated" in name and value for name, value in given.items())
    return variant | {
        "layer": _GATED if gated else "product_key",
        "num_keys": given["mem_n_keys"],
        "key_dim": given["mem_k_dim"] // 2,
        "num_heads": given["mem_heads"],
        "top_m": given["mem_knn"],
        "value_dim": width,
        "output_gate": "silu" if given.get("swilu_projection") and not peer else "none",
        "bias": True,
    }


def _memory_plus(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_keys": given["knum"],
        "key_dim": given["kdim"],
        "num_heads": given["head"],
        "top_m": given["knn"],
        "value_dim": given.get("vdim", given["hidden_size"]),
        "query_norm": "rms",
        "output_gate": "silu",
    }


FAMILIES = {
    "pkm": Family(
        parameters={
            "to_queries.weight": ("query", _side_major_query),
            "keys": ("keys", _keys_before_sides),
            "norm.weight": ("query_norm", _as_it_is),
            "norm.bias": ("query_norm_bias", _as_it_is),
        },
        tables={"values.weight": "values"},
        memory=_pkm,
    ),
    "peer": Family(
        parameters={
            "to_queries.weight": ("query", _side_major_query),
            "keys": ("keys", _keys_before_sides),
        },
        tables={"weight_down_embed.weight": "pre_values", "weight_up_embed.weight": "values"},
        memory=_peer,
    ),
    "memory_plus_meta": Family(
        parameters={
            "query_proj.weight": ("query", _transposed),
            "query_proj.bias": ("query_bias", _as_it_is),
            "keys": ("keys", _flat_keys),
            "value_proj.weight": ("output", _transposed),
            "value_proj.bias": ("output_bias", _as_it_is),
            "swilu_projection.weight": ("output_gate", _transposed),
            "swilu_projection.bias": ("output_gate_bias", _as_it_is),
            **{
                f"{gate}.{part}": (name, convert)
                for gate in ("gating", "gate", "mem_gate", "gate_proj")
                for part, name, convert in (
                    ("weight", "gate", _gate_weight),
                    ("bias", "gate_bias", _as_it_is),
                )
            },
        },
        tables={
            "values.weight": "values",
            "values_u.weight": "pre_values",
            "values_v.weight": "values",
        },
        memory=_memory_plus_meta,
        width="input_dim",
    ),
    # The layer of the UltraMem repository: normalised queries, raw keys, no biases.
    "memory_plus": Family(
        parameters={
            "query_proj.weight": ("query", _transposed),
            "query_norm.weight": ("query_norm", _as_it_is),
            "keys": ("keys", _flat_keys),
            "value_proj.weight": ("output", _transposed),
            "values_proj.weight": ("output", _transposed),
            "swilu_projection.weight": ("output_gate", _transposed),
            "gate_proj.weight": ("output_gate", _transposed),
        },
        tables={"values.weight": "values", "values_for_look_up": "values"},
        memory=_memory_plus,
        width="hidden_size",
        unused=("keys_norm.weight",),
    ),
}
PRE_NORM = "norm.gamma"  # PEER's norm before the layer, like the norm of our block


def run(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Runs our layer, or the layers that share a table, and returns results by golden name."""
    name = max((n for n in FAMILIES if meta["case"].startswith(n)), key=len)
    family, given_config = FAMILIES[name], meta["config"]
    sizes = {
        "scoring": "sum",
        "score_activation": "softmax",
        "tucker_rank": 1,
        "num_cores": 1,
        "query": "per_head",
        "query_norm": "none",
        "key_norm": "none",
        "shuffle": False,
        "pre_value_dim": 0,
    } | family.memory(given_config)
    sizes.setdefault("shortlist", sizes["top_m"])
    epsilon = given_config.get("rms_eps", 1e-5)
    config = small_model(dtype, hidden_size=given_config[family.width], epsilon=epsilon, **sizes)
    layer_type = memory_layer(config)
    assert issubclass(layer_type, MemoryLayer)
    # "" for a single layer; "layer0.", "layer1." for those that share a table.
    prefixes = sorted({n.partition(".")[0] + "." for n in parameters(golden) if n[:5] == "layer"})
    cotangents = {prefix: golden[f"g{prefix[5:-1]}"] for prefix in prefixes or [""]}

    def forward(given: Traced, x: jax.Array) -> tuple[Traced, dict[str, Any]]:
        tables: dict[str, Any] = {"pre_values": None} | {
            ours: given[theirs] for theirs, ours in family.tables.items() if theirs in given
        }
        window = store.StoreWindow(store=store.ValueStore(**tables), start=0)
        if PRE_NORM in given:  # no epsilon inside the root
            x = layers.rms_norm(x, given[PRE_NORM] + 1, 0.0)
        outputs, seen = jnp.zeros(()), {}
        for prefix, g in cotangents.items():
            layer = layer_type(config, init=ABSTRACT)
            converted = {}
            for theirs, array in given.items():
                base = theirs.removeprefix(prefix)
                if theirs.startswith(prefix) and base in family.parameters:
                    ours, convert = family.parameters[base]
                    converted[ours] = convert(array, config.memory)
            replace_all(layer, nnx.Param, converted)
            y, _, seen[prefix] = observe(layer, x, window)
            seen[prefix]["y"] = y
            outputs += jnp.sum(y * g)
        return {"output": outputs}, seen

    seen, gradients = run_with_gradients(forward, parameters(golden), golden["x"])
    ours: Arrays = {f"grad.{name}": value for name, value in gradients["output"].items()}
    for prefix, results in seen.items():
        ours[f"y{prefix[5:-1]}"] = results.pop("y")
        for result, array in _results(results, config.memory).items():
            # The files differ in whether heads and their selections are one axis.
            like = golden.get(prefix + result)
            ours[prefix + result] = array if like is None else _reshaped(array, like.shape)
    return ours


def _results(seen: dict[str, Any], sizes: MemoryConfig) -> Arrays:
    # [head, side, rank 1, token, dim] -> [token, head, side, dim]
    query = seen["arrange_query"][:, :, 0].transpose(2, 0, 1, 3)
    flat_query = query.reshape(len(query), sizes.num_heads, -1)
    results = {
        "idx.real": seen["locate"][2],
        "score.raw": seen["scores"][..., 0],
        "score.best": seen["value_weights"][..., 0],
        "inter.pooled": seen["value_aggregation"],
        "inter.query": flat_query if sizes.bias else query.swapaxes(1, 2),
        "inter.query_normed": query.swapaxes(1, 2),
    }
    for side, name in enumerate(["row", "col"]):
        best = seen["top_k"][1][:, side].swapaxes(0, 1)
        results[f"idx.{name}_topk"] = best
    return results


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape) if array.size == math.prod(shape) else array
