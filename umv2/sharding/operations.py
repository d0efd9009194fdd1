"""Operations on sharded arrays, written once for one device and for a mesh."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from umv2.sharding.mesh import AXES, DATA_AXES, MEMORY, TENSOR, axes_of, on_mesh, spec
from umv2.sharding.rules import entry_of


def create[T](function: Callable[..., T], shardings: Any, *arguments: Any) -> T:
    """Computes new arrays with the given shardings; no device ever holds all of one."""
    if jax.config.jax_disable_jit:
        return jax.device_put(function(*arguments), shardings)
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=shardings))(*arguments)


def gathered(parameter: Array, over: tuple[str, ...] = DATA_AXES) -> Array:
    """All-gathers a parameter over the given axes: what a device computes with.

    Its gradient is reduced and scattered back.
    """
    if not on_mesh():
        return parameter
    kept = [tuple(a for a in axes_of(entry) if a not in over) for entry in spec(parameter)]
    return jax.sharding.reshard(parameter, PartitionSpec(*map(entry_of, kept)))


def defer_gradient_reduction(tree: Any) -> Any:
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

    Sharded as x is, but for the last axis, which is sharded as the weight's is; all-reduced where
    the contracted axis is sharded.
    """
    weight = gathered(weight.astype(x.dtype))
    if not on_mesh():
        return jnp.einsum("...i,io->...o", x, weight)
    out = PartitionSpec(*spec(x)[:-1], spec(weight)[-1])
    return jnp.einsum("...i,io->...o", x, weight, out_sharding=out)


def lookup(table: Float[Array, "n d"], ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns `table[ids]`, sharded over devices as the ids are."""
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

    return shard_map(per_device, table, ids, out_specs=out)


def take_positions(x: Float[Array, "b t d"], places: Int[Array, "b a"]) -> Float[Array, "b a d"]:
    """Returns the positions of every row that `places` names."""

    def per_device(x: Array, places: Array) -> Array:
        return jnp.take_along_axis(x, places[:, :, None], axis=1)

    return shard_map(per_device, x, places, out_specs=spec(x) if on_mesh() else None)


def shard_batch_like(array: Array, x: Array) -> Array:
    """Returns an array whose first axis, a batch, is sharded as that of x is."""
    if not on_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(spec(x)[0]))


def shard_batch_only(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """Returns an array sharded along the batch alone."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def zeros(
    shape: tuple[int, ...], dtype: str, *names: Literal["batch", "heads"] | None
) -> Float[Array, "..."]:
    """Returns zeros whose first axes are sharded as batches and heads are."""
    if not on_mesh():
        return jnp.zeros(shape, dtype)
    heads = TENSOR if jax.sharding.get_abstract_mesh().shape[TENSOR] > 1 else None
    over = {"batch": DATA_AXES, "heads": heads, None: None}
    return jnp.zeros(shape, dtype, out_sharding=PartitionSpec(*(over[name] for name in names)))


def shard_map(function: Callable[..., Any], *arguments: Any, out_specs: Any) -> Any:
    """Runs a function of one device's arrays on every device's parts, sharded as they are."""
    if not on_mesh():
        return function(*arguments)
    in_specs = jax.tree.map(spec, arguments)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*arguments)


def shard_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Shards the sequence over `tensor`, whose devices hold the same tokens.

    A sequence of another length, as when decoding, stays: the devices do the same work.
    """
    if not on_mesh():
        return x
    size = jax.sharding.get_abstract_mesh().shape[TENSOR]
    return x if x.shape[1] % size else jax.sharding.reshard(x, PartitionSpec(DATA_AXES, TENSOR))


def gather_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Undoes `shard_sequence`."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def table_layout(values: Float[Array, "*l n v"]) -> Literal["replicated", "rows", "columns"]:
    """Returns which dimension of a value table `memory` shards."""
    if not on_mesh():
        return "replicated"
    rows, columns = (MEMORY in axes_of(entry) for entry in spec(values).partitions[-2:])
    return "rows" if rows else "columns" if columns else "replicated"


def sharded_axes(array: Array, axis: int) -> tuple[str, ...]:
    """Returns the mesh axes that shard one dimension of an array."""
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


def shard_map_tokens(
    function: Callable[..., tuple[Any, Any]], batched: Any, shared: Any
) -> tuple[Any, Any]:
    """Runs a function of per-device arrays on every device's shard of the batch.

    Args:
      function: `(batched, shared) -> (outputs, sums)`, written for one device.
      batched: pytree of [b, t, ...] arrays, all sharded alike.
      shared: pytree of arrays that every device sees as they are stored.

    Returns:
      `outputs`, [b, t, ...] and sharded as `batched`, and `sums`, added over all tokens.
    """
    if not on_mesh():
        return function(batched, shared)
    tokens = PartitionSpec(*spec(jax.tree.leaves(batched)[0])[:2])
    token_axes = tuple(axis for entry in tokens for axis in axes_of(entry))

    def per_device(batched: Any, shared: Any) -> tuple[Any, Any]:
        outputs, sums = function(batched, shared)
        return outputs, jax.lax.psum(sums, token_axes)

    return shard_map(per_device, batched, shared, out_specs=(tokens, PartitionSpec()))
