"""The mixture of experts: its output at any load skew, and how its gradients are computed."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from tests import meshes, slots
from tests.model.drawn import drawn
from umv2 import sharding
from umv2.config import ModelConfig, from_config_dict
from umv2.model.moe import experts
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import ABSTRACT, Initializer
from umv2.model.slots import Observe

HEALTH = Observe(health=True)
_EXPERTS = 6
_HIDDEN, _INNER = 8, 5


def _config(**fields: Any) -> ModelConfig:
    config = base.get_config()
    slots.fill(config, "moe", hidden_size=_HIDDEN, num_heads=2, num_key_value_heads=2)
    config.model.compute_dtype = "float32"
    config.model.moe.update({"num_experts": _EXPERTS, "top_k": 2, "expert_size": _INNER} | fields)
    return from_config_dict(config).model


def _layer(config: ModelConfig) -> MixtureOfExperts:
    return drawn(MixtureOfExperts(config, init=ABSTRACT))


def _inputs(batch: int = 2, length: int = 7, seed: int = 1) -> jax.Array:
    """Normal inputs with one feature that is always 1, so that its router row acts as a bias."""
    x = np.random.default_rng(seed).normal(size=(batch, length, _HIDDEN))
    x[..., 0] = 1
    return jnp.asarray(x, jnp.float32)


@jax.jit
def _apply(layer: MixtureOfExperts, x: jax.Array) -> tuple[jax.Array, Any]:
    return layer(x, observe=HEALTH)


def _objective(layer: MixtureOfExperts, x: jax.Array) -> jax.Array:
    """A scalar function of the output and both losses."""
    y, stats = layer(x, observe=HEALTH)
    assert stats is not None
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape[1:] + x.shape[:1])
    return jnp.sum(y * weights.transpose(2, 0, 1)) + stats.balance_loss + stats.z_loss


def _loop(layer: MixtureOfExperts, x: jax.Array) -> dict[str, np.ndarray]:
    """Computes the layer and its statistics per token and expert, in float64."""
    names = ("router", "gate", "up", "down")
    router, gate, up, down = (np.asarray(getattr(layer, name)[...], np.float64) for name in names)
    tokens = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    y, hits = np.zeros_like(tokens), np.zeros(len(gate), int)
    probabilities, partitions, weights = [], [], []
    for index, token in enumerate(tokens):
        exponentials = np.exp(token @ router)
        probability = exponentials / exponentials.sum()
        chosen = np.argsort(-probability, kind="stable")[: layer.config.top_k]
        weight = probability[chosen]
        if layer.config.renormalize:
            weight = weight / weight.sum()
        for expert, share in zip(chosen, weight, strict=True):
            gated = token @ gate[expert]
            inner = gated / (1 + np.exp(-gated)) * (token @ up[expert])
            y[index] += share * (inner @ down[expert])
            hits[expert] += 1
        probabilities.append(probability)
        partitions.append(np.log(exponentials.sum()))
        weights.append(weight)
    mean = np.mean(probabilities, axis=0)
    return {
        "y": y.reshape(x.shape),
        "hits": hits,
        "probability": mean,
        "z_loss": np.mean(np.square(partitions)),
        "balance_loss": len(gate) * np.sum(hits / len(tokens) * mean),
        "top_score": np.mean(weights, axis=0)[0],
        "last_score": np.mean(weights, axis=0)[-1],
    }


def _assert_equals_loop(layer: MixtureOfExperts, x: jax.Array) -> np.ndarray:
    """Compares output and statistics; returns the output."""
    expected = _loop(layer, x)
    y, stats = _apply(layer, x)
    got = dataclasses.asdict(stats) | {"y": y}
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(stats.output_variance, np.var(y), rtol=1e-5)
    return np.asarray(y)


@given(
    top_k=st.sampled_from([1, 2, 6]),
    biases=st.lists(st.sampled_from([-20.0, -1.0, 0.0, 1.0, 20.0]), min_size=6, max_size=6),
    seed=st.integers(0, 3),
)
def test_no_token_is_dropped_at_any_skew(top_k: int, biases: list[float], seed: int) -> None:
    layer, x = _layer(_config(top_k=top_k)), _inputs(seed=seed)
    layer.router[...] = layer.router[...].at[0].set(jnp.asarray(biases))
    _assert_equals_loop(layer, x)
    assert int(_apply(layer, x)[1].hits.sum()) == x.shape[0] * x.shape[1] * top_k


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_all_tokens_may_go_to_one_expert(expert: int) -> None:
    layer, x = _layer(_config(top_k=1)), _inputs()
    layer.router[...] = layer.router[...].at[0, expert].set(100.0)
    _assert_equals_loop(layer, x)
    assert _apply(layer, x)[1].hits.tolist() == [14 if e == expert else 0 for e in range(6)]


def test_renormalized_weights_add_up_to_1() -> None:
    x = _inputs()
    plain, renormalized = (_layer(_config(renormalize=flag)) for flag in (False, True))
    assert np.abs(_assert_equals_loop(plain, x) - _assert_equals_loop(renormalized, x)).max() > 0.01
    stats = _apply(renormalized, x)[1]
    np.testing.assert_allclose(stats.top_score + stats.last_score, 1, rtol=1e-6)
    assert float(_apply(plain, x)[1].top_score + _apply(plain, x)[1].last_score) < 0.95


def test_ties_between_experts_go_to_the_lower_index() -> None:
    layer = _layer(_config(top_k=3))
    layer.router[...] = jnp.zeros((_HIDDEN, _EXPERTS)).at[0, 4].set(1.0)
    assert _apply(layer, _inputs())[1].hits.tolist() == [14, 14, 0, 0, 14, 0]


def test_perfect_balance_costs_top_k() -> None:
    layer = _layer(_config())
    # Token t prefers experts t and t + 1 (mod 6): each is chosen as often as any other.
    x = jnp.asarray(np.eye(_EXPERTS, _HIDDEN)[None], jnp.float32)
    preferred = np.eye(_EXPERTS) + np.roll(np.eye(_EXPERTS), 1, axis=1)
    layer.router[...] = jnp.zeros((_HIDDEN, _EXPERTS)).at[:_EXPERTS].set(preferred)
    stats = _apply(layer, x)[1]
    assert stats.hits.tolist() == [2] * _EXPERTS
    np.testing.assert_allclose(stats.balance_loss, 2, rtol=1e-6)


# --- the two implementations ---


def _use(patch: pytest.MonkeyPatch, implementation: str) -> None:
    def choose(ragged: Callable[..., Any], blocked: Callable[..., Any], *operands: Any) -> Any:
        if implementation == "ragged":
            return ragged(*operands)
        return blocked(*operands, max_block_rows=int(implementation))

    patch.setattr(experts, "_by_platform", choose)


_CHOICES = {
    "even": np.arange(24).reshape(12, 2) % _EXPERTS,
    "one expert": np.full((12, 1), 3),
    "first and last unused": 1 + np.random.default_rng(0).integers(0, 4, (11, 3)),
    "a single token": np.array([[5, 0]]),
}


def _mixture_arguments(choices: np.ndarray) -> tuple[Any, ...]:
    generator = np.random.default_rng(2)
    shapes = [
        (len(choices), _HIDDEN),
        choices.shape,
        (_EXPERTS, _HIDDEN, _INNER),
        (_EXPERTS, _HIDDEN, _INNER),
        (_EXPERTS, _INNER, _HIDDEN),
    ]
    return tuple(jnp.asarray(generator.normal(size=shape)) for shape in shapes)


def _sorted(choices: np.ndarray) -> Callable[..., jax.Array]:
    def mixture(x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
        dispatch = experts.plan_dispatch(jnp.asarray(choices, jnp.int32), _EXPERTS)
        return experts.mixture(x, weights, dispatch, matrices[:2], matrices[2])

    return mixture


def _joined(choices: np.ndarray) -> Callable[..., jax.Array]:
    """The mixture with gate and up in one array, as in served models."""

    def mixture(x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
        dispatch = experts.plan_dispatch(jnp.asarray(choices, jnp.int32), _EXPERTS)
        both = jnp.concatenate(matrices[:2], axis=-1)
        return experts.mixture(x, weights, dispatch, [both], matrices[2])

    return mixture


def _dense(choices: np.ndarray) -> Callable[..., jax.Array]:
    """The mixture computed with every expert on every token."""

    def mixture(x: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
        gate, up, down = matrices
        inner = jax.nn.silu(jnp.einsum("td,eds->tes", x, gate)) * jnp.einsum("td,eds->tes", x, up)
        hot = jnp.asarray(choices[:, :, None] == np.arange(_EXPERTS), x.dtype)
        return jnp.einsum("tes,esd,tke,tk->td", inner, down, hot, weights)

    return mixture


def _output_and_gradients(mixture: Callable[..., jax.Array], arguments: Any) -> list[jax.Array]:
    @jax.jit
    def run(arguments: Any) -> Any:
        y, pull_back = jax.vjp(mixture, *arguments)
        return [y, *pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))]

    return run(arguments)


@pytest.mark.slow(fast=["first and last unused", "even-4"])
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["ragged", "4", "128"])
@pytest.mark.parametrize("skew", _CHOICES)
def test_implementations_match_the_dense_sum(
    implementation: str, skew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = _CHOICES[skew]
    arguments = _mixture_arguments(choices)
    expected = _output_and_gradients(_dense(choices), arguments)
    _use(monkeypatch, implementation)
    got = _output_and_gradients(_sorted(choices), arguments)
    for left, right in zip(got, expected, strict=True):
        assert np.abs(right).max() > 0.01
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["ragged", "4"])
def test_gate_and_up_in_one_array_give_the_same_result(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, implementation)
    choices = _CHOICES["even"]
    arguments = _mixture_arguments(choices)
    separate, joined = (jax.jit(f(choices))(*arguments) for f in (_sorted, _joined))
    np.testing.assert_allclose(joined, separate, rtol=1e-11, atol=1e-12)


def test_the_lowering_platform_selects_the_implementation() -> None:
    choices = _CHOICES["even"]
    gradient = jax.jit(lambda arguments: _output_and_gradients(_sorted(choices), arguments))
    traced = gradient.trace(_mixture_arguments(choices))

    def text(platform: str) -> str:
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "ragged_dot" in text("tpu")
    assert "dynamic_update_slice" not in text("tpu")
    for platform in ("cpu", "cuda"):
        assert "ragged_dot" not in text(platform)
        assert "dynamic_update_slice" in text(platform)


def test_experts_without_tokens_are_not_read() -> None:
    layer, x = _layer(_config()), _inputs(batch=1, length=1)
    y, stats = _apply(layer, x)
    unused = np.flatnonzero(np.asarray(stats.hits) == 0)
    assert len(unused) == 4
    layer.down[...] = layer.down[...].at[unused].set(np.nan)
    np.testing.assert_array_equal(_apply(layer, x)[0], y)
    layer.down[...] = jnp.full_like(layer.down[...], np.nan)
    assert np.isnan(_apply(layer, x)[0]).all()


# --- gradients, transformations, devices ---


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Yields the names of all primitives, including nested ones."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def test_gradient_has_no_scatter_add() -> None:
    layer, x = _layer(_config(renormalize=True)), _inputs()
    names = set(_primitives(jax.make_jaxpr(jax.grad(_objective, argnums=(0, 1)))(layer, x).jaxpr))
    assert {"gather", "while", "sort", "top_k", "ragged_dot_general"} <= names
    assert not {name for name in names if name.startswith("scatter-")}

    def gathered(x: jax.Array) -> jax.Array:
        return jnp.sum(x[:, jnp.asarray([0, 0, 1])])

    assert "scatter-add" in set(_primitives(jax.make_jaxpr(jax.grad(jax.jit(gathered)))(x).jaxpr))


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_a_loop(remat: bool) -> None:
    config, x = _config(), _inputs()
    layers = [drawn(MixtureOfExperts(config, init=ABSTRACT), seed) for seed in (0, 1)]

    def step(x: jax.Array, layer: MixtureOfExperts) -> tuple[jax.Array, Any]:
        y, stats = layer(x, observe=HEALTH)
        assert stats is not None
        return x + y, stats.balance_loss

    def scanned(stacked: Any, x: jax.Array) -> jax.Array:
        y, losses = jax.lax.scan(jax.checkpoint(step) if remat else step, x, stacked)
        return jnp.sum(jnp.sin(y)) + jnp.sum(losses)

    def looped(layers: Any, x: jax.Array) -> jax.Array:
        loss = jnp.zeros(())
        for layer in layers:
            x, balance = step(x, layer)
            loss += balance
        return jnp.sum(jnp.sin(x)) + loss

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    got = jax.jit(jax.grad(scanned, argnums=(0, 1)))(stacked, x)
    of_layers, of_x = jax.jit(jax.grad(looped, argnums=(0, 1)))(layers, x)
    expected = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers), of_x)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(right).max()) > 1e-3
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_eight_devices_equal_one() -> None:
    config = _config()
    layer, x = _layer(config), _inputs(batch=8, length=3)
    run = jax.jit(
        lambda layer, x: (layer(x, observe=HEALTH), jax.grad(_objective, argnums=(0, 1))(layer, x))
    )
    one = run(layer, x)
    mesh = meshes.create(replica=8)
    with jax.set_mesh(mesh):
        eight = run(meshes.replicate(layer, mesh), jax.device_put(x, sharding.batch_sharding(mesh)))
    assert len(one[0][0].sharding.device_set) == 1
    assert eight[0][0].sharding.spec[0] == sharding.DATA_AXES
    for left, right in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_layers_route_in_float32() -> None:
    layer, x = _layer(_config()), _inputs().astype(jnp.bfloat16)
    y, stats = _apply(layer, x)
    assert y.dtype == jnp.bfloat16
    float32, int32 = jnp.dtype("float32"), jnp.dtype("int32")
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {float32, int32}
    # Routing does not use bfloat16 products: it equals that of the inputs cast to float32.
    wide, wide_stats = _apply(layer, x.astype(jnp.float32))
    np.testing.assert_array_equal(stats.hits, wide_stats.hits)
    np.testing.assert_array_equal(stats.probability, wide_stats.probability)
    np.testing.assert_allclose(
        y.astype(jnp.float32), wide, rtol=0.05, atol=0.02 * float(jnp.abs(wide).max())
    )
    assert float(jnp.abs(y.astype(jnp.float32) - wide).max()) > 0
    gradient = jax.jit(jax.grad(_objective))(layer, x)
    expected = jax.jit(jax.grad(_objective))(layer, x.astype(jnp.float32))
    for left, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert left.dtype == jnp.float32
        np.testing.assert_allclose(left, right, rtol=0.1, atol=0.03 * float(jnp.abs(right).max()))


def test_initial_deviations_match_linear_layers() -> None:
    config = dataclasses.replace(_config(expert_size=64), hidden_size=64, num_layers=8)
    layer = MixtureOfExperts(config, init=Initializer(jax.random.key(0)))
    linear = (2 / (5 * 64)) ** 0.5
    for name, expected in (("gate", linear), ("up", linear), ("down", linear / 4)):
        np.testing.assert_allclose(jnp.std(getattr(layer, name)[...]), expected, rtol=0.03)
    np.testing.assert_allclose(jnp.std(layer.router[...]), linear, rtol=0.15)
    assert not np.array_equal(layer.gate[...], layer.up[...])
