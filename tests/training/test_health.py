import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import base
from tests import slots
from umv2.config import ModelConfig, from_config_dict
from umv2.model import weights
from umv2.model.block import FeedForwardStats
from umv2.model.slots import MemoryStats, RouterStats
from umv2.model.transformer import ModelStats
from umv2.training import health


def model_config(filled: str = "memory", **memory: Any) -> ModelConfig:
    """Three blocks; memory layers write next to the second and the third."""
    config = base.get_config()
    config.model.update(hidden_size=8, num_heads=2, num_key_value_heads=2, num_layers=3)
    config.model.update(ffn_size=8, vocab_size=16)
    config.model.memory.update(num_keys=2, key_dim=4, top_m=2, shortlist=2, value_dim=4)
    config.model.memory.update(read_layers=(2, 3), write_layers=(2, 3))
    config.model.memory.update(memory)
    config.model.moe.update(num_experts=4, top_k=2, expert_size=4)
    slots.fill(config, filled)
    return from_config_dict(config).model


def weights_of(config: ModelConfig, cores: jax.Array | None = None) -> weights.Weights:
    """Zeros, except for the given cores of the memory layers."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), weights.abstract(config))
    if cores is not None:
        assert zeros.params["memory"]["cores"].shape == cores.shape
        zeros.params["memory"]["cores"] = cores
    return zeros


def memory_stats(**values: list[float]) -> MemoryStats:
    names = ("balance_loss", "output_variance", "top_score", "last_score")
    fields = {name: jnp.asarray(values.get(name, [0.0, 0.0])) for name in names}
    return MemoryStats(**fields, hits=jnp.zeros((2, 0), jnp.int32))


def model_stats(
    ffn_variance: list[float], memory: MemoryStats | None, router: RouterStats | None = None
) -> ModelStats:
    feed_forward = FeedForwardStats(ffn_variance=jnp.asarray(ffn_variance), router=router)
    return ModelStats(feed_forward=feed_forward, memory=memory)


def named(expected: dict[str, list[float]]) -> dict[str, float]:
    return {f"{k}/layer_{i + 1}": v for k, each in expected.items() for i, v in enumerate(each)}


def test_health_by_hand() -> None:
    memory = memory_stats(output_variance=[4.0, 1.0], top_score=[2.0, 3.0], last_score=[0.5, 0.25])
    stats = model_stats([9.0, 16.0, 4.0], memory)
    usage = {"memory": jnp.asarray([[2, 2, 2, 2], [6, 2, 0, 0]], jnp.int32)}
    cores = jnp.zeros((2, 2, 1, 2, 2)).at[0, 0, 0].set(jnp.diag(jnp.asarray([1.0, 0.5])))
    cores = cores.at[0, 1, 0].set(jnp.diag(jnp.asarray([2.0, 0.0])))
    cores = cores.at[1, :, 0].set(jnp.asarray([[0.0, 2.0], [1.0, 0.0]]))
    config = model_config()
    compute = jax.jit(functools.partial(health.arrays, config))
    measures = health.fetch(compute(stats, usage, weights_of(config, cores)))
    kl = 0.75 * math.log(0.75 * 4) + 0.25 * math.log(0.25 * 4)
    expected = {
        "coverage": [1.0, 0.5],
        "uniform_kl": [0.0, kl],
        "output_std": [2.0, 1.0],
        "output_to_ffn_std": [2 / 4, 1 / 2],
        "top_score": [2.0, 3.0],
        "last_score": [0.5, 0.25],
        "lambda_1": [3.0, 4.0],
        "lambda_2": [0.5, 2.0],
    }
    assert measures == pytest.approx(named(expected), abs=1e-6)


def test_a_router_has_its_own_health_next_to_a_memory() -> None:
    pair = jnp.asarray([1.0, 4.0, 9.0])
    router = RouterStats(
        balance_loss=pair,
        z_loss=2 * pair,
        probability=jnp.ones((3, 4)) / 4,
        output_variance=pair,
        top_score=pair / 10,
        last_score=pair / 20,
        hits=jnp.zeros((3, 0), jnp.int32),
    )
    config = model_config("both")
    stats = model_stats([0.0, 0.0, 0.0], memory_stats(output_variance=[1.0, 1.0]), router)
    usage = {
        "memory": jnp.ones((2, 4), jnp.int32),
        "router": jnp.asarray([[1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]], jnp.int32),
    }
    measures = health.fetch(health.arrays(config, stats, usage, weights_of(config)))
    of_router = {
        "expert_coverage": [1.0, 0.25, 0.5],
        "expert_uniform_kl": [0.0, math.log(4), math.log(2)],
        "expert_output_std": [1.0, 2.0, 3.0],
        "expert_top_score": [0.1, 0.4, 0.9],
        "expert_last_score": [0.05, 0.2, 0.45],
        "balance_loss": [1.0, 4.0, 9.0],
        "router_z_loss": [2.0, 8.0, 18.0],
    }
    expected = named(of_router)
    assert {name: measures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    # Without an FFN there is nothing to compare outputs with.
    assert not any("output_to_ffn_std" in name for name in measures)
    assert measures["coverage/layer_2"] == 1.0
    assert "coverage/layer_3" not in measures


def test_health_without_hits_or_cores_is_finite() -> None:
    config = model_config(scoring="sum", tucker_rank=1, num_cores=1)
    stats = model_stats([1.0, 1.0, 1.0], memory_stats())
    usage = {"memory": jnp.zeros((2, 4), jnp.int32)}
    measures = health.arrays(config, stats, usage, weights_of(config))
    assert "lambda_1" not in measures
    assert all(np.isfinite(values).all() for values in measures.values())


def test_rank_one_cores_have_one_singular_value() -> None:
    config = model_config(tucker_rank=1, num_cores=1)
    stats = model_stats([1.0, 1.0, 1.0], memory_stats())
    usage = {"memory": jnp.zeros((2, 4), jnp.int32)}
    measures = health.arrays(config, stats, usage, weights_of(config, jnp.ones((2, 1, 1, 1, 1))))
    assert "lambda_1" in measures
    assert "lambda_2" not in measures


def test_a_dense_model_has_no_health() -> None:
    config = model_config("dense")
    stats = model_stats([1.0, 1.0, 1.0], None)
    assert health.fetch(health.arrays(config, stats, {}, weights_of(config))) == {}


def test_health_runs_under_an_explicit_mesh() -> None:
    config = model_config()
    stats = model_stats([1.0, 1.0, 1.0], memory_stats())
    usage = {"memory": jnp.ones((2, 4), jnp.int32)}
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((stats, usage, weights_of(config)), jax.P())
        measures = health.fetch(jax.jit(functools.partial(health.arrays, config))(*inputs))
    assert measures["coverage/layer_2"] == 1.0


def test_hits_are_split_from_the_reported_statistics() -> None:
    hits = jnp.asarray([[1, 2], [3, 4]], jnp.int32)
    memory = dataclasses.replace(memory_stats(), hits=hits)
    stats = model_stats([1.0], memory)
    assert health.hits(stats).keys() == {"memory"}
    assert health.hits(stats)["memory"].tolist() == hits.tolist()
    left = health.without_hits(stats).memory
    assert left is not None
    assert left.hits is not None
    assert left.hits.shape == (2, 0)
    assert left.top_score is memory.top_score


def test_statistics_are_described_per_layer() -> None:
    memory = memory_stats(output_variance=[0.5, math.nan], top_score=[math.inf, 2.0])
    text = health.describe(model_stats([0.25, 1.0], memory))
    assert text.startswith("feed_forward.ffn_variance: 0.25, 1; memory.balance_loss: 0, 0; ")
    assert "memory.output_variance: 0.5, nan" in text
    assert "memory.top_score: inf, 2" in text
    assert "hits" not in text
