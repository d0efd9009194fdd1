"""The device mesh.

It has four axes, of size 1 if unused. All are explicit: the sharding of an array is part of its
type, so that a missing collective is an error at trace time rather than a silent gather.

    replica   shards only the batch; for slow links between slices or hosts
    fsdp      shards the batch, and stored dense parameters, which are gathered for use
    memory    shards the batch, and value tables or experts, which are used as shards
    tensor    shards heads, FFN and vocabulary; in memory layers, the sequence
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from umv2.config import ConfigError, MeshConfig

REPLICA, FSDP, MEMORY, TENSOR = AXES = ("replica", "fsdp", "memory", "tensor")
DATA_AXES = (REPLICA, FSDP, MEMORY)


def create_mesh(
    config: MeshConfig, *batch_sizes: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh over all devices of all processes, or over the first devices if it is small.

    Devices that are close on the interconnect are adjacent along the last axes; in a job with
    several slices, `replica` spans the slices.

    Args:
      config: mesh configuration.
      *batch_sizes: number of sequences of each batch that will be sharded.
      devices: devices of a topology to compile for; by default the attached devices.

    Raises:
      ConfigError: the mesh needs more devices than there are, or cannot shard a batch evenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    num_used = math.prod(sizes.values())
    in_use = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
    if num_used > len(devices):
        raise ConfigError(
            f"{in_use}: needs {num_used} devices, but only {len(devices)} are available"
        )
    if num_used < len(devices) and jax.process_count() > 1:
        replicas = len(devices) * sizes[REPLICA] // num_used
        raise ConfigError(
            f"{in_use or 'mesh.replica=1'}: uses {num_used} of {len(devices)} devices; a job of"
            f" several processes must use all, as mesh.replica={replicas} does"
        )
    shards = num_batch_shards(sizes)
    for batch_size in batch_sizes:
        if batch_size % shards:
            raise ConfigError(
                f"{in_use}: every batch size must be a multiple of the {shards} batch shards"
                f" (replica x fsdp x memory), but one is {batch_size} (train.batch_size /"
                f" train.gradient_accumulation, evaluation.batch_size);"
                f" {-(-batch_size // shards) * shards} would do"
            )
    shape = tuple(sizes.values())
    grid = _arranged(devices[:num_used], shape)
    # Without jit (debugging) use Auto axes: eagerly, some JAX operations infer wrong shardings for
    # Explicit axes, and `shard_map` would print tracers. Code then sees global arrays, as on one
    # device.
    axis_type = AxisType.Auto if jax.config.jax_disable_jit else AxisType.Explicit
    return Mesh(grid, AXES, axis_types=(axis_type,) * len(AXES))


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of each axis; `replica` -1 takes all devices that the others leave."""
    others = {FSDP: config.fsdp, MEMORY: config.memory, TENSOR: config.tensor}
    remaining = max(1, num_devices // math.prod(others.values()))
    return {REPLICA: remaining if config.replica == -1 else config.replica} | others


def num_batch_shards(sizes: Mapping[str, int]) -> int:
    """Returns the number of batch shards on a mesh with these axis sizes."""
    return math.prod(sizes[axis] for axis in DATA_AXES)


def _arranged(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise ConfigError(
                f"mesh.replica={shape[0]}: must be a multiple of the {len(slices)} slices"
            )
        within = (shape[0] // len(slices), *shape[1:])
        between = (len(slices), *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, between, devices)
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def tpu_memory(mesh: Mesh) -> int | None:
    """Returns the memory of an attached TPU device in bytes; None for other devices."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def on_mesh() -> bool:
    """Returns whether code is traced for a mesh: False on one device and inside `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def num_devices() -> int:
    """Returns the number of devices of the mesh in context; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def spec(array: Array) -> PartitionSpec:
    """Returns the PartitionSpec of an array."""
    return jax.typeof(array).sharding.spec


def axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
