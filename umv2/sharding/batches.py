"""Batches on a mesh: the rows that each process loads, and the global arrays made from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from umv2.sharding.mesh import DATA_AXES, on_mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that the devices of this process hold, ascending.

    Rows held by several processes (if a `tensor` group spans them) are loaded by each of them.
    """
    shards = batch_sharding(mesh).devices_indices_map((batch_size,))
    local_shards = [shards[device][0] for device in mesh.local_devices]
    return tuple(sorted({row for shard in local_shards for row in range(batch_size)[shard]}))


def local_to_global(mesh: Mesh, tree: Any) -> Any:
    """Assembles global batch arrays from the `local_rows` of each process."""
    sharding = batch_sharding(mesh)
    num_batch_shards = mesh.size // sharding.shard_shape((mesh.size,))[0]
    num_local_shards = len(local_rows(mesh, num_batch_shards))

    def assemble(rows: np.ndarray) -> Array:
        shape = (len(rows) * num_batch_shards // num_local_shards, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(assemble, tree)


def gather_to_hosts(mesh: Mesh, array: Array) -> np.ndarray:
    """Gathers a batch array to every process."""
    with jax.disable_jit(False):  # the resharding happens in jit
        replicated = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    return np.asarray(replicated.addressable_data(0))


def split_microbatches(x: Array, parts: int) -> Array:
    """Reshapes [b, ...] to [parts, b / parts, ...] without moving rows between devices."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    # Explicit, because with one row per device JAX would shard the microbatch axis instead.
    sharding = PartitionSpec(DATA_AXES) if on_mesh() else None
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=sharding), 1, 0)
