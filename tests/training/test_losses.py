import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from umv2 import types
from umv2.config import LossConfig
from umv2.model import transformer
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


def model_stats(balance: list[float] | None) -> transformer.ModelStats:
    sparse = None
    if balance is not None:
        zeros = jnp.zeros(len(balance))
        sparse = types.LayerStats(
            balance_loss=jnp.asarray(balance),
            router_z_loss=zeros,
            router_probability=jnp.zeros((len(balance), 0)),
            output_variance=zeros,
            top_score=zeros,
            last_score=zeros,
            hits=jnp.zeros((len(balance), 4), jnp.int32),
        )
    return transformer.ModelStats(ffn_variance=jnp.ones(2), sparse=sparse)


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


def test_eight_devices_agree_with_one() -> None:
    logits, targets, weights = example()

    def total(logits: Any, targets: Any, weights: Any) -> jax.Array:
        nll, squared, count = losses.cross_entropy(logits, targets, weights)
        return (nll + 0.1 * squared) / count

    step = jax.value_and_grad(total)
    loss, gradient = jax.jit(step)(logits, targets, weights)
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        divided = jax.device_put((logits, targets, weights), PartitionSpec("replica"))
        divided_loss, divided_gradient = jax.jit(step)(*divided)
    assert gradient.sharding.num_devices == 1
    assert divided_gradient.sharding.spec[0] == "replica"
    np.testing.assert_allclose(divided_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(divided_gradient, gradient, atol=1e-7)


def test_auxiliary_losses_are_off_by_default() -> None:
    assert losses.auxiliary(model_stats(None), {}, OFF, num_tokens=8) == 0


def test_balance_loss_sums_over_layers() -> None:
    config = dataclasses.replace(OFF, balance_loss=0.001)
    total = losses.auxiliary(model_stats([2.0, 3.0]), {}, config, num_tokens=8)
    np.testing.assert_allclose(total, 0.005, rtol=1e-6)


def test_tucker_penalty_sums_over_layers() -> None:
    # Two cores that add up to diag(2, 0.25) and diag(1, 0.35); only the second value counts.
    first = jnp.asarray([[[[1.5, 0.0], [0.0, 0.0]]], [[[0.5, 0.0], [0.0, 0.25]]]])
    second = jnp.asarray([[[[1.0, 0.0], [0.0, 0.3]]], [[[0.0, 0.0], [0.0, 0.05]]]])
    params = {"sparse": {"cores": jnp.stack([first, second])}}
    config = dataclasses.replace(OFF, tucker_penalty=0.5)
    total = losses.auxiliary(model_stats([0.0, 0.0]), params, config, num_tokens=8)
    np.testing.assert_allclose(total, 0.5 * (0.1**2 + 0.2**2), rtol=1e-5)


def test_tucker_penalty_reaches_the_cores_only_above_the_margin() -> None:
    config = dataclasses.replace(OFF, tucker_penalty=1.0)

    def penalty(cores: jax.Array) -> jax.Array:
        return losses.auxiliary(
            model_stats([0.0]), {"sparse": {"cores": cores}}, config, num_tokens=8
        )

    cores = jnp.diag(jnp.asarray([2.0, 0.25])).reshape(1, 1, 1, 2, 2)
    expected = jnp.zeros_like(cores).at[..., 1, 1].set(2 * 0.1)
    np.testing.assert_allclose(jax.grad(penalty)(cores), expected, atol=1e-6)
    below = jnp.diag(jnp.asarray([2.0, 0.1])).reshape(1, 1, 1, 2, 2)
    assert not jax.grad(penalty)(below).any()


@pytest.mark.parametrize("field", ["balance_loss", "tucker_penalty"])
def test_a_coefficient_scales_its_loss(field: Any) -> None:
    params = {"sparse": {"cores": jnp.diag(jnp.asarray([2.0, 0.5])).reshape(1, 1, 1, 2, 2)}}
    stats = model_stats([1.5])
    once, thrice = (
        losses.auxiliary(stats, params, dataclasses.replace(OFF, **change), num_tokens=8)
        for change in typing.cast(list[dict[str, Any]], [{field: 1.0}, {field: 3.0}])
    )
    assert once > 0
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def experts_stats(probability: list[list[float]], hits: list[list[int]]) -> types.LayerStats:
    """Statistics of 4 tokens in two mixtures of experts."""
    p, f = jnp.asarray(probability), jnp.asarray(hits)
    zeros = jnp.zeros(2)
    return types.LayerStats(
        balance_loss=p.shape[-1] * jnp.sum(f / 4 * p, axis=-1),
        router_z_loss=jnp.asarray([1.0, 3.0]),
        router_probability=p,
        output_variance=zeros,
        top_score=zeros,
        last_score=zeros,
        hits=f,
    )


def test_load_balance_by_hand() -> None:
    # Each layer favours its own expert; together they are balanced.
    stats = experts_stats([[0.75, 0.25], [0.25, 0.75]], [[4, 0], [0, 4]])
    apart = losses.load_balance(stats, "layer", num_tokens=4)
    together = losses.load_balance(stats, "model", num_tokens=4)
    np.testing.assert_allclose(apart, 2 * 0.75, rtol=1e-6)
    np.testing.assert_allclose(together, 2 * (0.5 * 0.5 + 0.5 * 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"load_balance": 0.5}, 0.5 * 1.5),
        ({"load_balance": 0.5, "load_balance_scope": "model"}, 0.5 * 1.0),
        ({"router_z_loss": 0.1}, 0.1 * 2.0),
    ],
)
def test_router_losses_are_means_over_layers(given: dict[str, Any], expected: float) -> None:
    stats = experts_stats([[0.75, 0.25], [0.25, 0.75]], [[4, 0], [0, 4]])
    model_stats = transformer.ModelStats(ffn_variance=jnp.zeros(2), sparse=stats)
    config = dataclasses.replace(OFF, **given)
    total = losses.auxiliary(model_stats, {}, config, num_tokens=4)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
