"""A served model computes what the trained one does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, families
from umv2.config import ModelConfig, from_config_dict
from umv2.inference import serving
from umv2.model.memory.store import ValueStore
from umv2.training.state import create_model


def _model_config(family: str, **memory: Any) -> ModelConfig:
    config = base.get_config()
    config.model.update(hidden_size=16, num_heads=2, num_key_value_heads=1, num_layers=4)
    config.model.update(ffn_size=16, compute_dtype="float32")
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4)
    config.model.memory.update(value_dim=8, pre_value_dim=4)
    config.model.moe.update(num_experts=8, expert_size=8)
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
    ("dense", {}),
]


@pytest.mark.parametrize(("family", "memory"), CASES)
def test_a_served_model_gives_the_same_logits(family: str, memory: dict[str, Any]) -> None:
    config = _model_config(family, **memory)
    key = jax.random.key(0, impl="unsafe_rbg")
    model, store = jax.jit(lambda: create_model(config, key))()
    model.embedding[...] *= 10
    if family in ("ultramem_v2", "ultramem"):
        # Keys that the norm changes, or serving could leave it out.
        model.sparse.key_norm[...] *= 1 + jnp.arange(model.sparse.key_norm.shape[-1])[None]
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 256)

    @jax.jit
    def logits(model: Any, store: ValueStore | None) -> tuple[jax.Array, ...]:
        served, tables = serving.serve(model, store).parts()
        return (
            model(tokens, store=store).logits,
            served(tokens, store=tables).logits,
            served(tokens, store=tables, logits_at=jnp.array([[7, 0], [3, 3]])).logits,
        )

    full, got, some = logits(model, store)
    assert np.std(full) > 0.05
    np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5)
    wanted = np.stack([full[0, [7, 0]], full[1, [3, 3]]])
    np.testing.assert_allclose(some, wanted, rtol=1e-4, atol=1e-5)


def test_no_array_of_a_served_model_is_stacked_and_all_are_found_again() -> None:
    config = _model_config("ultramem_v2")
    served = jax.eval_shape(
        lambda: serving.serve(*create_model(config, jax.random.key(0, impl="unsafe_rbg")))
    )
    model, stores = served.parts()
    assert [store.values.shape for store in stores] == [(64, 8)] * 4
    assert {block.ffn.gate.shape for block in model.blocks} == {(16, 16)}
    assert len(jax.tree.leaves(served)) == len(jax.tree.leaves((model, stores)))
