import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import base, tiny
from tests import meshes, programs
from umv2 import sharding
from umv2.config import LossConfig, ResolvedMesh, from_config_dict
from umv2.model.memory.layer import MemoryLayer
from umv2.model.moe.layer import MixtureOfExperts
from umv2.model.parameter import ABSTRACT
from umv2.model.slots import MemoryStats, RouterStats
from umv2.training import losses
from umv2.training.held_out import make_evaluation_step
from umv2.training.state import abstract_state
from umv2.training.train import make_train_step
from umv2.types import Batch

OFF = LossConfig(
    z_loss=0.0,
    tucker_penalty=0.0,
    tucker_margin=0.15,
    balance_loss=0.0,
    load_balance=0.0,
    load_balance_scope="layer",
    router_z_loss=0.0,
)


def of_logits(
    logits: jax.Array, targets: Any, weights: Any, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The loss of hidden states that are the logits, since the head is the identity."""
    head = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    return losses.cross_entropy(
        logits, head, jnp.asarray(targets), jnp.asarray(weights), z_loss=z_loss
    )


def test_cross_entropy_by_hand() -> None:
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 5.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]))
    loss, nats = of_logits(logits, [[2, 0, 1]], [[1.0, 1.0, 0.0]], z_loss=0.5)
    np.testing.assert_allclose(nats, math.log(8 / 5) + math.log(4 / 2), rtol=1e-6)
    squared = math.log(8) ** 2 + math.log(4) ** 2
    np.testing.assert_allclose(loss - nats, 0.5 * squared, rtol=1e-6)


def test_large_logits_stay_finite() -> None:
    _, nats = of_logits(jnp.asarray([[[1e4, -1e4]]]), [[1]], [[1.0]])
    np.testing.assert_allclose(nats, 2e4)


# Sizes of batch, sequence, hidden states and vocabulary; meshes shard the first and the last two.
_SIZES = (8, 5, 8, 16)
_Z_LOSS = 0.1


def example(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, a head as stored, targets, and weights of which some are 0."""
    random = np.random.default_rng(0)
    *tokens, hidden, vocabulary = _SIZES
    stored = jnp.promote_types(dtype, jnp.float32)
    return (
        jnp.asarray(random.normal(size=(*tokens, hidden)), dtype),
        jnp.asarray(random.normal(size=(vocabulary, hidden)), stored),
        jnp.asarray(random.integers(0, vocabulary, size=tokens), jnp.int32),
        jnp.asarray(random.integers(0, 3, size=tokens), stored),
    )


def of_all_logits(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """The same losses from all logits at once, differentiated by JAX."""
    logits = (hidden @ head.T).astype(head.dtype)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    nats = log_partition - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (
        jnp.sum((nats + z_loss * log_partition**2) * weights),
        jnp.sum(nats * weights),
    )


def with_gradients(function: Any, *arguments: jax.Array, z_loss: float = _Z_LOSS) -> list[Any]:
    """Three times the loss, the cross entropy, and the gradients of the former."""

    def thrice(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, nats = function(*arguments, z_loss=z_loss)
        return 3 * loss, nats

    step = jax.value_and_grad(thrice, argnums=(0, 1), has_aux=True)
    return jax.tree.leaves(jax.jit(step)(*arguments))


def assert_close(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        wide = np.asarray(theirs, np.float64)
        atol = tolerance * np.abs(wide).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), wide, rtol=tolerance, atol=atol)


def number_of_chunks(*arguments: jax.Array) -> int:
    """Reads the number of chunks from the traced program: the length of its scan."""
    traced = jax.make_jaxpr(jax.grad(lambda *a: losses.cross_entropy(*a)[0]))(*arguments)
    (scan,) = (e for e in programs.equations(traced.jaxpr) if e.primitive.name == "scan")
    return scan.params["length"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
# The logits of all 40 tokens take 2560 bytes in float32: chunks of 40, of 10 and of 3 tokens, the
# last padded with two.
@pytest.mark.parametrize(("limit", "chunks"), [(2560, 1), (640, 4), (200, 16)])
def test_chunks_have_the_losses_and_gradients_of_all_tokens_at_once(
    dtype: str,
    tolerance: float,
    limit: int,
    chunks: int,
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = example(dtype)
    monkeypatch.setattr(losses, "MAX_LOGITS_BYTES", limit * arguments[1].dtype.itemsize // 4)
    assert number_of_chunks(*arguments) == chunks
    actual = with_gradients(losses.cross_entropy, *arguments)
    assert_close(actual, with_gradients(of_all_logits, *arguments), tolerance)
    assert [array.dtype for array in actual[2:]] == [dtype, dtype]
    without = with_gradients(losses.cross_entropy, *arguments, z_loss=0.0)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(actual[2:], without[2:], strict=True))


def test_bfloat16_accumulates_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS_BYTES", 640)
    hidden, head, targets, weights = example("bfloat16")
    actual = with_gradients(losses.cross_entropy, hidden, head, targets, weights)
    assert [array.dtype for array in actual[2:]] == ["bfloat16", "float32"]
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = with_gradients(of_all_logits, hidden.astype(jnp.float32), rounded, targets, weights)
    assert_close(actual[:2], expected[:2], 1e-6)
    # The gradients of the logits are rounded before their products, and the first once more after.
    assert_close(actual[2:3], expected[2:3], 2**-8)
    assert_close(actual[3:], expected[3:], 2**-8)
    assert not np.array_equal(actual[3], actual[3].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "mesh",
    [
        {"replica": 8},
        {"fsdp": 2, "memory": 2, "tensor": 2},
        {"fsdp": 2, "memory": 2, "tensor": 2, "parameters": "fsdp_and_memory"},
        {"replica": 2, "tensor": 4},
    ],
    ids=lambda mesh: "-".join(map(str, mesh.values())),
)
def test_eight_devices_match_one(mesh: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS_BYTES", 128)
    arguments = example("float32")
    expected = with_gradients(losses.cross_entropy, *arguments)
    devices = meshes.create(**mesh)
    resolved = dataclasses.asdict(meshes.config(**mesh | {"table_sharding": "rows"}))
    rules = sharding.rules(ResolvedMesh(**resolved))
    stored = sharding.partition(("vocabulary", "hidden"), rules, devices.shape, name="head")
    tokens = PartitionSpec(sharding.DATA_AXES)
    with jax.set_mesh(devices):
        placed = jax.device_put(arguments, (tokens, stored, tokens, tokens))
        assert number_of_chunks(*placed) > 1
        actual = with_gradients(losses.cross_entropy, *placed)
    assert [array.sharding.num_devices for array in actual] == [8] * 4
    assert actual[2].sharding.spec[0] == sharding.DATA_AXES
    assert actual[3].sharding.spec == stored
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_no_array_of_a_training_step_or_evaluation_has_all_logits(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.get_config("dense")
    config.model.update(vocab_size=50304, tie_embeddings=tied)
    config.train.batch_size = 16
    experiment = from_config_dict(config)
    shape = (16, config.data.sequence_length)
    ids = np.zeros(shape, np.int32)
    batch = Batch(inputs=ids, targets=ids, weights=np.ones(shape, np.float32), segment_ids=ids)
    state = abstract_state(experiment)

    def largest() -> tuple[int, int]:
        step = jax.make_jaxpr(make_train_step(experiment))(state, batch)
        evaluation = make_evaluation_step(experiment.model, mask_across_documents=True)
        traced = jax.make_jaxpr(evaluation)(state.weights, batch)
        return programs.largest_array(step.jaxpr), programs.largest_array(traced.jaxpr)

    logits = math.prod(shape) * 50304
    assert 4 * logits > losses.MAX_LOGITS_BYTES
    assert max(largest()) < logits
    monkeypatch.setattr(losses, "MAX_LOGITS_BYTES", 4 * logits)
    assert largest() == (logits, logits)


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
