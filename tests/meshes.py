"""Meshes of the eight CPU devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umv2 import sharding
from umv2.config import Config, MeshConfig
from umv2.cost import exchange


def config(**fields: Any) -> MeshConfig:
    """Returns a mesh section with the given fields, and size 1 for the other axes."""
    defaults = {axis: 1 for axis in sharding.AXES} | {
        "parameters": "fsdp",
        "table_sharding": "auto",
    }
    return MeshConfig(**(defaults | fields))


def create(**fields: Any) -> Mesh:
    """Returns the mesh of `config`."""
    return sharding.create_mesh(config(**fields))


def resolved(experiment: Config, num_tokens: int = 256) -> Config:
    """Returns the experiment with its mesh resolved, as in training."""
    sizes = sharding.axis_sizes(experiment.mesh, jax.device_count())
    return exchange.resolve_mesh(experiment, sizes, num_tokens)


def replicate[T](tree: T, mesh: Mesh) -> T:
    """Replicates every array over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
