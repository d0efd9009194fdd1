"""The device mesh, and the one place where per-device code is cut out of the global program.

The mesh has four axes, of size 1 where they are not in use. All are explicit: every array's
sharding is part of its type, so a missing collective is an error at tracing time and not a silent
gather.

    replica   divides the batch alone: for slow links, between slices or hosts
    fsdp      divides the batch, and dense parameters where they are stored
    memory    divides the batch, and value tables or experts where they are stored and used
    tensor    divides heads, FFN and vocabulary; in memory layers, the sequence

What divides which dimension of which parameter is said in `PARAMETER_AXES` and `rules`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import kernels_pallas
from kernels_pallas import UnsupportedError, common
from umv2.config import ConfigError, MeshConfig

REPLICA, FSDP, MEMORY, TENSOR = AXES = ("replica", "fsdp", "memory", "tensor")
DATA_AXES = (REPLICA, FSDP, MEMORY)

# The logical axes of each parameter's last dimensions; those before them are stacks of layers.
# Optimizer moments have the same names under other prefixes.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(params|model|mu|nu)/(embedding|head)", ("vocabulary", "hidden")),
    (r"attention/(query|key|value)", ("hidden", "heads")),
    (r"attention/output", ("heads", "hidden")),
    (r"ffn/(gate|up)", ("hidden", "ffn")),
    (r"ffn/down", ("ffn", "hidden")),
    (r"sparse/(query|pre|output_gate)", ("hidden", None)),
    (r"sparse/output", (None, "hidden")),
    (r"sparse/keys", (None, "key")),
    (r"sparse/router", ("expert_hidden", None)),
    (r"sparse/(gate|up)", (None, "expert_hidden", "expert")),
    (r"sparse/down", (None, "expert", "expert_hidden")),
    (r"store/(.*/)?(values|pre_values)", ("table", "row", "column")),
)


def create_mesh(
    config: MeshConfig, *batch_sizes: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh over all devices of all processes, or over the first that it needs.

    Neighbours on the interconnect become neighbours on the last axes; `replica` goes between the
    slices of a job that has several.

    Args:
      config: the mesh section.
      *batch_sizes: sequences of each kind of batch that will be divided.
      devices: those of a topology to compile for; by default those that are there.

    Raises:
      ConfigError: more devices than there are, or a batch that they do not divide.
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
    shares = num_shares(sizes)
    for batch_size in batch_sizes:
        if batch_size % shares:
            raise ConfigError(
                f"{in_use}: {shares} shares (replica x fsdp x memory) must divide every batch, and"
                f" one has {batch_size} sequences (train.batch_size / train.gradient_accumulation,"
                f" evaluation.batch_size); {-(-batch_size // shares) * shares} would do"
            )
    shape = tuple(sizes.values())
    grid = _arranged(devices[:num_used], shape)
    # Without jit (debugging) no axis is explicit: some of JAX's operations mistype shardings there,
    # and within `shard_map` a print shows tracers. All acts on global arrays, as on one device.
    kind = AxisType.Auto if jax.config.jax_disable_jit else AxisType.Explicit
    return Mesh(grid, AXES, axis_types=(kind,) * len(AXES))


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis; `replica` -1 takes as many as the others leave."""
    others = {FSDP: config.fsdp, MEMORY: config.memory, TENSOR: config.tensor}
    left = max(1, num_devices // math.prod(others.values()))
    return {REPLICA: left if config.replica == -1 else config.replica} | others


def num_shares(sizes: Mapping[str, int]) -> int:
    """Returns into how many shares a mesh of these sizes divides the batch."""
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


def rules(config: MeshConfig) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes that divide each logical axis of stored parameters."""
    dense = (FSDP, MEMORY) if config.parameters == "fsdp_and_memory" else (FSDP,)
    return {
        "hidden": dense,
        "key": dense,
        "heads": (TENSOR,),
        "ffn": (TENSOR,),
        "vocabulary": (TENSOR,),
        "expert_hidden": (FSDP,),
        "expert": (MEMORY, TENSOR),
        "table": (),
        "row": (MEMORY,) if config.table_sharding == "rows" else (),
        "column": (MEMORY,) if config.table_sharding == "columns" else (),
    }


def partition(
    name: str,
    shape: tuple[int, ...],
    rules: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """Returns how a named array of the train state is divided.

    Args:
      name: "params/blocks/ffn/gate", or an optimizer moment's that ends in the same.
      shape: all dimensions.
      rules: of the function `rules`.
      sizes: devices along each mesh axis; axes of size 1 divide nothing.

    Raises:
      ValueError: rules by which one mesh axis divides two dimensions, or two patterns that match.
    """
    found = [axes for pattern, axes in PARAMETER_AXES if re.search(f"(^|/){pattern}$", name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} matches several patterns of PARAMETER_AXES: {found}")
    logical = (
        (None,) * len(shape) if not found else (None,) * (len(shape) - len(found[0])) + found[0]
    )
    divided: list[tuple[str, ...]] = []
    for axis in logical:
        over = tuple(a for a in rules.get(axis or "", ()) if sizes[a] > 1)
        divided.append(over)
    used = [a for over in divided for a in over]
    if len(used) != len(set(used)):
        raise ValueError(f"rules divide two dimensions of {name} by one mesh axis: {divided}")
    return PartitionSpec(*map(_entry, divided))


def state_shardings(mesh: Mesh, config: MeshConfig, state: Any) -> Any:
    """Returns the sharding of every leaf of a train state, or of a part of it.

    Raises:
      ValueError: tables to divide, and mesh.table_sharding is still "auto".
    """
    axes = rules(config)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("store/") and config.table_sharding == "auto" and config.memory > 1:
            raise ValueError("mesh.table_sharding='auto': choose before arrays are divided")
        return NamedSharding(mesh, partition(name, leaf.shape, axes, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that the devices of this process hold, in rising order.

    Processes whose devices hold the same rows (those of one `tensor` group) each load them.
    """
    shares = batch_sharded(mesh).devices_indices_map((batch_size,))
    local_shares = [shares[device][0] for device in mesh.local_devices]
    return tuple(sorted({row for share in local_shares for row in range(batch_size)[share]}))


def local_to_global(mesh: Mesh, tree: Any) -> Any:
    """Assembles global batch arrays from the `local_rows` of each process."""
    sharding = batch_sharded(mesh)
    num_shares = mesh.size // sharding.shard_shape((mesh.size,))[0]
    num_local_shares = len(local_rows(mesh, num_shares))

    def assemble(rows: np.ndarray) -> Array:
        shape = (len(rows) * num_shares // num_local_shares, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(assemble, tree)


def on_every_process(mesh: Mesh, array: Array) -> np.ndarray:
    """Returns a batch array whole, on every process."""
    with jax.disable_jit(False):  # without jit nothing would be resharded
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    return np.asarray(whole.addressable_data(0))


def divide_batch(x: Array, parts: int) -> Array:
    """[b, ...] -> [parts, b / parts, ...]; every device's rows stay on that device."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    # Told so, because where devices have a row each JAX would rather divide the parts.
    sharding = PartitionSpec(DATA_AXES) if on_mesh() else None
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=sharding), 1, 0)


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
    """Returns how an array is divided; entries of a tuple or a name for each dimension."""
    return jax.typeof(array).sharding.spec


def create[T](function: Callable[..., T], shardings: Any, *arguments: Any) -> T:
    """Computes new arrays divided as they are to be stored, with no device holding one whole."""
    if jax.config.jax_disable_jit:
        return jax.device_put(function(*arguments), shardings)
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=shardings))(*arguments)


def gathered(parameter: Array, over: tuple[str, ...] = DATA_AXES) -> Array:
    """Returns a parameter that the given axes no longer divide: what a device computes with.

    The gradient goes back to where the parts are stored.
    """
    if not on_mesh():
        return parameter
    kept = [tuple(a for a in axes_of(entry) if a not in over) for entry in spec(parameter)]
    return jax.sharding.reshard(parameter, PartitionSpec(*map(_entry, kept)))


def summed_once(tree: Any) -> Any:
    """Returns arrays whose gradients are added up over devices here, and not where they are used.

    For what every layer of a scan reads: its gradient would be summed over the devices that hold it
    in every layer. In one device's code, `vary_alike` comes before other uses.
    """
    if not on_mesh():
        return tree

    def reduced(array: Array) -> Array:
        sizes = jax.sharding.get_abstract_mesh().shape
        used = {axis for entry in spec(array) for axis in axes_of(entry)}
        others = {axis for axis in AXES if sizes[axis] > 1} - used
        return jax.sharding.reshard(array, PartitionSpec(*spec(array), reduced=others))

    return jax.tree.map(reduced, tree)


def linear(x: Float[Array, "*b i"], weight: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """Returns x @ weight in the dtype of x, the weight gathered in that dtype.

    Divided as x is, but for the last axis, which is divided as the weight's is; summed over devices
    where the contracted axis is divided.
    """
    weight = gathered(weight.astype(x.dtype))
    if not on_mesh():
        return jnp.einsum("...i,io->...o", x, weight)
    out = PartitionSpec(*spec(x)[:-1], spec(weight)[-1])
    return jnp.einsum("...i,io->...o", x, weight, out_sharding=out)


def lookup(table: Float[Array, "n d"], ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns `table[ids]`, divided over devices as the ids are."""
    if not on_mesh():
        return table[ids]
    table = gathered(table)
    out = PartitionSpec(*spec(ids), None)
    if spec(table)[0] is None:
        return table.at[ids].get(out_sharding=out)

    def per_device(part: Array, ids: Array) -> Array:
        own = ids - jax.lax.axis_index(TENSOR) * len(part)
        present = (own >= 0) & (own < len(part))
        rows = jnp.where(present[..., None], part[jnp.where(present, own, 0)], 0)
        return jax.lax.psum(rows, TENSOR)

    return map_per_device(per_device, table, ids, out_specs=out)


def columns(x: Float[Array, "b t d"], places: Int[Array, "b a"]) -> Float[Array, "b a d"]:
    """Returns the columns of every row that `places` names."""

    def per_device(x: Array, places: Array) -> Array:
        return jnp.take_along_axis(x, places[:, :, None], axis=1)

    return map_per_device(per_device, x, places, out_specs=spec(x) if on_mesh() else None)


def divided_like(array: Array, x: Array) -> Array:
    """Returns an array whose first axis, a batch, is divided as that of x is."""
    if not on_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(spec(x)[0]))


def rows_whole(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """Returns an array of which every device has whole rows, those of its share of the batch."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def zeros(
    shape: tuple[int, ...], dtype: str, *names: Literal["batch", "heads"] | None
) -> Float[Array, "..."]:
    """Returns zeros whose first axes are divided as batches and heads are."""
    if not on_mesh():
        return jnp.zeros(shape, dtype)
    heads = TENSOR if jax.sharding.get_abstract_mesh().shape[TENSOR] > 1 else None
    over = {"batch": DATA_AXES, "heads": heads, None: None}
    return jnp.zeros(shape, dtype, out_sharding=PartitionSpec(*(over[name] for name in names)))


def map_per_device(function: Callable[..., Any], *arguments: Any, out_specs: Any) -> Any:
    """Runs a function of one device's arrays on every device's parts, divided as they are."""
    if not on_mesh():
        return function(*arguments)
    in_specs = jax.tree.map(spec, arguments)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*arguments)


def split_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Divides the sequence over `tensor`, whose devices hold the same tokens.

    A sequence that it does not divide, as when decoding, stays: the devices do the same work.
    """
    if not on_mesh():
        return x
    size = jax.sharding.get_abstract_mesh().shape[TENSOR]
    return x if x.shape[1] % size else jax.sharding.reshard(x, PartitionSpec(DATA_AXES, TENSOR))


def join_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Undoes `split_sequence`."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def table_layout(values: Float[Array, "*l n v"]) -> Literal["whole", "rows", "columns"]:
    """Returns what `memory` divides of a value table."""
    if not on_mesh():
        return "whole"
    rows, columns = (MEMORY in axes_of(entry) for entry in spec(values).partitions[-2:])
    return "rows" if rows else "columns" if columns else "whole"


def divided(array: Array, axis: int) -> tuple[str, ...]:
    """Returns the mesh axes that divide one dimension of an array."""
    return axes_of(spec(array)[axis]) if on_mesh() else ()


def gather_tokens[T](tree: T, over: tuple[str, ...]) -> T:
    """Joins, in one device's code, the tokens of the devices along `memory` if that is in `over`.

    Those along `tensor` hold the same tokens.
    """
    if MEMORY not in over:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, MEMORY, tiled=True), tree)


def scatter_tokens(x: Float[Array, "mt d"], over: tuple[str, ...]) -> Float[Array, "t d"]:
    """Adds up the devices' parts of joined tokens' outputs; each gets those of its own tokens."""
    if TENSOR in over:
        x = jax.lax.psum(x, TENSOR)
    return jax.lax.psum_scatter(x, MEMORY, tiled=True) if MEMORY in over else x


def vary_alike[T](arrays: T, axes: tuple[str, ...] = ()) -> T:
    """Makes arrays vary, in one device's code, over `axes` and every axis that one varies over.

    JAX then sums their gradients over the devices; a custom derivative must leave that to it.
    """
    return common.vary_alike(arrays, axes=axes)


def axes_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _entry(axes: tuple[str, ...]) -> Any:
    """The entry of a PartitionSpec that names mesh axes."""
    return axes if len(axes) > 1 else axes[0] if axes else None


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
      batched: pytree of [b, t, ...] arrays, all divided alike.
      shared: pytree of arrays that every device sees as they are stored.

    Returns:
      `outputs`, [b, t, ...] and divided as `batched`, and `sums`, added over all tokens.
    """
    if not on_mesh():
        return function(batched, shared)
    tokens = PartitionSpec(*spec(jax.tree.leaves(batched)[0])[:2])
    token_axes = tuple(axis for entry in tokens for axis in axes_of(entry))

    def per_device(batched: Any, shared: Any) -> tuple[Any, Any]:
        outputs, sums = function(batched, shared)
        return outputs, jax.lax.psum(sums, token_axes)

    return map_per_device(per_device, batched, shared, out_specs=(tokens, PartitionSpec()))
