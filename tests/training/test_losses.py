import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import base
from umv2.config import LossConfig, from_config_dict
from umv2.model.memory.layer import MemoryLayer
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import ABSTRACT
from umv2.model.slots import MemoryStats, RouterStats
from umv2.training import losses

OFF = LossConfig(
    z_loss=0.0,
    tucker_penalty=0.0,
    tucker_margin=0.15,
    balance_loss=0.0,
    load_balance=0.0,
    load_balance_scope="layer",
    router_z_loss=0.0,
)


def example() -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(8, 3, 5)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 5, size=(8, 3)), jnp.int32)
    weights = jnp.asarray(random.integers(0, 2, size=(8, 3)), jnp.float32)
    return logits, targets, weights


def test_cross_entropy_by_hand() -> None:
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 5.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]))
    targets = jnp.asarray([[2, 0, 1]])
    weights = jnp.asarray([[1.0, 1.0, 0.0]])
    nll, squared, count = losses.cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(nll, math.log(8 / 5) + math.log(4 / 2), rtol=1e-6)
    np.testing.assert_allclose(squared, math.log(8) ** 2 + math.log(4) ** 2, rtol=1e-6)
    assert count == 2


def test_large_logits_stay_finite() -> None:
    logits = jnp.asarray([[[1e4, -1e4]]])
    nll, _, _ = losses.cross_entropy(logits, jnp.asarray([[1]]), jnp.ones((1, 1)))
    np.testing.assert_allclose(nll, 2e4)


def test_gradient_is_softmax_minus_target() -> None:
    logits, targets, weights = example()
    gradient = jax.grad(lambda x: losses.cross_entropy(x, targets, weights)[0])(logits)
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 5)
    np.testing.assert_allclose(gradient, expected * weights[..., None], atol=1e-6)


def test_eight_devices_match_one() -> None:
    logits, targets, weights = example()

    def total(logits: Any, targets: Any, weights: Any) -> jax.Array:
        nll, squared, count = losses.cross_entropy(logits, targets, weights)
        return (nll + 0.1 * squared) / count

    step = jax.value_and_grad(total)
    loss, gradient = jax.jit(step)(logits, targets, weights)
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((logits, targets, weights), PartitionSpec("replica"))
        sharded_loss, sharded_gradient = jax.jit(step)(*sharded)
    assert gradient.sharding.num_devices == 1
    assert sharded_gradient.sharding.spec[0] == "replica"
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-7)


def memory_stats(balance: list[float]) -> MemoryStats:
    return MemoryStats(
        balance_loss=jnp.asarray(balance),
        output_variance=None,
        top_score=None,
        last_score=None,
        hits=None,
    )


def layers_with(cores: jax.Array) -> MemoryLayer:
    """Stacked memory layers with these cores, [l, c, h, r, r]."""
    config = base.get_config()
    config.model.memory.update(num_keys=4, key_dim=4, top_m=2, shortlist=2, value_dim=4)
    config.model.memory.update(num_cores=cores.shape[1], num_heads=cores.shape[2])
    config.model.memory.update(tucker_rank=cores.shape[-1])
    config.model.num_layers = len(cores)
    model_config = from_config_dict(config).model
    layers = ABSTRACT.stack("", len(cores), lambda init: MemoryLayer(model_config, init=init))
    assert layers.cores.get_value().shape == cores.shape
    layers.cores.set_value(cores)
    return layers


def of_memory(cores: jax.Array, balance: list[float], config: LossConfig) -> dict[str, jax.Array]:
    return layers_with(cores).losses(memory_stats(balance), config)


TWO_LAYERS = jnp.zeros((2, 1, 1, 2, 2))


def test_layers_add_nothing_by_default() -> None:
    assert of_memory(TWO_LAYERS, [2.0, 3.0], OFF) == {}
    stats = experts_stats([[0.75, 0.25], [0.25, 0.75]], [[4, 0], [0, 4]])
    assert MixtureOfExperts.losses(stats, OFF, num_tokens=4) == {}


def test_balance_loss_sums_over_layers() -> None:
    config = dataclasses.replace(OFF, balance_loss=0.001)
    terms = of_memory(TWO_LAYERS, [2.0, 3.0], config)
    assert terms == {"balance_loss": pytest.approx(0.005, rel=1e-6)}


def test_tucker_penalty_sums_over_layers() -> None:
    # Two cores that sum to diag(2, 0.25) and diag(1, 0.35); only the second value counts.
    first = jnp.asarray([[[[1.5, 0.0], [0.0, 0.0]]], [[[0.5, 0.0], [0.0, 0.25]]]])
    second = jnp.asarray([[[[1.0, 0.0], [0.0, 0.3]]], [[[0.0, 0.0], [0.0, 0.05]]]])
    config = dataclasses.replace(OFF, tucker_penalty=0.5)
    terms = of_memory(jnp.stack([first, second]), [0.0, 0.0], config)
    assert terms == {"tucker_penalty": pytest.approx(0.5 * (0.1**2 + 0.2**2), rel=1e-5)}


def test_tucker_penalty_reaches_the_cores_only_above_the_margin() -> None:
    config = dataclasses.replace(OFF, tucker_penalty=1.0)

    def penalty(cores: jax.Array) -> jax.Array:
        return of_memory(cores, [0.0], config)["tucker_penalty"]

    cores = jnp.diag(jnp.asarray([2.0, 0.25])).reshape(1, 1, 1, 2, 2)
    expected = jnp.zeros_like(cores).at[..., 1, 1].set(2 * 0.1)
    np.testing.assert_allclose(jax.grad(penalty)(cores), expected, atol=1e-6)
    below = jnp.diag(jnp.asarray([2.0, 0.1])).reshape(1, 1, 1, 2, 2)
    assert not jax.grad(penalty)(below).any()


@pytest.mark.parametrize("field", ["balance_loss", "tucker_penalty"])
def test_a_coefficient_scales_its_loss(field: Any) -> None:
    cores = jnp.diag(jnp.asarray([2.0, 0.5])).reshape(1, 1, 1, 2, 2)
    once, thrice = (
        of_memory(cores, [1.5], dataclasses.replace(OFF, **change))[field]
        for change in typing.cast(list[dict[str, Any]], [{field: 1.0}, {field: 3.0}])
    )
    assert once > 0
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def experts_stats(probability: list[list[float]], hits: list[list[int]]) -> RouterStats:
    """Statistics of 4 tokens in two mixtures of experts."""
    p, f = jnp.asarray(probability), jnp.asarray(hits)
    zeros = jnp.zeros(2)
    return RouterStats(
        balance_loss=p.shape[-1] * jnp.sum(f / 4 * p, axis=-1),
        z_loss=jnp.asarray([1.0, 3.0]),
        probability=p,
        output_variance=zeros,
        top_score=zeros,
        last_score=zeros,
        hits=f,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Each layer prefers a different expert; together they are balanced.
        ({"load_balance": 0.5}, 0.5 * 2 * 0.75),
        ({"load_balance": 0.5, "load_balance_scope": "model"}, 0.5 * 2 * (0.5 * 0.5 + 0.5 * 0.5)),
        ({"router_z_loss": 0.1}, 0.1 * 2.0),
    ],
)
def test_router_losses_by_hand_are_means_over_layers(
    given: dict[str, Any], expected: float
) -> None:
    stats = experts_stats([[0.75, 0.25], [0.25, 0.75]], [[4, 0], [0, 4]])
    config = dataclasses.replace(OFF, **given)
    terms = MixtureOfExperts.losses(stats, config, num_tokens=4)
    assert terms == {next(iter(given)): pytest.approx(expected, rel=1e-6)}
