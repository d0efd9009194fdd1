"""Every product and sum of a bfloat16 program accumulates in float32 and says so.

A product of bfloat16 arrays whose result is declared bfloat16 loses digits on some chips.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import PartitionSpec

from configs import tiny
from tests import meshes, programs
from umv2 import sharding
from umv2.config import Config, from_config_dict
from umv2.inference.serving import serve
from umv2.model import layers, weights
from umv2.model.attention import xla
from umv2.model.rematerialization import rematerialized
from umv2.training.state import abstract_state
from umv2.training.train import make_train_step
from umv2.types import Batch

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
SUMS = {"reduce_sum", "cumsum", "scatter-add"}
# jax.nn.dot_product_attention multiplies the weights by the values in bfloat16, and in its backward
# pass a float32 by a bfloat16 array. Programs for CPUs do not call it.
OF_JAX = "dot_product_attention"

FAMILIES = ("dense", "moe", "ultramem_v2", "ultramem", "memory_plus_gated", "pkm", "peer")
LENGTH = 16


def faults(jaxpr: Any) -> Iterator[str]:
    """Describes the products with bfloat16 operands and the sums that are not in float32.

    A product of operands of two dtypes is one too: it runs at the speed of the wider.
    """
    for equation in programs.equations(jaxpr):
        name = equation.primitive.name
        operands = [variable.aval.dtype for variable in equation.invars[:2] if name in PRODUCTS]
        narrow = [out.aval.dtype == jnp.bfloat16 for out in equation.outvars if name in SUMS]
        bad = any(narrow)
        if jnp.bfloat16 in operands:
            bad = equation.outvars[0].aval.dtype != jnp.float32 or len(set(operands)) > 1
        if bad:
            shapes = [variable.aval.str_short() for variable in equation.invars[:2]]
            frames = equation.source_info.traceback.frames
            callers = [frame.function_name for frame in frames if "jax/_src" not in frame.file_name]
            inside = [OF_JAX for frame in frames if frame.function_name == OF_JAX]
            yield f"{name} {' '.join(shapes)} in {' < '.join([*inside[:1], *callers[:3]])}"


def bfloat16_config(family: str, **fields: Any) -> Config:
    config = tiny.get_config(family)
    config.model.update(compute_dtype="bfloat16", **fields)
    config.model.memory.initialization = "released"  # avoids the calibration
    config.model.moe.expert_size = 48  # a multiple of the devices that shard it
    config.data.sequence_length = LENGTH
    config.loss.balance_loss = 0.001 if family.startswith("ultramem") else 0.0
    return from_config_dict(config)


def train_step_of(config: Config, state: Any = None) -> Any:
    """Traces a training step."""
    shape = (config.train.batch_size, LENGTH)
    ids = np.zeros(shape, np.int32)
    batch: Any = Batch(inputs=ids, targets=ids, segment_ids=ids, weights=np.ones(shape, np.float32))
    if state is None:
        state = abstract_state(config)
    else:
        batch = jax.device_put(batch, PartitionSpec(sharding.DATA_AXES))
    return jax.make_jaxpr(make_train_step(config))(state, batch).jaxpr


@pytest.mark.slow(fast=["-dots"])
@pytest.mark.parametrize("remat", ["none", "dots", "kernels", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_accumulates_in_float32(family: str, remat: str) -> None:
    assert list(faults(train_step_of(bfloat16_config(family, remat=remat)))) == []


@pytest.mark.parametrize("family", ["moe", "ultramem_v2"])
def test_a_training_step_on_a_mesh_accumulates_in_float32(family: str) -> None:
    config = meshes.resolved(bfloat16_config(family, remat="full"))
    with jax.set_mesh(meshes.create(fsdp=2, memory=2, tensor=2)):
        state = abstract_state(config)
        assert list(faults(train_step_of(config, state))) == []


@pytest.mark.parametrize("family", ["moe", "ultramem_v2", "memory_plus_gated", "peer"])
def test_decoding_accumulates_in_float32(family: str) -> None:
    config = bfloat16_config(family).model

    def decode(trained: Any, tokens: jax.Array) -> jax.Array:
        model, store = serve(config, trained).parts()
        cache = model.empty_cache(len(tokens), LENGTH)
        return model(tokens, store=store, cache=cache, position=3).logits

    tokens = jnp.zeros((2, 1), jnp.int32)
    traced = jax.make_jaxpr(decode)(weights.abstract(config), tokens)
    assert any(e.primitive.name == "dot_general" for e in programs.equations(traced.jaxpr))
    assert list(faults(traced.jaxpr)) == []


def test_products_of_attention_in_xla_are_those_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_LONG", 0)  # as for sequences that CPUs do not read in blocks
    found = list(faults(train_step_of(bfloat16_config("dense", attention="xla"))))
    assert found
    assert [fault for fault in found if OF_JAX not in fault] == []


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


def widened(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@pytest.mark.parametrize(
    ("function", "forward", "backward"), [(product, 1, 3), (widened, 0, 2)], ids=["plain", "wide"]
)
@pytest.mark.parametrize(
    "transformed",
    [
        lambda function: function,
        jax.jit,
        jax.checkpoint,
        lambda function: lambda a, b: jax.lax.map(lambda row: function(row[None], b), a),
        lambda function: lambda a, b: jax.lax.cond(a[0, 0] > 0, function, lambda a, b: a, a, b),
    ],
    ids=["plain", "jit", "checkpoint", "map", "cond"],
)
def test_faults_are_found_in_nested_programs(
    function: Any, forward: int, backward: int, transformed: Callable[[Any], Any]
) -> None:
    matrix = jnp.ones((4, 4), jnp.bfloat16)
    nested = transformed(function)
    assert len(list(faults(jax.make_jaxpr(nested)(matrix, matrix).jaxpr))) == forward
    gradient = jax.grad(lambda a, b: nested(a, b).astype(jnp.float32).sum(), argnums=(0, 1))
    assert len(list(faults(jax.make_jaxpr(gradient)(matrix, matrix).jaxpr))) >= backward


def test_sums_in_bfloat16_are_found() -> None:
    x = jnp.ones((4, 4), jnp.bfloat16)
    bias = jnp.ones((1, 4), jnp.bfloat16)
    gradient = jax.grad(lambda bias: (x + bias).astype(jnp.float32).sum())
    assert len(list(faults(jax.make_jaxpr(gradient)(bias).jaxpr))) == 1


def example(bias: bool) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, 40, 16)), jnp.bfloat16)
    weight = jnp.asarray(random.normal(size=(16, 8)), jnp.float32)
    return (x, weight, jnp.asarray(random.normal(size=8), jnp.float32)) if bias else (x, weight)


def value_and_gradients(*arguments: jax.Array) -> list[jax.Array]:
    def objective(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layers.linear(*arguments)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    step = jax.value_and_grad(objective, argnums=tuple(range(len(arguments))), has_aux=True)
    (_, y), gradients = jax.jit(step)(*arguments)
    return [y, *gradients]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linear_rounds_only_its_results(bias: bool) -> None:
    arguments = example(bias)
    actual = value_and_gradients(*arguments)
    assert [a.dtype for a in actual] == [jnp.bfloat16, *(a.dtype for a in arguments)]
    # In float64, with each rounding that `linear` makes.
    x, weight, *rest = (np.asarray(a, np.float64) for a in arguments)
    narrow = np.asarray(arguments[1].astype(jnp.bfloat16), np.float64)
    y = np.asarray(actual[0], np.float64)
    grad = np.asarray(jnp.cos(actual[0].astype(jnp.float32)).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(y, x @ narrow + sum(rest), rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(
        actual[1].astype(jnp.float32), grad @ narrow.T, rtol=2**-8, atol=1e-5
    )
    weight_grad = np.einsum("bti,bto->io", x, grad)
    np.testing.assert_allclose(actual[2], weight_grad, rtol=1e-5, atol=1e-5)
    assert np.abs(weight_grad - weight_grad.astype(jnp.bfloat16)).max() > 1e-3
    if bias:
        np.testing.assert_allclose(actual[3], grad.sum(axis=(0, 1)), rtol=1e-2)
    assert weight.shape == actual[2].shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("into", "stored"), [(None, ("fsdp", "tensor")), ("tensor", ("tensor", ("fsdp", "memory")))]
)
def test_linear_on_a_mesh_matches_one_device(dtype: str, into: Any, stored: Any) -> None:
    x, weight = example(bias=False)
    x = jnp.concatenate([x, x[:1]]).astype(dtype)
    expected = value_and_gradients(x, weight)
    with jax.set_mesh(meshes.create(fsdp=2, memory=2, tensor=2)):
        tokens = PartitionSpec(sharding.DATA_AXES, None, into)
        placed = jax.device_put((x, weight), (tokens, PartitionSpec(*stored)))
        actual = value_and_gradients(*placed)
    specs = [sharding.spec(array) for array in actual[1:]]
    assert specs == [tokens, PartitionSpec(*stored)]
    # In bfloat16 the parts of a contraction over `tensor` are rounded before their sum.
    tolerance = 1e-6 if dtype == "float32" else 2**-5
    for ours, theirs in zip(actual, expected, strict=True):
        wide = np.asarray(theirs, np.float64)
        atol = tolerance * np.abs(wide).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), wide, rtol=tolerance, atol=atol)
    assert actual[2].dtype == jnp.float32


def test_dots_saves_rounded_products_only() -> None:
    x, weight = example(bias=False)

    def saved(wrap: Callable[[Any], Any]) -> list[str]:
        def body(x: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(layers.linear(x, weight)).astype(jnp.float32))

        _, pull_back = jax.vjp(wrap(body), x, weight)
        return sorted(leaf.dtype.name for leaf in jax.tree.leaves(pull_back) if leaf.size == 960)

    def dots_alone(body: Any) -> Any:
        return jax.checkpoint(body, policy=checkpoint_policies.dots_with_no_batch_dims_saveable)

    assert saved(lambda body: rematerialized(body, "dots")) == ["bfloat16"]
    assert saved(dots_alone) == ["float32"]
    assert saved(lambda body: rematerialized(body, "full")) == []
