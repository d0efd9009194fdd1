"""Declarations of parameters: invalid ones, and that initialized and abstract modules agree."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base, families, tiny
from tests import slots
from umv2.config import ModelConfig, from_config_dict
from umv2.model import parameter, weights
from umv2.model.memory import initialization
from umv2.model.memory.layer import MemoryLayer
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import ABSTRACT, Buffer, Declaration, Initializer, Parameter
from umv2.model.transformer import Transformer

FAMILIES = [*families.FAMILIES, *families.VARIANTS]


def config_of(family: str) -> ModelConfig:
    return from_config_dict(tiny.get_config(family)).model


def small(kind: str, **model: Any) -> ModelConfig:
    values = base.get_config()
    slots.fill(values, kind, hidden_size=8, num_layers=2, num_heads=2, num_key_value_heads=2)
    values.model.update(vocab_size=12, **model)
    values.model.memory.update(num_keys=4, key_dim=4, value_dim=6, pre_value_dim=2)
    values.model.memory.update(top_m=3, shortlist=3)
    values.model.moe.update(num_experts=4, top_k=2, expert_size=6)
    if values.model.ffn == "dense":
        values.model.ffn_size = 10
    return from_config_dict(values).model


# --- what is refused ---

# Without the runtime type checker of tests, which would reject these first.
_REFUSED = """
import jax
from umv2.model.parameter import Declaration, Initializer

init = Initializer(jax.random.key(0))
for attempt in (
    lambda: Declaration(("hidden", "depth"), "norms", "compute"),
    lambda: Declaration((), "biases", "compute"),
    lambda: Declaration((), None, "bfloat16"),
    lambda: init.normal("x", (2, 3), std=1.0, axes=("hidden", "width"), group="matrices"),
    lambda: init.uniform("x", (2, 3), axes=("hidden", None), group="tables"),
    lambda: init.constant(3, 0.0, group="biases"),
):
    try:
        attempt()
    except ValueError as error:
        print(error)
"""


def test_an_unknown_axis_group_or_dtype_is_named() -> None:
    command = [sys.executable, "-c", _REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wrong = ["axis 'depth'", "group 'biases'", "served 'bfloat16'"]
    wrong += ["axis 'width'", "group 'tables'", "group 'biases'"]
    messages = done.stdout.splitlines()
    assert [message.partition(":")[0] for message in messages] == wrong
    assert messages[0].endswith(
        ": must be one of vocabulary, hidden, heads, ffn, key, expert_hidden, expert, table, row,"
        " column"
    )
    assert messages[1].endswith(": must be one of embeddings, norms, matrices, keys, values")
    assert messages[2].endswith(": must be one of compute, float32")


@pytest.mark.parametrize("axes", [(), ("hidden",), ("hidden", None, None)])
@pytest.mark.parametrize("init", [ABSTRACT, Initializer(jax.random.key(0))])
def test_there_is_one_axis_per_dimension(axes: Any, init: Initializer) -> None:
    with pytest.raises(ValueError, match=r"axes .*: must be one for each dimension of \(2, 3\)"):
        init.normal("x", (2, 3), std=1.0, axes=axes, group="matrices")


class Undeclared(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(3))


class Wrapper(nnx.Module):
    def __init__(self, inner: nnx.Module) -> None:
        self.weight = ABSTRACT.constant(3, 1.0)
        self.inner = inner


def test_a_parameter_without_a_declaration_is_named() -> None:
    with pytest.raises(ValueError, match=r"^inner/scale: a Param without a declaration"):
        parameter.declarations(Wrapper(Undeclared()), "params")


class UndeclaredMemory(MemoryLayer):
    def __init__(self, config: ModelConfig, *, init: Initializer) -> None:
        super().__init__(config, init=init)
        self.scale = nnx.Param(init.value("scale", (3,), lambda key: jnp.ones(3)))


def test_a_custom_layer_without_declarations_is_an_error() -> None:
    config = small("memory")
    layer = f"{__name__}:{UndeclaredMemory.__name__}"
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, layer=layer))
    with pytest.raises(ValueError, match=r"^memory/scale: a Param without a declaration"):
        weights.declarations(config)


# --- what is declared ---


def test_every_array_of_the_weights_is_declared_in_order() -> None:
    config = small("both", ffn_size=10, tie_embeddings=False)
    declared, named = weights.declarations(config), weights.abstract(config).named()
    assert list(declared) == list(named)
    for name, leaf in named.items():
        assert len(declared[name].axes) == leaf.ndim, name
        assert (declared[name].group is None) == name.startswith("buffers/"), name


def test_stacked_axes_come_first_and_are_never_sharded() -> None:
    declared = weights.declarations(small("both", ffn_size=10))
    assert declared["params/embedding"].axes == ("vocabulary", "hidden")
    assert declared["params/blocks/ffn/up"].axes == (None, "hidden", "ffn")
    assert declared["params/blocks/moe/up"].axes == (None, None, "expert_hidden", "expert")
    assert declared["params/memory/keys"].axes == (*[None] * 5, "key")
    assert declared["params/blocks/ffn_norm/weight"] == Declaration(
        (None, None), "norms", "float32"
    )
    assert declared["buffers/memory/core_u"] == Declaration((None,) * 3, None, "compute")
    assert declared["store/values"] == Declaration(("table", "row", "column"), "values", "compute")
    one = Declaration(("hidden", "ffn"), "matrices", "compute")
    assert one.stacked(2) == one
    assert one.stacked(4) == Declaration((None, None, "hidden", "ffn"), "matrices", "compute")


def test_parameters_that_need_float32_are_served_in_float32() -> None:
    declared = weights.declarations(small("both"))
    wide = {name.rpartition("/")[2] for name, d in declared.items() if d.served == "float32"}
    assert wide == {"weight", "query_norm", "key_norm", "cores", "router"}


def described(tree: Any) -> tuple[Any, list[Any]]:
    """Returns the structure of a tree, and the shape and dtype of each leaf."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("family", FAMILIES)
def test_abstract_and_initialized_models_agree(family: str) -> None:
    config = config_of(family)
    abstract = Transformer(config, init=ABSTRACT)
    drawn = jax.eval_shape(lambda: Transformer(config, init=Initializer(jax.random.key(0))))
    left, right = map(parameter.declarations, (abstract, drawn), ("params", "params"))
    assert left == right
    assert described(abstract) == described(drawn)
    assert nnx.graphdef(abstract, graph=False) == nnx.graphdef(drawn, graph=False)
    created = jax.eval_shape(lambda: weights.create(config, jax.random.key(0)))
    assert described(created) == described(weights.abstract(config))


def test_abstract_modules_do_no_expensive_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a value was drawn")

    monkeypatch.setattr(initialization, "calibrate", refuse)
    monkeypatch.setattr(initialization, "memory_initialization", refuse)
    for name in ("normal", "uniform", "permutation", "key"):
        monkeypatch.setattr(jax.random, name, refuse)
    config = small("both", norm_epsilon=2e-5)  # no other test has cached it
    assert weights.declarations(config)
    leaves = jax.tree.leaves(weights.abstract(config))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


# --- what is drawn ---


class Pair(nnx.Module):
    """Two matrices and, optionally, a third between them."""

    def __init__(self, *, init: Initializer, third: bool = False) -> None:
        matrix: dict[str, Any] = {"std": 0.5, "axes": ("hidden", None), "group": "matrices"}
        self.first = init.normal("first", (4, 3), **matrix)
        if third:
            self.third = init.uniform("third", (4, 3), axes=("hidden", None), group="matrices")
        self.second = init.normal("second", (4, 3), **matrix)
        self.count = Buffer(init.value("count", (), lambda key: jnp.int32(7), jnp.int32))


def test_adding_a_parameter_changes_no_other_parameter() -> None:
    init = Initializer(jax.random.key(3))
    two, three = Pair(init=init), Pair(init=init, third=True)
    for name in ("first", "second"):
        np.testing.assert_array_equal(getattr(two, name)[...], getattr(three, name)[...])
    assert not np.array_equal(two.first[...], two.second[...])
    inner, other = (Pair(init=init.child(name)) for name in ("inner", "other"))
    assert not np.array_equal(two.first[...], inner.first[...])
    assert not np.array_equal(other.first[...], inner.first[...])


def test_one_slot_does_not_affect_the_initial_values_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def part_of_key(
        init: Initializer, name: str, shape: tuple[int, ...], draw: Any, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Replaces the drawn values, as the deviation of tables depends on the FFN."""
        assert init.key is not None
        data = jax.random.key_data(parameter.named_key(init.key, name))
        return jnp.full(shape, data[0] % 2**20, dtype)

    monkeypatch.setattr(Initializer, "value", part_of_key)
    create = jax.jit(weights.create, static_argnums=0)
    both, experts, memory = (
        create(small(kind), jax.random.key(5)).named() for kind in ("both", "moe", "memory")
    )
    assert experts.keys() < both.keys()
    for name, values in experts.items():
        np.testing.assert_array_equal(both[name], values, err_msg=name)
    shared = both.keys() & memory.keys()
    assert {"params/memory/query", "store/values", "params/blocks/attention/query"} < shared
    for name in shared:
        np.testing.assert_array_equal(both[name], memory[name], err_msg=name)


def test_a_stack_equals_its_members_initialized_one_by_one() -> None:
    key = jax.random.key(1)
    stacked = Initializer(key).stack("blocks", 3, lambda init: Pair(init=init))
    keys = jax.random.split(parameter.named_key(key, "blocks"), 3)
    for index in range(3):
        member = Pair(init=Initializer(keys[index]))
        for name in ("first", "second", "count"):
            np.testing.assert_array_equal(
                getattr(stacked, name)[...][index], getattr(member, name)[...], err_msg=name
            )
    abstract = ABSTRACT.stack("blocks", 3, lambda init: Pair(init=init))
    assert abstract.first.get_value() == jax.ShapeDtypeStruct((3, 4, 3), jnp.float32)
    assert abstract.count.get_value() == jax.ShapeDtypeStruct((3,), jnp.int32)
    assert parameter.declarations(abstract, "p") == parameter.declarations(stacked, "p")


def test_initializers_draw_from_their_distributions() -> None:
    init = Initializer(jax.random.key(0))
    axes: Any = (None, None)
    normal = init.normal("a", (200, 200), std=0.5, axes=axes, group="keys")[...]
    later = init.normal("a", (200, 200), std=lambda: 0.5, axes=axes, group="keys")[...]
    np.testing.assert_array_equal(normal, later)
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 0.5], atol=0.01)
    uniform = init.uniform("a", (200, 200), axes=axes, group="keys")[...]
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    np.testing.assert_allclose(uniform.mean(), 0.5, atol=0.01)
    for start in (2.5, lambda: 2.5):
        np.testing.assert_array_equal(init.constant(3, start)[...], np.full(3, 2.5, np.float32))
    assert {normal.dtype, uniform.dtype, init.constant(3, 1.0)[...].dtype} == {jnp.dtype("float32")}


def test_a_parameter_derived_from_others_keeps_their_declaration() -> None:
    layer = MixtureOfExperts(small("moe"), init=Initializer(jax.random.key(0)))
    of_gate = layer.gate.get_metadata()["declaration"]
    layer.serve()
    assert isinstance(layer.gate_and_up, Parameter)
    assert layer.gate_and_up.get_metadata()["declaration"] == of_gate
    assert layer.gate_and_up.shape == (4, 8, 12)
