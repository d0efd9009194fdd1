"""The mixture of experts and the full model compared with OLMoE of Hugging Face transformers."""

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from tests.parity.common import (
    GOLDEN,
    Arrays,
    Dtype,
    Meta,
    Traced,
    parameters,
    replace_all,
    run_with_gradients,
    small_model,
)
from umv2.config import from_config_dict
from umv2.interop import olmoe
from umv2.model import layers
from umv2.model.moe import layer as moe
from umv2.model.parameter import ABSTRACT
from umv2.model.slots import Observe
from umv2.training import losses

# For each array of a block's attention and norms, by golden name: our name, and if it is a matrix.
BLOCK = {
    "self_attn.q_proj": (("attention", "query"), True),
    "self_attn.k_proj": (("attention", "key"), True),
    "self_attn.v_proj": (("attention", "value"), True),
    "self_attn.o_proj": (("attention", "output"), True),
    "self_attn.q_norm": (("attention", "query_norm", "weight"), False),
    "self_attn.k_norm": (("attention", "key_norm", "weight"), False),
    "input_layernorm": (("attention_norm", "weight"), False),
    "post_attention_layernorm": (("ffn_norm", "weight"), False),
}


def run_block(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Runs our mixture of experts, and returns its results under the golden names."""
    given_config, g = meta["config"], golden["g"]
    assert given_config["hidden_act"] == "silu"
    config = dataclasses.replace(
        small_model(dtype, hidden_size=given_config["hidden_size"]), ffn="moe", ffn_size=0
    )
    sizes = dataclasses.replace(
        config.moe,
        num_experts=given_config["num_experts"],
        top_k=given_config["num_experts_per_tok"],
        expert_size=given_config["intermediate_size"],
        renormalize=given_config["norm_topk_prob"],
    )
    config = dataclasses.replace(config, moe=sizes)

    def forward(given: Traced, x: jax.Array) -> tuple[Traced, dict[str, Any]]:
        layer = moe.MixtureOfExperts(config, init=ABSTRACT)
        gate, up = jnp.split(given["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
        converted = {
            "router": given["gate.weight"].T,
            "gate": gate,
            "up": up,
            "down": given["experts.down_proj"].swapaxes(1, 2),
        }
        replace_all(layer, nnx.Param, converted)
        with pytest.MonkeyPatch.context() as patch:
            seen = _observe_routing(patch)
            y, stats = layer(x, observe=Observe(health=True))
        assert stats is not None
        objectives = {"output": jnp.sum(y * g), "load_balancing": stats.balance_loss}
        return objectives, {"y": y, **objectives, **seen[0]}

    seen, gradients = run_with_gradients(forward, parameters(golden), golden["x"])
    return {
        "y": seen["y"],
        "idx.experts": seen["choices"],
        "score.weights": seen["weights"],
        "inter.router_logits": seen["router_logits"],
        "aux.load_balancing_loss": seen["load_balancing"],
        **{f"grad.{name}": value for name, value in gradients["output"].items()},
        **{
            f"gradaux.load_balancing.{name}": value
            for name, value in gradients["load_balancing"].items()
        },
    }


def run_model(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Runs the full model, loaded from the golden checkpoint, with its loss and gradients.

    Each file of gradients has a part of them; the inputs are in the file of the model.
    """
    del golden
    stem = meta["case"]
    with np.load(GOLDEN / f"{stem}.npz") as file:
        tokens = jnp.asarray(file["input_ids"], jnp.int32)
        labels = jnp.asarray(file["labels"], jnp.int32)
        coefficient = float(file["aux.coef"])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shutil.copy(GOLDEN / f"{stem}_config.json", folder / "config.json")
        shutil.copy(GOLDEN / f"{stem}_params_native.safetensors", folder / "model.safetensors")
        unsaid = small_model(dtype, hidden_size=4)
        config, weights = olmoe.load_olmoe(folder, unsaid, "float32")
    load_balance = dataclasses.replace(
        from_config_dict(base.get_config()).loss,
        load_balance=1.0,
        load_balance_scope="model",
    )
    # Unrolled, so that the inputs of routing can be observed.
    config = dataclasses.replace(config, scan_layers=False)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights)

    def objectives(params: Any) -> tuple[Traced, dict[str, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            seen = _observe_routing(patch)
            if dtype == "float64":
                patch.setattr(jax.nn, "dot_product_attention", _wide_attention)
            model = dataclasses.replace(weights, params=params).model(config)
            output = model.hidden(tokens, store=None, observe=Observe(health=True))
        head = model.output_embedding
        counted = jnp.ones_like(labels[:, 1:], head.dtype)
        nll, _ = losses.cross_entropy(output.x[:, :-1], head, labels[:, 1:], counted)
        loss = nll / counted.size
        terms = model.losses(output.stats, load_balance, num_tokens=tokens.size)
        balance = terms.pop("load_balance")
        assert not terms
        scalars = {"loss": loss + coefficient * balance, "load_balancing": balance}
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
        return scalars, {"logits": layers.logits(output.x, head), "loss_ce": loss, **stacked}

    @jax.jit
    def run(params: Any) -> tuple[Any, Any]:
        scalars, pull_back, seen = jax.vjp(objectives, params, has_aux=True)
        gradients = {
            name: pull_back({n: jnp.full_like(v, n == name) for n, v in scalars.items()})[0]
            for name in scalars
        }
        return {**scalars, **seen}, gradients

    seen, gradients = jax.device_get(run(weights.params))
    of_balance = _named(gradients["load_balancing"])
    return {
        "logits": seen["logits"],
        "loss": seen["loss"],
        "loss_ce": seen["loss_ce"],
        "aux.load_balancing_loss": seen["load_balancing"],
        "aux.coef": np.asarray(coefficient),
        "idx.experts": seen["choices"],
        "score.weights": seen["weights"],
        "inter.router_logits": seen["router_logits"],
        **{f"grad.{name}": value for name, value in _named(gradients["loss"]).items()},
        **{f"gradaux.load_balancing.{name}": value for name, value in of_balance.items()},
    }


def _wide_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, **options: Any
) -> jax.Array:
    """Causal attention in float64: jax.nn always rounds scores to float32."""
    assert options["is_causal"]
    assert options["mask"] is None
    scores = jnp.einsum("bthq,bshq->bhts", query, keys) / query.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshq->bthq", weights, values)


def _observe_routing(patch: pytest.MonkeyPatch) -> list[dict[str, jax.Array]]:
    """Returns a list to which every call of the router appends its inputs and outputs."""
    seen: list[dict[str, jax.Array]] = []
    route = moe.route

    def observing(logits: jax.Array, **sizes: Any) -> moe.Routing:
        routing = route(logits, **sizes)
        both = {"choices": routing.choices, "weights": routing.weights}
        seen.append({"router_logits": logits, **both})
        return routing

    patch.setattr(moe, "route", observing)
    return seen


def _named(params: dict[str, Any]) -> Arrays:
    """Returns our parameters or gradients with the names and layout of transformers."""
    blocks, experts = params["blocks"], params["blocks"]["moe"]
    named = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["weight"],
        "lm_head.weight": params["head"],
    }
    for layer in range(len(experts["router"])):
        prefix = f"model.layers.{layer}."
        for theirs, (path, is_matrix) in BLOCK.items():
            array: Any = blocks
            for step in path:
                array = array[step]
            named[f"{prefix}{theirs}.weight"] = array[layer].T if is_matrix else array[layer]
        gate_up = np.concatenate([experts["gate"][layer], experts["up"][layer]], axis=-1)
        named[f"{prefix}mlp.gate.weight"] = experts["router"][layer].T
        named[f"{prefix}mlp.experts.gate_up_proj"] = gate_up.swapaxes(1, 2)
        named[f"{prefix}mlp.experts.down_proj"] = experts["down"][layer].swapaxes(1, 2)
    return named
