"""Every family through the production training step."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from configs import families, tiny
from tests import meshes, tiny_run
from umv2 import sharding
from umv2.config import from_config_dict
from umv2.training import train as training
from umv2.training.state import abstract_state
from umv2.types import Batch

_PRODUCT_KEYS: dict[str, Any] = {
    "scoring": "sum",
    "score_activation": "softmax",
    "tucker_rank": 1,
    "num_cores": 1,
    "query": "per_head",
    "key_norm": "none",
    "shuffle": False,
    "value_dim": 16,
}
_PEER = _PRODUCT_KEYS | {
    "query_norm": "none",
    "pre_value_dim": 16,
    "pre_projection": False,
    "activation": "gelu",
    "projection": "none",
}
# Fields of configs/families.py, at the size of tiny_run.
SMALL: dict[str, dict[str, Any]] = {
    "moe": {
        "model.ffn": "moe",
        "model.memory.layer": "none",
        "model.ffn_size": 0,
        "model.moe.num_experts": 4,
        "model.moe.top_k": 2,
        "model.moe.expert_size": 8,
        "loss.load_balance": 0.01,
        "loss.router_z_loss": 0.001,
    },
    "peer": {f"model.memory.{name}": value for name, value in _PEER.items()},
}


@pytest.mark.slow(fast=["8-ultramem_v2", "8-moe", "1-"])
@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIANTS])
@pytest.mark.parametrize("replicas", [1, 8])
def test_the_step_of_every_family_traces_on_a_mesh(family: str, replicas: int) -> None:
    """Explicit shardings and manual axes are checked during tracing."""
    values = tiny.get_config(family)
    values.mesh.replica = replicas
    config = meshes.resolved(from_config_dict(values))
    mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        step = training.make_train_step(config)
        rows = sharding.batch_sharding(mesh)
        shape = (config.train.batch_size, config.data.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        after, metrics = jax.eval_shape(step, state, _batch(ids, weights))
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == described
    assert metrics.loss.sharding.spec == PartitionSpec()
    slots = {"memory": config.model.placements, "router": config.model.ffn == "moe"}
    assert state.usage.keys() == {name for name, filled in slots.items() if filled}
    assert (state.store is None) == (not config.model.placements)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_eight_devices_train_like_one(family: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    paths = tiny_run.write_text(tmp_path / "text")
    changes = {name.replace(".", "__"): value for name, value in SMALL[family].items()}
    curves = []
    for replicas in (1, 8):
        config = tiny_run.tiny_config(paths, mesh__replica=replicas, **changes)
        workdir = tmp_path / str(replicas)
        training.train(config, workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        curves.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.3


def _batch(ids: Any, weights: Any) -> Batch:
    """An abstract batch: the constructors of typed dataclasses reject ShapeDtypeStructs."""
    ones = jnp.ones((1, 1), jnp.int32)
    example = Batch(ones, ones, ones, jnp.ones((1, 1)))
    return jax.tree.unflatten(jax.tree.structure(example), [ids, ids, ids, weights])
