"""The device mesh, and the one place where per-device code is cut out of the global program.

The mesh has explicit axes: every array's sharding is part of its type, so a missing collective is
an error at tracing time and not a silent gather. `replica` divides the batch; parameters are
replicated over it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import kernels_pallas
from kernels_pallas import UnsupportedError
from umv2.config import ConfigError, MeshConfig

REPLICA = "replica"


def create_mesh(config: MeshConfig, *batch_sizes: int) -> Mesh:
    """Returns the mesh over all devices of all processes, or over the first `mesh.replica`.

    Args:
      config: the mesh section.
      *batch_sizes: sequences of each kind of batch that the replicas will divide.

    Raises:
      ConfigError: more replicas than devices, or a batch that they do not divide.
    """
    available = jax.device_count()
    replicas = available if config.replica == -1 else config.replica
    if replicas > available:
        raise ConfigError(f"mesh.replica={replicas}: must be at most the {available} devices here")
    for batch_size in batch_sizes:
        if batch_size % replicas:
            raise ConfigError(
                f"mesh.replica={replicas}: must divide every batch, and one has {batch_size}"
                " sequences (train.batch_size / train.gradient_accumulation, evaluation.batch_size)"
            )
    devices = np.asarray(jax.devices()[:replicas])
    return Mesh(devices, (REPLICA,), axis_types=(AxisType.Explicit,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(REPLICA))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that the devices of this process hold, in rising order.

    Processes whose devices hold the same rows (those of one `tensor` group) each load them.
    """
    mine = [
        share
        for device, (share,) in batch_sharded(mesh).devices_indices_map((batch_size,)).items()
        if device.process_index == jax.process_index()
    ]
    return tuple(sorted({row for share in mine for row in range(batch_size)[share]}))


def local_to_global(mesh: Mesh, tree: Any) -> Any:
    """Assembles global batch arrays from the `local_rows` of each process."""
    sharding = batch_sharded(mesh)
    num_shares = mesh.size // sharding.shard_shape((mesh.size,))[0]
    num_local_shares = len(local_rows(mesh, num_shares))

    def assemble(rows: np.ndarray) -> Array:
        shape = (len(rows) * num_shares // num_local_shares, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(assemble, tree)


def lookup(table: Float[Array, "n d"], ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns `table[ids]`, divided over devices as the ids are."""
    spec = jax.typeof(ids).sharding.spec
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    return table.at[ids].get(out_sharding=PartitionSpec(*spec, None))


def product_key_top_k(
    *arrays: Array | None, implementation: str = "auto", **options: Any
) -> tuple[Float[Array, "t hk c"], Int[Array, "t hk"]]:
    """Calls `kernels_pallas.product_key_top_k` on the arrays of one device.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    operator = kernels_pallas.product_key_top_k
    return _call(operator, arrays, implementation, options)


def value_aggregation(
    *arrays: Array, implementation: str = "auto", **options: Any
) -> Float[Array, "t e"]:
    """Calls `kernels_pallas.value_aggregation` on the arrays of one device.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    operator = kernels_pallas.value_aggregation
    return _call(operator, arrays, implementation, options)


def row_products(
    *arrays: Array, implementation: str = "auto", **options: Any
) -> Float[Array, "t k"]:
    """Calls `kernels_pallas.row_products` on the arrays of one device.

    Raises:
      ConfigError: as `value_aggregation`, whose implementation it takes.
    """
    operator = kernels_pallas.row_products
    return _call(operator, arrays, implementation, options, "value_aggregation")


def activate(
    x: Float[Array, "*shape"], activation: Literal["gelu", "silu", "relu"] | None
) -> Float[Array, "*shape"]:
    """Returns the activation of pre-scores, exactly as `value_aggregation` applies it."""
    return kernels_pallas.activate(x, activation)


def _call(
    operator: Callable[..., Any],
    arrays: tuple[Array | None, ...],
    implementation: str,
    options: dict[str, Any],
    field: str | None = None,
) -> Any:
    name = None if implementation == "auto" else implementation
    try:
        return operator(*arrays, implementation=name, **options)
    except UnsupportedError as error:
        field = f"model.memory.{field or operator.__name__}={implementation!r}"
        raise ConfigError(f"{field}: {error}") from error


def map_over_batch(
    function: Callable[..., tuple[Any, Any]], batched: Any, shared: Any
) -> tuple[Any, Any]:
    """Runs a function of per-device arrays on every device's share of the batch.

    Args:
      function: `(batched, shared) -> (outputs, sums)`, written for one device.
      batched: pytree of arrays divided along their first axis.
      shared: pytree of arrays that every device sees whole.

    Returns:
      `outputs`, divided along their first axis, and `sums`, added over all devices.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(batched, shared)

    def per_device(batched: Any, shared: Any) -> tuple[Any, Any]:
        outputs, sums = function(batched, shared)
        return outputs, jax.lax.psum(sums, REPLICA)

    return jax.shard_map(
        per_device,
        in_specs=(PartitionSpec(REPLICA), PartitionSpec()),
        out_specs=(PartitionSpec(REPLICA), PartitionSpec()),
    )(batched, shared)
