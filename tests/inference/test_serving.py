"""A served model computes the same as the trained one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, families
from tests import slots
from tests.model.drawn import drawn_weights
from umv2.config import ModelConfig, from_config_dict
from umv2.inference import serving
from umv2.model import weights
from umv2.model.weights import Weights


def _model_config(family: str, **memory: Any) -> ModelConfig:
    config = base.get_config()
    config.model.update(hidden_size=16, num_heads=2, num_key_value_heads=1, num_layers=4)
    config.model.update(ffn_size=16, compute_dtype="float32")
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4)
    config.model.memory.update(value_dim=8, pre_value_dim=4)
    config.model.moe.update(num_experts=8, expert_size=8)
    if family in slots.SLOTS:
        slots.fill(config, family)
    else:
        families.switch(config, family, {family: {}})
    config.model.memory.update(memory)
    return from_config_dict(config).model


CASES = [
    ("ultramem_v2", {}),
    ("ultramem_v2", {"sharing": "ring", "share_group": 2}),
    ("ultramem", {"read_layers": (1, 3), "write_layers": (2, 4)}),
    ("memory_plus", {}),
    ("pkm", {"read_layers": (2,), "write_layers": (2,)}),
    ("peer", {"read_layers": (2,), "write_layers": (2,)}),
    ("moe", {}),
    ("both", {"read_layers": (2,), "write_layers": (3,)}),
    ("dense", {}),
]


@pytest.mark.slow(fast=["both-memory7"])
@pytest.mark.parametrize(("family", "memory"), CASES)
def test_a_served_model_gives_the_same_logits(family: str, memory: dict[str, Any]) -> None:
    config = _model_config(family, **memory)
    drawn = drawn_weights(config, embedding=10)
    params = jax.tree.map(lambda leaf: leaf, drawn.params)
    if family in ("ultramem_v2", "ultramem", "both"):
        # Keys that the norm changes: otherwise serving could skip it unnoticed.
        key_norm = params["memory"]["key_norm"]
        params["memory"]["key_norm"] = key_norm * (1 + jnp.arange(key_norm.shape[-1])[None])
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 256)

    @jax.jit
    def logits(given: Weights) -> tuple[jax.Array, ...]:
        served, tables = serving.serve(config, given).parts()
        return (
            given.model(config)(tokens, store=given.store).logits,
            served(tokens, store=tables).logits,
            served(tokens, store=tables, logits_at=jnp.array([[7, 0], [3, 3]])).logits,
        )

    full, got, some = logits(dataclasses.replace(drawn, params=params))
    assert np.std(full) > 0.05
    np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5)
    expected = np.stack([full[0, [7, 0]], full[1, [3, 3]]])
    np.testing.assert_allclose(some, expected, rtol=1e-4, atol=1e-5)


def test_a_served_model_has_all_arrays_unstacked() -> None:
    config = _model_config("both")
    served = jax.eval_shape(lambda given: serving.serve(config, given), weights.abstract(config))
    model, stores = served.parts()
    assert [store.values.shape for store in stores] == [(64, 8)] * 4
    assert {block.attention.query.shape for block in model.blocks} == {(16, 16)}
    assert {block.moe.down.shape for block in model.blocks} == {(8, 8, 16)}
    assert len(jax.tree.leaves(served)) == len(jax.tree.leaves((model, stores)))
