"""The two slots of a block: both together, each alone, and what they report."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from tests import slots
from tests.model.drawn import drawn
from umv2.config import ConfigError, LossConfig, ModelConfig, from_config_dict
from umv2.cost import accounting, traffic
from umv2.model import layers, weights
from umv2.model.memory import retrieval
from umv2.model.memory.store import StoreWindow
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.slots import LayerCost, MemorySlot, MemoryStats, Observe, memory_layer
from umv2.model.transformer import Transformer
from umv2.model.weights import Weights
from umv2.training import health, state

LENGTH = 6
ALL = Observe(health=True, key_balance=True)


def config_of(kind: str, *, layer: str = "", **model: Any) -> ModelConfig:
    """A small model with slots as in tests/slots.py; all of its sizes differ."""
    values = base.get_config()
    slots.fill(values, kind)
    if values.model.ffn == "dense":
        values.model.ffn_size = 24
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_heads": 4, "num_key_value_heads": 2}
    values.model.update(sizes | {"num_layers": 2, "compute_dtype": "float32"} | model)
    values.model.moe.update(num_experts=6, top_k=2, expert_size=8)
    values.model.memory.update(num_keys=7, key_dim=10, value_dim=12, pre_value_dim=14)
    values.model.memory.update(top_m=3, shortlist=5)
    values.model.memory.layer = layer or values.model.memory.layer
    return from_config_dict(values).model


def losses_of(**coefficients: Any) -> LossConfig:
    return dataclasses.replace(from_config_dict(base.get_config()).loss, **coefficients)


def weights_of(config: ModelConfig) -> Weights:
    return drawn(weights.abstract(config))


def tokens_of(config: ModelConfig, length: int = LENGTH) -> jax.Array:
    tokens = np.random.default_rng(2).permutation(config.vocab_size)[: 2 * length]
    return jnp.asarray(tokens.reshape(2, length), jnp.int32)


@functools.cache
def observed(config: ModelConfig, observe: Observe) -> Any:
    """Returns the logits of a model and its statistics."""
    tokens = tokens_of(config)

    @jax.jit
    def run(params: Any, buffers: Any, store: Any) -> Any:
        model = Weights(params=params, buffers=buffers, store=store).model(config)
        output = model(tokens, store=store, observe=observe)
        return output.logits, output.stats

    given = weights_of(config)
    return run(given.params, given.buffers, given.store)


def member(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def by_hand(config: ModelConfig) -> jax.Array:
    """Computes logits; every slot reads the same normalised input and adds to the residual."""
    given, tokens = weights_of(config), tokens_of(config)
    model = given.model(config)

    @jax.jit
    def run(model: Transformer, store: Any) -> jax.Array:
        x = model.embedding[...][tokens]
        for index in range(config.num_layers):
            block = member(model.blocks, index)
            residual = x + block.attention(block.attention_norm(x))[0]
            y = block.ffn_norm(residual)
            x = residual
            if config.ffn_size:
                inner = jax.nn.silu(y @ block.ffn.gate[...]) * (y @ block.ffn.up[...])
                x += inner @ block.ffn.down[...]
            if config.ffn == "moe":
                x += block.moe(y, observe=Observe())[0]
            if config.placements:
                window = StoreWindow(store=member(store, index), start=0)
                x += member(model.memory, index)(y, window=window, observe=Observe())[0]
        return layers.linear(model.final_norm(x), model.embedding[...].T)

    return run(model, given.store)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "memory": ("memory", {}),
    "memory alone": ("memory", {"ffn": "none", "ffn_size": 0}),
    "experts": ("moe", {}),
    "experts and a memory": ("both", {}),
    "shared expert, experts and a memory": ("both", {"ffn_size": 24}),
}


@pytest.mark.slow(fast=["shared expert, experts and a memory", "memory alone", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_sums_the_outputs_of_its_slots(kind: str) -> None:
    slots_of, fields = KINDS[kind]
    config = config_of(slots_of, **fields)
    logits, _ = observed(config, Observe())
    np.testing.assert_allclose(logits, by_hand(config), rtol=2e-4, atol=2e-4)
    # No summand is too small to be noticed.
    assert np.abs(logits).max() > 1


def test_every_slot_contributes_to_the_output() -> None:
    config = config_of("both", ffn_size=24)
    logits, _ = observed(config, Observe())
    for part in ("params/blocks/ffn/down", "params/blocks/moe/down", "store/values"):
        given = weights_of(config)
        names = list(given.named())
        leaves, structure = jax.tree.flatten(given)
        leaves[names.index(part)] *= 0
        without: Any = jax.tree.unflatten(structure, leaves)
        output = jax.jit(lambda model, store: model(tokens_of(config), store=store).logits)(
            without.model(config), without.store
        )
        assert np.abs(output - logits).max() > 0.01, part


# --- what is reported ---


@pytest.mark.slow
def test_both_slots_report_statistics_of_every_layer() -> None:
    config = config_of("both", ffn_size=24)
    _, stats = observed(config, ALL)
    router, memory = stats.feed_forward.router, stats.memory
    for slot, choices, selected in (
        (memory, config.memory.num_visible, config.memory.num_selected),
        (router, config.moe.num_experts, config.moe.top_k),
    ):
        for field in dataclasses.fields(slot):
            values = getattr(slot, field.name)
            assert values.shape[0] == 2, field.name
            assert np.isfinite(values).all(), field.name
        assert slot.hits.shape == (2, choices)
        assert slot.hits.sum(axis=1).tolist() == [2 * LENGTH * selected] * 2
        assert (slot.top_score > slot.last_score).all()
    assert (stats.feed_forward.ffn_variance > 0).all()
    # Equal to those of each slot alone in the first block, where the inputs are equal.
    single = observed(config_of("moe", ffn_size=24), ALL)[1].feed_forward
    np.testing.assert_array_equal(single.router.hits[0], router.hits[0])
    np.testing.assert_allclose(
        single.ffn_variance[0], stats.feed_forward.ffn_variance[0], rtol=1e-5
    )


def test_both_slots_add_their_losses() -> None:
    config = config_of("both")
    model = weights_of(config).model(config)
    _, stats = observed(config, ALL)
    num_tokens = 2 * LENGTH
    loss = losses_of(balance_loss=2.0, tucker_penalty=3.0, load_balance=5.0, router_z_loss=7.0)
    terms = model.losses(stats, loss, num_tokens=num_tokens)
    penalties = [
        retrieval.tucker_penalty(cores, loss.tucker_margin) for cores in model.memory.cores[...]
    ]
    router = stats.feed_forward.router
    expected = {
        "balance_loss": 2 * stats.memory.balance_loss.sum(),
        "tucker_penalty": 3 * sum(penalties),
        "load_balance": 5 * router.balance_loss.mean(),
        "router_z_loss": 7 * router.z_loss.mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    # Losses with coefficient 0 are absent.
    assert model.losses(stats, losses_of(), num_tokens=num_tokens) == {}
    some = losses_of(tucker_penalty=3.0, load_balance=5.0)
    assert model.losses(stats, some, num_tokens=num_tokens).keys() == {
        "tucker_penalty",
        "load_balance",
    }
    for kind, names in (("dense", set()), ("moe", {"load_balance", "router_z_loss"})):
        other = config_of(kind)
        model = weights_of(other).model(other)
        assert model.losses(observed(other, ALL)[1], loss, num_tokens=12).keys() == names
    memory = config_of("memory")
    of_memory = weights_of(memory).model(memory)
    terms = of_memory.losses(observed(memory, ALL)[1], loss, num_tokens=12)
    assert terms.keys() == {"balance_loss", "tucker_penalty"}


def test_the_model_level_balance_loss_uses_means_over_layers() -> None:
    config = config_of("moe")
    router = observed(config, ALL)[1].feed_forward.router
    loss = losses_of(load_balance=5.0)
    together = dataclasses.replace(loss, load_balance_scope="model")
    joint = MixtureOfExperts.losses(router, together, num_tokens=2 * LENGTH)["load_balance"]
    chosen = router.hits.mean(axis=0) / (2 * LENGTH)
    expected = 5 * 6 * np.sum(chosen * router.probability.mean(axis=0))
    np.testing.assert_allclose(joint, expected, rtol=1e-5)
    separate = MixtureOfExperts.losses(router, loss, num_tokens=2 * LENGTH)["load_balance"]
    assert not np.allclose(separate, joint, rtol=1e-3)


@pytest.mark.slow
def test_both_slots_report_health_under_their_own_names() -> None:
    of_memory = {"coverage", "uniform_kl", "output_std", "output_to_ffn_std"}
    of_memory |= {"top_score", "last_score"}
    of_cores = {"lambda_1", "lambda_2"}
    of_router = {f"expert_{name}" for name in of_memory} | {"balance_loss", "router_z_loss"}
    without_ffn = {"output_to_ffn_std", "expert_output_to_ffn_std"}
    expected = {
        "dense": set(),
        "memory": of_memory | of_cores,
        "memory alone": (of_memory | of_cores) - without_ffn,
        "experts": of_router - without_ffn,
        "experts and a memory": (of_memory | of_cores | of_router) - without_ffn,
        "shared expert, experts and a memory": of_memory | of_cores | of_router,
    }
    for kind, names in expected.items():
        slots_of, fields = KINDS[kind]
        config = config_of(slots_of, **fields)
        _, stats = observed(config, ALL)
        usage = health.hits(stats)
        shapes = {name: hits.shape for name, hits in usage.items()}
        assert shapes == state.usage_shapes(config), kind
        measures = health.arrays(config, stats, usage, weights_of(config))
        assert measures.keys() == names, kind
        for name, values in measures.items():
            assert values.shape == (2,), name
            assert np.isfinite(values).all(), name


def test_the_cost_of_both_slots_is_the_sum_of_each_alone() -> None:
    both, experts, memory, dense = (
        accounting.parameter_counts(config_of(kind)).as_dict()
        for kind in ("both", "moe", "memory", "dense")
    )
    for part in ("sparse_projections", "routing", "sparse_values", "selected"):
        assert both[part] == experts[part] + memory[part]
        assert dense[part] == 0
    config = config_of("both")
    costs = accounting.slots(config)
    assert [count for count, _ in (costs.memory, costs.experts)] == [2, 2]
    assert accounting.slots(config_of("dense")).sum("routing") == 0
    arrays = weights.abstract(config).named().items()
    assert both["total"] == sum(a.size for name, a in arrays if not name.startswith("buffers/"))
    values = [traffic.decode_bytes(config_of(kind), 4, 9).sparse_values for kind in ("both", "moe")]
    rows = traffic.decode_bytes(config_of("memory"), 4, 9).sparse_values
    assert values[0] == pytest.approx(values[1] + rows)


def test_counters_of_both_slots_are_part_of_the_state() -> None:
    values = base.get_config()
    slots.fill(values, "both")
    config = from_config_dict(values)
    usage = state.abstract_state(config).usage
    memory, moe = config.model.memory, config.model.moe
    assert {name: leaf.shape for name, leaf in usage.items()} == {
        "memory": (4, memory.num_visible),
        "router": (4, moe.num_experts),
    }


# --- what is not asked for ---


@pytest.mark.slow
def test_unobserved_statistics_are_none() -> None:
    config = config_of("both", ffn_size=24)
    _, stats = observed(config, Observe())
    assert jax.tree.leaves(stats) == []
    assert stats.feed_forward.ffn_variance is None
    assert stats.feed_forward.router is None
    assert stats.memory == MemoryStats(*[None] * len(dataclasses.fields(MemoryStats)))
    _, stats = observed(config, Observe(key_balance=True))
    assert stats.feed_forward.router is None
    assert jax.tree.leaves(stats) == [stats.memory.balance_loss]
    _, stats = observed(config, Observe(health=True))
    assert stats.memory.balance_loss is None
    assert stats.memory.hits is not None
    assert stats.feed_forward.router.balance_loss is not None


def test_training_observes_the_balance_of_keys_if_it_is_in_the_loss() -> None:
    assert Observe.training(losses_of()) == Observe(health=True)
    assert Observe.training(losses_of(balance_loss=0.1)) == ALL
    assert Observe() == Observe(health=False, key_balance=False)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations, including nested ones."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(config: ModelConfig, observe: Observe) -> dict[str, int]:
    """Counts products and softmaxes over keys, counters and variances in the program."""
    abstract, tokens = weights.abstract(config), tokens_of(config)
    leaves, structure = jax.tree.flatten(abstract)

    def run(*leaves: jax.Array) -> Any:
        given: Any = jax.tree.unflatten(structure, leaves)
        output = given.model(config)(tokens, store=given.store, observe=observe)
        return jax.tree.leaves((output.logits, output.stats))

    counts = {"products with keys": 0, "softmaxes over keys": 0, "counts": 0, "variances": 0}
    memory = config.memory
    for equation in equations(jax.make_jaxpr(run)(*leaves).jaxpr):
        shapes = [v.aval.shape for v in equation.invars]
        match equation.primitive.name:
            case "dot_general":
                (left, _), _ = equation.params["dimension_numbers"]
                contracted = math.prod(shapes[0][axis] for axis in left)
                counts["products with keys"] += contracted == memory.key_dim
            case "exp":
                counts["softmaxes over keys"] += shapes[0][-1:] == (memory.keys_per_side,)
            case "scatter-add" | "scatter":
                counts["counts"] += shapes[0] == (memory.num_visible,)
            case "square" | "integer_pow":
                counts["variances"] += shapes[0] == (2, LENGTH, config.hidden_size)
    return counts


def test_unobserved_statistics_are_not_computed() -> None:
    config = config_of("both", ffn_size=24)
    nothing = traced(config, Observe())
    watched, balanced = traced(config, Observe(health=True)), traced(config, Observe(False, True))
    # The keys of both sides are scored once, for the selection.
    assert nothing["products with keys"] > 0
    assert watched["products with keys"] == nothing["products with keys"]
    assert balanced["products with keys"] > nothing["products with keys"]
    assert nothing["softmaxes over keys"] == watched["softmaxes over keys"] == 0
    assert balanced["softmaxes over keys"] > 0
    assert nothing["counts"] == balanced["counts"] == 0
    assert watched["counts"] == 1
    # Variances of the outputs of FFN, experts and memory; norms compute squares, too.
    assert watched["variances"] == nothing["variances"] + 3
    assert balanced["variances"] == nothing["variances"]


# --- prefill is explicit ---


def test_prefill_is_explicit_and_not_inferred_from_the_position() -> None:
    config = config_of("dense")
    model, tokens = weights_of(config).model(config), tokens_of(config)
    plain = jax.jit(lambda model: model(tokens, store=None).logits)(model)

    @functools.partial(jax.jit, static_argnames=("prefill", "position"))
    def run(model: Any, cache: Any, *, prefill: bool, position: int = 0) -> Any:
        output = model(tokens, store=None, cache=cache, position=position, prefill=prefill)
        return output.logits, output.cache

    def filled(value: float) -> Any:
        empty = model.empty_cache(2, LENGTH + 3)
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), empty)

    # Positions after the tokens are masked, so their values do not matter; but they are read.
    attending, _ = run(model, filled(7.0), prefill=False)
    np.testing.assert_allclose(attending, plain, rtol=2e-4, atol=2e-4)
    attending, _ = run(model, filled(np.nan), prefill=False)
    assert np.isnan(attending).all()
    logits, cache = run(model, filled(np.nan), prefill=True)
    np.testing.assert_allclose(logits, plain, rtol=2e-4, atol=2e-4)
    for leaf in jax.tree.leaves(cache):
        assert np.isfinite(leaf[:, :, :LENGTH]).all()
    # At later positions, the output depends on the cache.
    left, right = (run(model, filled(v), prefill=False, position=3)[0] for v in (0.1, 0.9))
    assert np.abs(left - right).max() > 0.01


# --- selecting a layer ---


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "product_keys",
            "must be none, product_key or module:name (nearest: product_key)",
        ),
        ("none_at_all:Layer", "cannot be imported: ModuleNotFoundError: No module named"),
        ("umv2.model.memory.layer:Nothing", "cannot be imported: AttributeError: "),
        (":Layer", "cannot be imported: ValueError: "),
        ("raising_layer:Layer", "cannot be imported: RuntimeError: out of order"),
        (
            "umv2.model.moe.layer:MixtureOfExperts",
            "must be a subclass of umv2.model.slots.MemorySlot",
        ),
        ("umv2.model.layers:linear_std", "must be a subclass of umv2.model.slots.MemorySlot"),
    ],
)
def test_an_unknown_layer_is_an_error_that_names_the_field(
    layer: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_layer.py").write_text("raise RuntimeError('out of order')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("memory", layer=layer)
    for use in (memory_layer, weights.abstract, accounting.slots):
        with pytest.raises(ConfigError) as error:
            use(config)
        assert str(error.value).startswith(f"model.memory.layer={layer!r}: {message}")
        assert "\n" not in str(error.value)


class Halving(MemorySlot):
    """Returns half of its input."""

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        return LayerCost()

    def __call__(self, x: Any, *, window: StoreWindow | None, observe: Observe) -> Any:
        assert window is None
        return x / 2, MemoryStats(*[None] * len(dataclasses.fields(MemoryStats)))


def test_a_layer_needs_no_tables_losses_or_health() -> None:
    config = config_of("moe", layer=f"{__name__}:{Halving.__name__}")
    given = weights_of(config)
    assert given.store is None
    assert given.named().keys() == weights.abstract(config_of("moe")).named().keys()
    assert state.usage_shapes(config).keys() == {"router"}
    _, stats = observed(config, ALL)
    model = given.model(config)
    loss = losses_of(balance_loss=1.0, tucker_penalty=1.0, load_balance=1.0)
    assert model.losses(stats, loss, num_tokens=12).keys() == {"load_balance"}
    measures = health.arrays(config, stats, health.hits(stats), given)
    assert all(
        name.startswith("expert_")
        for name in measures.keys() - {"balance_loss"} - {"router_z_loss"}
    )
    tokens = tokens_of(config)
    with_layer = jax.jit(lambda model: model(tokens, store=None).logits)(model)
    model.refresh()
    model.serve()
    assert isinstance(model.blocks, nnx.List)
    served = jax.jit(lambda model: model(tokens, store=None).logits)(model)
    np.testing.assert_allclose(served, with_layer, rtol=2e-4, atol=2e-4)
    without, _ = observed(config_of("moe"), Observe())
    assert np.abs(with_layer - without).max() > 0.01


def test_a_layer_without_a_required_method_is_an_error() -> None:
    class Silent(MemorySlot):
        pass

    with pytest.raises(TypeError, match=r"Silent must define cost"):
        Silent.cost(config_of("memory"))
