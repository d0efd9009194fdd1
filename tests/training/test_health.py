import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from umv2 import types
from umv2.model import transformer
from umv2.training import health


def layer_stats(**values: list[float]) -> types.LayerStats:
    zeros = jnp.zeros(2)
    given = {name: jnp.asarray(value) for name, value in values.items()}
    names = ("balance_loss", "router_z_loss", "output_variance", "top_score", "last_score")
    fields = dict.fromkeys(names, zeros) | {"router_probability": jnp.zeros((2, 0))}
    return types.LayerStats(**(fields | given), hits=jnp.zeros((2, 0), jnp.int32))


def test_health_by_hand() -> None:
    stats = transformer.ModelStats(
        ffn_variance=jnp.asarray([9.0, 16.0, 4.0]),
        sparse=layer_stats(
            output_variance=[4.0, 1.0], top_score=[2.0, 3.0], last_score=[0.5, 0.25]
        ),
    )
    usage = jnp.asarray([[2, 2, 2, 2], [6, 2, 0, 0]], jnp.int32)
    cores = jnp.zeros((2, 2, 1, 2, 2)).at[0, 0, 0].set(jnp.diag(jnp.asarray([1.0, 0.5])))
    cores = cores.at[0, 1, 0].set(jnp.diag(jnp.asarray([2.0, 0.0])))
    cores = cores.at[1, :, 0].set(jnp.asarray([[0.0, 2.0], [1.0, 0.0]]))
    params = {"sparse": {"cores": cores}, "blocks": {"ffn": {}}}
    compute = jax.jit(functools.partial(health.health_arrays, write_blocks=(1, 2)))
    found = health.fetched_health(compute(stats, usage, params))
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
    flat = {f"{k}/layer_{i + 1}": v for k, pair in expected.items() for i, v in enumerate(pair)}
    assert found == pytest.approx(flat, abs=1e-6)


def test_health_without_hits_or_cores_is_finite() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    usage = jnp.zeros((2, 4), jnp.int32)
    params: dict[str, Any] = {"sparse": {}, "blocks": {}}
    found = health.health_arrays(stats, usage, params, write_blocks=(0, 1))
    assert "lambda_1" not in found
    assert all(np.isfinite(values).all() for values in found.values())


def test_rank_one_cores_have_one_singular_value() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    params = {"sparse": {"cores": jnp.ones((2, 1, 1, 1, 1))}, "blocks": {}}
    usage = jnp.zeros((2, 4), jnp.int32)
    found = health.health_arrays(stats, usage, params, write_blocks=(0, 1))
    assert "lambda_1" in found
    assert "lambda_2" not in found


def test_a_dense_model_has_no_health() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=None)
    assert health.fetched_health(health.health_arrays(stats, None, {}, write_blocks=())) == {}


def test_health_runs_under_an_explicit_mesh() -> None:
    stats = transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=layer_stats())
    params = {"sparse": {"cores": jnp.ones((2, 1, 1, 2, 2))}, "blocks": {}}
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((stats, jnp.ones((2, 4), jnp.int32), params), jax.P())
        compute = jax.jit(functools.partial(health.health_arrays, write_blocks=(0, 1)))
        found = health.fetched_health(compute(*inputs))
    assert found["coverage/layer_2"] == 1.0


def test_statistics_are_described_layer_by_layer() -> None:
    memory = layer_stats(output_variance=[0.5, math.nan], top_score=[math.inf, 2.0])
    stats = transformer.ModelStats(ffn_variance=jnp.asarray([0.25, 1.0]), sparse=memory)
    text = health.describe_stats(stats)
    assert text.startswith("ffn_variance: 0.25, 1; sparse.balance_loss: 0, 0; ")
    assert "sparse.output_variance: 0.5, nan" in text
    assert "sparse.top_score: inf, 2" in text
    assert "hits" not in text
