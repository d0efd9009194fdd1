"""The mesh: its sizes, the sharding of each array, and collectives."""

import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import tiny
from tests import meshes
from umv2 import kernels, sharding
from umv2.config import ConfigError, ResolvedMesh, from_config_dict
from umv2.model.parameter import Axis, path_name
from umv2.planning.hlo import collectives
from umv2.training import state

ALL = {"fsdp": 2, "memory": 2, "tensor": 2}


def rules(**fields: Any) -> dict[str, tuple[str, ...]]:
    values = tiny.get_config().mesh
    values.update(fields)
    return sharding.rules(ResolvedMesh(**dataclasses.asdict(meshes.config(**values))))


def test_replica_takes_the_remaining_devices() -> None:
    assert dict(meshes.create(replica=-1, memory=2).shape) == {
        "replica": 4,
        "fsdp": 1,
        "memory": 2,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("axes", "batch_size", "message"),
    [
        ({"memory": 16}, 16, "mesh.memory=16: needs 16 devices, but only 8 are available"),
        (
            {"fsdp": 2, "memory": 2},
            6,
            "multiple of the 4 batch shards .* one is 6 .*; 8 would do",
        ),
    ],
)
def test_an_impossible_mesh_is_rejected(axes: Any, batch_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sharding.create_mesh(meshes.config(**axes), batch_size)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("ultramem_v2", {"mesh.tensor": 3}, "mesh.tensor=3: must divide model.num_heads=4; 1 does"),
        ("ultramem_v2", {"mesh.fsdp": 3}, "mesh.fsdp=3: must divide model.hidden_size=128"),
        ("moe", {"mesh.memory": 2}, "must divide model.moe.expert_size=49; 1 does, and 2 divides"),
    ],
)
def test_an_axis_that_does_not_divide_a_size_is_rejected_with_a_suggestion(
    family: str, fields: dict[str, int], message: str
) -> None:
    values = tiny.get_config(family)
    values.model.vocab_size = 264
    values.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        from_config_dict(values)


SIZES = {"replica": 1, "fsdp": 2, "memory": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "fields", "expected"),
    [
        ((None, "ffn", "hidden"), {}, (None, "tensor", "fsdp")),
        (("vocabulary", "hidden"), {}, ("tensor", "fsdp")),
        (
            ("vocabulary", "hidden"),
            {"parameters": "fsdp_and_memory"},
            ("tensor", ("fsdp", "memory")),
        ),
        ((None, "expert_hidden", "expert"), {}, (None, "fsdp", ("memory", "tensor"))),
        (("table", "row", "column"), {"table_sharding": "rows"}, (None, "memory", None)),
        (("table", "row", "column"), {"table_sharding": "columns"}, (None, None, "memory")),
        ((None,), {}, (None,)),
        ((), {}, ()),
    ],
)
def test_rules_shard_the_declared_axes(
    axes: tuple[str | None, ...], fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert sharding.partition(axes, rules(**fields), SIZES, name="x") == PartitionSpec(*expected)


def test_an_axis_of_one_device_shards_nothing() -> None:
    sizes = SIZES | {"tensor": 1}
    spec = sharding.partition(("ffn", "hidden"), rules(), sizes, name="x")
    assert spec == PartitionSpec(None, "fsdp")


def test_every_parameter_axis_has_a_rule() -> None:
    assert set(rules()) == set(typing.get_args(Axis))
    with pytest.raises(ValueError, match="params/x: there is no sharding rule for axis 'depth'"):
        sharding.partition(("hidden", "depth"), rules(), SIZES, name="params/x")


@pytest.mark.parametrize("family", ["ultramem_v2", "moe"])
def test_parameters_and_their_moments_are_sharded_alike(family: str) -> None:
    values = tiny.get_config(family)
    values.model.vocab_size = 264
    values.model.moe.expert_size = 48
    values.mesh.update(fsdp=2, memory=2, tensor=2, table_sharding="rows")
    config = meshes.resolved(from_config_dict(values))
    with jax.set_mesh(sharding.create_mesh(config.mesh)):
        abstract = state.abstract_state(config)
    of_weights = {
        name: leaf.sharding.spec
        for name, leaf in abstract.weights.named().items()
        if not name.startswith("buffers/")
    }
    assert of_weights["params/embedding"] == PartitionSpec("tensor", "fsdp")
    assert of_weights["params/final_norm/weight"] == PartitionSpec(None)
    if family == "moe":
        experts = PartitionSpec(None, None, "fsdp", ("memory", "tensor"))
        assert of_weights["params/blocks/moe/up"] == experts
    else:
        assert of_weights["params/blocks/ffn/down"] == PartitionSpec(None, "tensor", "fsdp")
        assert of_weights["store/values"] == PartitionSpec(None, "memory", None)
    for moment in ("mu", "nu"):
        of_moments = {
            f"{prefix}/{name.partition(f'/{moment}/')[2]}": leaf.sharding.spec
            for prefix, part in (
                ("params", abstract.optimizer.model),
                ("store", abstract.optimizer.store),
            )
            for name, leaf in named_leaves(part)
            if f"/{moment}/" in name
        }
        assert of_moments == of_weights


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(f"/{path_name(path)}", leaf) for path, leaf in leaves]


def test_a_mesh_axis_that_would_shard_two_dimensions_is_a_collision() -> None:
    axes = (None, None, "expert_hidden", "expert")
    colliding = rules() | {"expert_hidden": ("memory",)}
    with pytest.raises(ValueError, match="params/blocks/moe/up: two dimensions are sharded over"):
        sharding.partition(axes, colliding, SIZES, name="params/blocks/moe/up")
    sharding.partition(axes, rules(), SIZES, name="params/blocks/moe/up")


@pytest.mark.parametrize("family", ["ultramem_v2", "dense"])
def test_an_unresolved_mesh_is_an_error(family: str) -> None:
    values = tiny.get_config(family)
    values.mesh.update(memory=2, replica=4)
    config = from_config_dict(values)
    with jax.set_mesh(sharding.create_mesh(config.mesh)):
        with pytest.raises(
            TypeError, match=r"not resolved: call umv2\.cost\.exchange\.resolve_mesh"
        ):
            state.abstract_state(config)
        state.abstract_state(meshes.resolved(config))


def test_products_and_lookups_of_sharded_parameters_match_replicated_ones() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 4, 16)).astype(np.float32)
    table = random.normal(size=(32, 16)).astype(np.float32)
    ids = random.integers(0, 32, (8, 4), np.int32)
    inner, outer = (random.normal(size=s).astype(np.float32) for s in ((16, 32), (32, 16)))

    def function(x: Any, ids: Any, table: Any, inner: Any, outer: Any) -> Any:
        hidden = jnp.tanh(sharding.linear(x + sharding.lookup(table, ids), inner))
        return jnp.sum(jnp.square(sharding.linear(hidden, outer)))

    differentiate = jax.jit(jax.value_and_grad(function, argnums=(0, 2, 3, 4)))
    replicated = differentiate(x, ids, table, inner, outer)
    mesh = meshes.create(**ALL)
    specs = (("tensor", "fsdp"), ("fsdp", "tensor"), ("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        parts = [
            jax.device_put(array, jax.NamedSharding(mesh, PartitionSpec(*spec)))
            for array, spec in zip((table, inner, outer), specs, strict=True)
        ]
        assert parts[1].addressable_shards[0].data.shape == (8, 16)
        sharded = differentiate(*sharding.local_to_global(mesh, (x, ids)), *parts)
    for part, gradient in zip(parts, sharded[1][1:], strict=True):
        assert gradient.sharding.is_equivalent_to(part.sharding, 2)
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(replicated), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("once", [False, True])
def test_the_gradient_of_a_value_shared_by_a_scan_is_all_reduced_once(once: bool) -> None:
    mesh, layers = meshes.create(replica=8), 5

    def of_one(x: Any, shared: Any) -> Any:
        x, shared = kernels.match_vma((x, shared))
        return jnp.tanh(x @ shared)

    def function(shared: Any, x: Any) -> Any:
        shared = sharding.defer_gradient_reduction(shared) if once else shared

        def layer(x: Any, _: None) -> tuple[Any, None]:
            return sharding.shard_map(of_one, x, shared, out_specs=sharding.spec(x)), None

        return jax.lax.scan(layer, x, length=layers)[0].sum()

    with jax.set_mesh(mesh):
        shared = meshes.replicate(jnp.eye(16), mesh)
        x = sharding.local_to_global(mesh, np.ones((8, 16), np.float32))
        compiled = jax.jit(jax.grad(function)).lower(shared, x).compile()
        totals = collectives.totals(collectives.read(compiled.as_text() or "", mesh))
    one_sum = 2 * 7 * 16 * 16 * 4 // 8
    assert totals["all-reduce", ("replica",)] == one_sum * (1 if once else layers)


@pytest.mark.parametrize("axes", [{"replica": 8}, {"fsdp": 2, "memory": 4}, {"replica": 1}])
def test_microbatches_take_rows_from_every_device_without_moving_them(axes: Any) -> None:
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    mesh = meshes.create(**axes)
    shares = math.prod(mesh.shape[axis] for axis in sharding.DATA_AXES)
    split = jax.jit(
        lambda x: jax.lax.scan(lambda c, y: (c, y), 0, sharding.split_microbatches(x, 2))[1]
    )
    with jax.set_mesh(mesh):
        parts = split(sharding.local_to_global(mesh, rows))
    np.testing.assert_array_equal(parts, rows.reshape(8, 2, 2).swapaxes(0, 1))
    assert parts.addressable_shards[0].data.shape == (2, 8 // shares, 2)
