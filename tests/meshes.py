"""Meshes of the forced CPU devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umv2 import parallel
from umv2.config import MeshConfig


def create(**fields: Any) -> Mesh:
    """The mesh of the given sizes, with 1 for the others."""
    defaults = {axis: 1 for axis in parallel.AXES} | {
        "parameters": "fsdp",
        "table_sharding": "auto",
    }
    return parallel.create_mesh(MeshConfig(**(defaults | fields)))


def replicate[T](tree: T, mesh: Mesh) -> T:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
