"""The device mesh.

It has four axes, of size 1 where they are not in use. All are explicit: the sharding of an array is
part of its type, so a missing collective is an error at tracing time and not a silent gather.

    replica   shards the batch alone: for slow links, between slices or hosts
    fsdp      shards the batch, and dense parameters where they are stored
    memory    shards the batch, and value tables or experts where they are stored and used
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
    """Returns the mesh over all devices of all processes, or over the first that it needs.

    Neighbours on the interconnect become neighbours on the last axes; `replica` goes between the
    slices of a job that has several.

    Args:
      config: the mesh section.
      *batch_sizes: sequences of each batch that will be sharded.
      devices: those of a topology to compile for; by default those that are there.

    Raises:
      ConfigError: more devices than there are, or a batch that it cannot shard evenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices))
    num_used = math.prod(sizes.values())
    in_use = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
    if num_used > len(devices):
        raise ConfigError(
            f"{in_use}: needs {num_used} devices, more than the {len(devices)} that are there"
        )
    if num_used < len(devices) and jax.process_count() > 1:
        replicas = len(devices) * sizes[REPLICA] // num_used
        raise ConfigError(
            f"{in_use or 'mesh.replica=1'}: uses {num_used} of {len(devices)} devices; several"
            f" processes must use all: mesh.replica={replicas} does"
        )
    shards = num_batch_shards(sizes)
    for batch_size in batch_sizes:
        if batch_size % shards:
            raise ConfigError(
                f"{in_use}: every batch must be a multiple of its {shards} shards (replica x fsdp x"
                f" memory), and one has {batch_size} sequences (train.batch_size /"
                f" train.gradient_accumulation, evaluation.batch_size);"
                f" {-(-batch_size // shards) * shards} would do"
            )
    shape = tuple(sizes.values())
    grid = _arranged(devices[:num_used], shape)
    # Without jit (debugging) no axis is explicit: some of JAX's operations mistype shardings there,
    # and within `shard_map` a print shows tracers. All acts on global arrays, as on one device.
    axis_type = AxisType.Auto if jax.config.jax_disable_jit else AxisType.Explicit
    return Mesh(grid, AXES, axis_types=(axis_type,) * len(AXES))


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis; `replica` -1 takes as many as the others leave."""
    others = {FSDP: config.fsdp, MEMORY: config.memory, TENSOR: config.tensor}
    left = max(1, num_devices // math.prod(others.values()))
    return {REPLICA: left if config.replica == -1 else config.replica} | others


def num_batch_shards(sizes: Mapping[str, int]) -> int:
    """Returns the number of shards of a batch on a mesh of these sizes."""
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
    """Returns the bytes of memory of an attached TPU; None for other devices."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def on_mesh() -> bool:
    """Whether code is traced for a mesh, and not for one device or one device's part."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def spec(array: Array) -> PartitionSpec:
    """Returns how an array is sharded; entries of a tuple or a name for each dimension."""
    return jax.typeof(array).sharding.spec


def axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
