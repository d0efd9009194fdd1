"""UltraMem, V1 and V2, compared with the published PyTorch layers."""

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
from umv2.config import ModelConfig
from umv2.model.memory import retrieval
from umv2.model.memory.layer import MemoryLayer
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import ABSTRACT, Buffer

TUCKER_MARGIN = 0.15  # fixed in the published code
QUERY_LAYOUTS = {"v1": "shared", "v2_chunk": "released", "per_rank": "per_rank"}
# Golden name: (our name, from the golden layout to ours).
PARAMETERS: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "query_proj.weight": ("query", jnp.transpose),
    "values_proj.weight": ("output", jnp.transpose),
    "pre_values_proj.weight": ("pre", jnp.transpose),
    "query_norm.weight": ("query_norm", jnp.asarray),
    "keys_norm.weight": ("key_norm", jnp.asarray),
    "keys": ("keys", lambda keys: jnp.moveaxis(keys, -1, 2)),
    "tucker_core": ("cores", jnp.asarray),
}


def run_layer(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Runs our UltraMem layer, V1 or V2, and returns its results by golden name."""
    config, coefficient = _model_config(meta, dtype), _balance_coefficient(meta)
    g = golden["g"]
    buffers = {
        "core_u": jnp.asarray(golden["buffer.tucker_core_u"][0, :, 0]),
        "core_v": jnp.asarray(golden["buffer.tucker_core_v"][0, :, 0]),
        "shuffle": jnp.asarray(golden["buffer.shuffle_index"]),
    }

    # Takes parameters in the golden layout, so that gradients have that layout, too.
    def forward(given: Traced, x: jax.Array) -> tuple[Traced, dict[str, Any]]:
        layer = MemoryLayer(config, init=ABSTRACT)
        tables: dict[str, Any] = {"pre_values": None}
        converted = {}
        for name, array in given.items():
            if name.endswith("values_for_look_up"):
                tables[name.removeprefix("full.").removesuffix("_for_look_up")] = array
            else:
                ours, convert = PARAMETERS[name]
                converted[ours] = convert(array)
        replace_all(layer, nnx.Param, converted)
        replace_all(layer, Buffer, buffers)
        store = ValueStore(**tables)
        window = StoreWindow(store=store, start=meta["derived"]["offset"])
        y, stats, seen = observe(layer, x, window)
        assert stats.balance_loss is not None
        objectives = {
            "output": jnp.sum(y * g),
            "key_balance": stats.balance_loss,
            "tucker_svd_penalty": retrieval.tucker_penalty(given["tucker_core"], TUCKER_MARGIN),
        }
        seen["core_vectors"] = retrieval.core_vectors(
            given["tucker_core"], buffers["core_u"], buffers["core_v"]
        )
        return objectives, {"y": y, **objectives, **seen}

    seen, gradients = run_with_gradients(forward, parameters(golden), golden["x"])
    shortlisting = seen["shortlist_scores"]
    block, _, rows = seen["table_rows"]
    u, v = seen["core_vectors"]
    ours = {
        "y": seen["y"],
        "idx.grid": seen["grid"],
        "idx.virtual": seen["virtual_addresses"],
        "idx.group": block,
        "idx.real": rows,
        "score.best": seen["scores"],
        "score.total": seen["scores"].sum(axis=-1).reshape(len(rows), config.memory.num_heads, -1),
        "inter.pooled": seen["value_aggregation"],
        "buffer.tucker_core_u": u[None, :, None],
        "buffer.tucker_core_v": v[None, :, None],
        "aux.tucker_svd_penalty": seen["tucker_svd_penalty"],
        "aux.key_balance_loss": seen["key_balance"],
        "aux.key_balance_coef": np.asarray(coefficient),
    }
    best, candidates = seen["top_k"]
    for side, name in enumerate(["row", "col"]):
        refined = seen["product_key_scores"][:, side]
        ours[f"inter.{name}_refined"] = refined.transpose(2, 0, 3, 1)
        ours[f"inter.{name}_approx"] = shortlisting[:, side].swapaxes(0, 1)
        ours[f"idx.{name}_topk"] = candidates[:, side].swapaxes(0, 1)
        ours[f"score.{name}_topk"] = best[:, side].swapaxes(0, 1)
    for name, gradient in gradients["output"].items():
        balance = gradients["key_balance"][name]
        ours[f"grad.{name}"] = gradient + coefficient * balance
        ours[f"gradaux.key_balance.{name}"] = balance
        ours[f"gradaux.tucker_svd_penalty.{name}"] = gradients["tucker_svd_penalty"][name]
    return ours


def run_core_vectors(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Follows a sequence of cores from its second pair on: the sign of the first is arbitrary."""
    del meta, dtype
    cores = golden["param.tucker_core"]
    pair = tuple(golden[f"buffer.tucker_core_{side}"][0, 0, :, 0] for side in "uv")
    pairs = [pair]
    for core in cores[1:]:
        pair = jax.jit(retrieval.core_vectors)(core, *pair)
        pairs.append(pair)
    u, v = (np.stack(side)[:, None, :, None] for side in zip(*pairs, strict=True))
    penalty = jax.value_and_grad(lambda core: retrieval.tucker_penalty(core, TUCKER_MARGIN))
    penalties, gradients = jax.device_get(jax.jit(jax.vmap(penalty))(cores))
    return {
        "buffer.tucker_core_u": u,
        "buffer.tucker_core_v": v,
        "aux.tucker_svd_penalty": penalties,
        "gradaux.tucker_svd_penalty.tucker_core": gradients,
    }


def _model_config(meta: Meta, dtype: Dtype) -> ModelConfig:
    """Returns a model configuration with the sizes of the file."""
    given, derived = meta["config"], meta["derived"]
    result = small_model(
        dtype,
        hidden_size=given["hidden_size"],
        epsilon=given["rms_eps"],
        # A layer sees rows of a store, from any tables.
        num_keys=math.isqrt(derived["value_num"]),
        key_dim=given["kdim"],
        tucker_rank=given["tucker_rank"],
        num_cores=given["tucker_multihead"],
        num_heads=given["head"],
        top_m=given["knn"],
        shortlist=given["knn"],
        query=QUERY_LAYOUTS[derived["query_mode"]],
        key_expansion=math.isqrt(derived["groups"]),
        projection="single" if given["value_expand_time"] == 1 else "per_block",
        value_dim=given["vdim"],
        pre_value_dim=given.get("pre_vdim", 0),
        activation="gelu" if given.get("mem_use_glu_act") else "none",
    )
    assert result.memory.keys_per_side == derived["key_num"]
    assert result.memory.num_slots == given["value_expand_time"]
    return result


def _balance_coefficient(meta: Meta) -> float:
    return meta["config"].get("mem_key_balance_reg_coef", 0.0)
