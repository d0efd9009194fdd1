import dataclasses
import math
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import base, families, tiny
from umv2.config import Config, OptimizerConfig, WeightDecayConfig, from_config_dict
from umv2.model import weights
from umv2.model.memory.store import ValueStore
from umv2.model.parameter import Declaration, Group
from umv2.training import optim
from umv2.training.table_gradient import Dense

NUM_STEPS = 100
# Declarations of the parameters of `tiny_tree`.
DECLARED = {
    "params/embedding": Declaration(("vocabulary", "hidden"), "embeddings", "compute"),
    "params/final_norm/weight": Declaration((None,), "norms", "float32"),
}


def optimizer_config(**changes: Any) -> OptimizerConfig:
    config = from_config_dict(base.get_config()).optimizer
    defaults = {"learning_rate": 1.0, "warmup_steps": 10, "final_fraction": 0.1}
    return dataclasses.replace(config, **(defaults | changes))


def small_model(*, tied: bool) -> Config:
    config = base.get_config()
    config.model.hidden_size, config.model.num_layers, config.model.num_heads = 16, 2, 2
    config.model.num_key_value_heads, config.model.ffn_size, config.model.vocab_size = 2, 16, 16
    config.model.tie_embeddings = tied
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4, value_dim=8)
    return from_config_dict(config)


def tiny_tree() -> tuple[dict[str, Any], ValueStore]:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"embedding": draw(3, 2), "final_norm": {"weight": draw(2)}}
    return params, ValueStore(values=draw(4, 2), pre_values=draw(4, 1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1, 150: 0.1}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 55: 1, 100: 1}),
        ("constant_then_cosine", {0: 0, 5: 0.5, 10: 1, 60: 1, 80: 0.55, 100: 0.1}),
    ],
)
def test_learning_rate_at_chosen_steps(schedule: str, expected: dict[int, float]) -> None:
    config = optimizer_config(schedule=schedule, decay_start_step=60)
    rate = optim.learning_rate(config, NUM_STEPS)
    np.testing.assert_allclose(
        [rate(step) for step in expected], list(expected.values()), rtol=1e-6
    )


def test_cosine_schedule_is_a_cosine() -> None:
    rate = optim.learning_rate(optimizer_config(warmup_steps=0), NUM_STEPS)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose([rate(0), rate(25)], [1.0, expected], rtol=1e-6)


def test_values_multiplier_decays_linearly_and_then_stays_constant() -> None:
    config = optimizer_config(
        schedule="constant",
        values_multiplier=4.0,
        values_final_multiplier=1.0,
        values_decay_fraction=0.5,
    )
    rate = optim.values_learning_rate(config, NUM_STEPS)
    # 4 - 3 * step / 50, times the warm-up.
    np.testing.assert_allclose(
        [rate(step) for step in (0, 5, 10, 25, 50, 100)], [0, 1.85, 3.4, 2.5, 1, 1], rtol=1e-6
    )


def test_values_multiplier_multiplies_the_cosine() -> None:
    config = optimizer_config(values_multiplier=1.5, values_final_multiplier=1.5)
    base_rate = optim.learning_rate(config, NUM_STEPS)
    rate = optim.values_learning_rate(config, NUM_STEPS)
    for step in (0, 7, 40, 99):
        np.testing.assert_allclose(rate(step), 1.5 * base_rate(step), rtol=1e-6)


def test_constant_values_learning_rate_has_the_same_warm_up() -> None:
    config = optimizer_config(values_schedule="constant", values_learning_rate=1e-3)
    rate = optim.values_learning_rate(config, NUM_STEPS)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(90)], [0, 5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_model_has_its_group(tied: bool) -> None:
    declared = weights.declarations(small_model(tied=tied).model)
    groups = {name: declaration.group for name, declaration in declared.items()}
    trained = {name: group for name, group in groups.items() if not name.startswith("buffers/")}
    assert set(trained.values()) == set(get_args(Group))
    assert groups["params/embedding"] == "embeddings"
    assert groups["params/final_norm/weight"] == "norms"
    assert groups["params/blocks/attention/query_norm/weight"] == "norms"
    assert groups["params/blocks/ffn/down"] == "matrices"
    assert groups["params/memory/query_norm"] == "norms"
    assert groups["params/memory/query"] == "matrices"
    assert groups["params/memory/cores"] == groups["params/memory/keys"] == "keys"
    assert groups["store/pre_values"] == groups["store/values"] == "values"
    assert groups["buffers/memory/shuffle"] is None
    assert groups.get("params/head") == (None if tied else "matrices")


# The expected group of each parameter of all families, by name.
GROUPS: dict[str, str] = {
    "embeddings": r"params/embedding",
    "norms": r"params/(final_norm|blocks/(\w+/)?\w+_norm)/weight"
    r"|params/memory/((query|key)_norm|\w+_bias)",
    "matrices": r"params/head|params/blocks/attention/(query|key|value|output)"
    r"|params/blocks/ffn/(gate|up|down)|params/blocks/moe/(router|gate|up|down)"
    r"|params/memory/(query|pre|output|output_gate|gate)",
    "keys": r"params/memory/(keys|cores)",
    "values": r"store/(values|pre_values)",
}


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIANTS])
def test_every_parameter_of_every_family_has_its_group(family: str) -> None:
    declared = weights.declarations(from_config_dict(tiny.get_config(family)).model)
    trained = {
        k: declaration.group for k, declaration in declared.items() if not k.startswith("buffers/")
    }
    assert trained
    for name, group in trained.items():
        assert [g for g, pattern in GROUPS.items() if re.fullmatch(pattern, name)] == [group], name


def test_every_group_has_a_weight_decay() -> None:
    assert {field.name for field in dataclasses.fields(WeightDecayConfig)} == set(get_args(Group))


def test_update_matches_adamw_in_numpy() -> None:
    decay = WeightDecayConfig(embeddings=0.1, norms=0.0, matrices=0.3, keys=0.4, values=0.5)
    config = optimizer_config(
        schedule="constant",
        learning_rate=0.01,
        warmup_steps=0,
        clip_norm=1.0,
        weight_decay=decay,
        values_multiplier=4.0,
        values_final_multiplier=4.0,
    )
    optimizer = optim.Optimizer(config, NUM_STEPS, DECLARED)
    trained = tiny_tree()
    opt_state = optimizer.init(*trained)
    update = jax.jit(optimizer.update)
    # Order of the leaves: embedding, final_norm, values, pre_values.
    expected = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(trained)]
    rates, decays = [0.01, 0.01, 0.04, 0.04], [0.1, 0.0, 0.5, 0.5]
    first, second = [np.zeros_like(x) for x in expected], [np.zeros_like(x) for x in expected]

    for step in (1, 2):
        gradients = jax.tree.map(lambda x, scale=step: scale * jnp.cos(x), trained)
        flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in flat))
        assert norm > config.clip_norm
        for i, gradient in enumerate(flat):
            clipped = gradient / norm
            first[i] = 0.9 * first[i] + 0.1 * clipped
            second[i] = 0.95 * second[i] + 0.05 * clipped**2
            direction = first[i] / (1 - 0.9**step)
            direction /= np.sqrt(second[i] / (1 - 0.95**step)) + 1e-8
            expected[i] = expected[i] - rates[i] * (direction + decays[i] * expected[i])
        model_gradient, tables = gradients
        *trained, opt_state, seen_norm = update(model_gradient, Dense(tables), opt_state, *trained)
        np.testing.assert_allclose(seen_norm, norm, rtol=1e-6)
        for leaf, value in zip(jax.tree.leaves(trained), expected, strict=True):
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-7)


def test_clipping_includes_the_store_and_keeps_small_gradients() -> None:
    params, store = tiny_tree()
    config = optimizer_config(warmup_steps=0, clip_norm=5.0)
    optimizer = optim.Optimizer(config, NUM_STEPS, DECLARED)
    zeros = jax.tree.map(jnp.zeros_like, (params, store))

    def first_moments(scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        params_gradient = dict(zeros[0], embedding=jnp.zeros((3, 2)).at[0, 0].set(3 * scale))
        store_gradient = dataclasses.replace(
            zeros[1], values=jnp.zeros((4, 2)).at[1, 1].set(4 * scale)
        )
        _, _, new, norm = optimizer.update(
            params_gradient, Dense(store_gradient), optimizer.init(params, store), params, store
        )
        return new.model[0].mu["embedding"][0, 0], new.store[0].mu.values[1, 1], norm

    # The norm of (3, 4) is 5. First moments after one step: (1 - beta1) times the gradient.
    np.testing.assert_allclose(first_moments(1.0), (0.3, 0.4, 5.0), rtol=1e-6)
    np.testing.assert_allclose(first_moments(0.5), (0.15, 0.2, 2.5), rtol=1e-6)
    np.testing.assert_allclose(first_moments(10.0), (0.3, 0.4, 50.0), rtol=1e-6)


def test_a_zero_gradient_stays_finite() -> None:
    params, store = tiny_tree()
    optimizer = optim.Optimizer(optimizer_config(warmup_steps=0), NUM_STEPS, DECLARED)
    gradients = jax.tree.map(jnp.zeros_like, (params, store))
    updated = optimizer.update(
        gradients[0], Dense(gradients[1]), optimizer.init(params, store), params, store
    )
    assert updated[3] == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updated))


def test_values_learning_rate_affects_only_the_store() -> None:
    params, store = tiny_tree()
    gradients = jax.tree.map(jnp.ones_like, (params, store))

    def step(multiplier: float) -> tuple[Any, Any]:
        config = optimizer_config(
            warmup_steps=0, values_multiplier=multiplier, values_final_multiplier=multiplier
        )
        optimizer = optim.Optimizer(config, NUM_STEPS, DECLARED)
        return optimizer.update(
            gradients[0], Dense(gradients[1]), optimizer.init(params, store), params, store
        )[:2]

    (params_1, store_1), (params_3, store_3) = step(1.0), step(3.0)
    jax.tree.map(np.testing.assert_array_equal, params_1, params_3)
    np.testing.assert_allclose(
        store_3.values - store.values, 3 * (store_1.values - store.values), rtol=1e-4
    )


def test_a_dense_model_has_no_store_to_update() -> None:
    params, _ = tiny_tree()
    optimizer = optim.Optimizer(optimizer_config(warmup_steps=0), NUM_STEPS, DECLARED)
    gradient = jax.tree.map(jnp.ones_like, params)
    new_params, store, _, norm = jax.jit(optimizer.update)(
        gradient, Dense(None), optimizer.init(params, None), params, None
    )
    assert store is None
    np.testing.assert_allclose(norm, math.sqrt(8), rtol=1e-6)
    assert not np.array_equal(new_params["embedding"], params["embedding"])


def test_moments_are_sharded_like_their_parameters() -> None:
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    optimizer = optim.Optimizer(optimizer_config(warmup_steps=0), NUM_STEPS, DECLARED)
    params, _ = tiny_tree()
    with jax.set_mesh(mesh):
        values = jax.device_put(jnp.ones((16, 2)), PartitionSpec("replica"))
        store = ValueStore(values=values, pre_values=None)
        params = jax.device_put(params, PartitionSpec())
        opt_state = jax.jit(optimizer.init)(params, store)
        gradient, tables = jax.tree.map(jnp.ones_like, (params, store))
        _, new_store, opt_state, _ = jax.jit(optimizer.update)(
            gradient, Dense(tables), opt_state, params, store
        )
    for array in (new_store.values, opt_state.store[0].mu.values, opt_state.store[0].nu.values):
        assert array.sharding.spec[0] == "replica"
        assert array.addressable_shards[0].data.shape == (2, 2)


def test_reported_learning_rates_apply_to_the_next_update() -> None:
    config = optimizer_config(values_multiplier=2.0, values_final_multiplier=2.0)
    rates = optim.Optimizer(config, NUM_STEPS, DECLARED).learning_rates(5)
    assert rates == pytest.approx({"learning_rate": 0.5, "values_learning_rate": 1.0})
