"""The mesh: its sizes, what divides which array, and what crosses devices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import tiny
from tests import meshes
from umv2 import kernels, sharding
from umv2.config import ConfigError, from_config_dict
from umv2.planning.hlo import collectives

ALL = {"fsdp": 2, "memory": 2, "tensor": 2}


def rules(**fields: Any) -> dict[str, tuple[str, ...]]:
    values = tiny.get_config().mesh
    values.update(fields)
    return sharding.rules(meshes.config(**values))


def test_replicas_take_the_devices_that_the_other_axes_leave() -> None:
    assert dict(meshes.create(replica=-1, memory=2).shape) == {
        "replica": 4,
        "fsdp": 1,
        "memory": 2,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("axes", "batch_size", "message"),
    [
        ({"memory": 16}, 16, "mesh.memory=16: needs 16 devices, more than the 8"),
        ({"fsdp": 2, "memory": 2}, 6, "4 shares .* must divide every batch, .* 6 .*; 8 would do"),
    ],
)
def test_an_impossible_mesh_is_named(axes: Any, batch_size: int, message: str) -> None:
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
def test_a_size_that_an_axis_does_not_divide_is_named_with_one_that_it_does(
    family: str, fields: dict[str, int], message: str
) -> None:
    values = tiny.get_config(family)
    values.model.vocab_size = 264
    values.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        from_config_dict(values)


def test_parameters_and_their_moments_are_divided_alike() -> None:
    sizes = {"replica": 1, "fsdp": 2, "memory": 4, "tensor": 2}
    for parameter in ("params/blocks/ffn/down", "optimizer/model/0/mu/blocks/ffn/down"):
        spec = sharding.partition(parameter, (4, 32, 16), rules(), sizes)
        assert spec == PartitionSpec(None, "tensor", "fsdp")
    for table in ("store/values", "optimizer/store/0/nu/values"):
        spec = sharding.partition(table, (4, 64, 16), rules(table_sharding="rows"), sizes)
        assert spec == PartitionSpec(None, "memory", None)
    both = rules(parameters="fsdp_and_memory")
    assert sharding.partition("params/head", (64, 16), both, sizes) == PartitionSpec(
        "tensor", ("fsdp", "memory")
    )


def test_an_axis_that_would_divide_two_dimensions_is_a_collision() -> None:
    sizes = {"replica": 1, "fsdp": 2, "memory": 4, "tensor": 2}
    colliding = rules() | {"expert_hidden": ("memory",)}
    with pytest.raises(ValueError, match="two dimensions of params/sparse/up by one mesh axis"):
        sharding.partition("params/sparse/up", (2, 8, 16, 32), colliding, sizes)
    sharding.partition("params/sparse/up", (2, 8, 16, 32), rules(), sizes)


def test_products_and_lookups_of_divided_parameters_are_those_of_whole_ones() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 4, 16)).astype(np.float32)
    table = random.normal(size=(32, 16)).astype(np.float32)
    ids = random.integers(0, 32, (8, 4), np.int32)
    inner, outer = (random.normal(size=s).astype(np.float32) for s in ((16, 32), (32, 16)))

    def function(x: Any, ids: Any, table: Any, inner: Any, outer: Any) -> Any:
        hidden = jnp.tanh(sharding.linear(x + sharding.lookup(table, ids), inner))
        return jnp.sum(jnp.square(sharding.linear(hidden, outer)))

    differentiate = jax.jit(jax.value_and_grad(function, argnums=(0, 2, 3, 4)))
    whole = differentiate(x, ids, table, inner, outer)
    mesh = meshes.create(**ALL)
    specs = (("tensor", "fsdp"), ("fsdp", "tensor"), ("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        parts = [
            jax.device_put(array, jax.NamedSharding(mesh, PartitionSpec(*spec)))
            for array, spec in zip((table, inner, outer), specs, strict=True)
        ]
        assert parts[1].addressable_shards[0].data.shape == (8, 16)
        divided = differentiate(*sharding.local_to_global(mesh, (x, ids)), *parts)
    for part, gradient in zip(parts, divided[1][1:], strict=True):
        assert gradient.sharding.is_equivalent_to(part.sharding, 2)
    for ours, theirs in zip(jax.tree.leaves(divided), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("once", [False, True])
def test_the_gradient_of_what_a_scan_shares_is_summed_once(once: bool) -> None:
    mesh, layers = meshes.create(replica=8), 5

    def of_one(x: Any, shared: Any) -> Any:
        x, shared = kernels.vary_alike((x, shared))
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
        found = collectives.totals(collectives.read(compiled.as_text() or "", mesh))
    one_sum = 2 * 7 * 16 * 16 * 4 // 8
    assert found["all-reduce", ("replica",)] == one_sum * (1 if once else layers)


@pytest.mark.parametrize("axes", [{"replica": 8}, {"fsdp": 2, "memory": 4}, {"replica": 1}])
def test_microbatches_take_rows_of_every_device_and_leave_them_there(axes: Any) -> None:
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
