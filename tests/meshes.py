"""Meshes of the forced CPU devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umv2 import sharding
from umv2.config import Config, MeshConfig
from umv2.cost import exchange


def config(**fields: Any) -> MeshConfig:
    """A mesh section: the given fields, and size 1 for the other axes."""
    defaults = {axis: 1 for axis in sharding.AXES} | {
        "parameters": "fsdp",
        "table_sharding": "auto",
    }
    return MeshConfig(**(defaults | fields))


def create(**fields: Any) -> Mesh:
    """The mesh of `config`."""
    return sharding.create_mesh(config(**fields))


def resolved(experiment: Config, num_tokens: int = 256) -> Config:
    """The experiment with a resolved mesh, as training resolves it."""
    sizes = sharding.axis_sizes(experiment.mesh, jax.device_count())
    return exchange.resolve_mesh(experiment, sizes, num_tokens)


def replicate[T](tree: T, mesh: Mesh) -> T:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
