"""Operations on sharded arrays, which also work on a single device without a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from umv2.sharding.mesh import AXES, DATA_AXES, MEMORY, TENSOR, axes_of, on_mesh, spec
from umv2.sharding.rules import entry_of
from umv2.types import accumulation_dtype

# Name of the results of products that are rounded to a dtype narrower than they accumulate in.
ROUNDED_PRODUCT = "rounded product"


def create[T](function: Callable[..., T], shardings: Any, *arguments: Any) -> T:
    """Computes arrays directly with the given shardings, never unsharded on one device."""
    if jax.config.jax_disable_jit:
        return jax.device_put(function(*arguments), shardings)
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=shardings))(*arguments)


def gathered(parameter: Array, over: tuple[str, ...] = DATA_AXES) -> Array:
    """All-gathers a parameter over the given mesh axes; its gradient is reduce-scattered."""
    if not on_mesh():
        return parameter
    remaining = [tuple(a for a in axes_of(entry) if a not in over) for entry in spec(parameter)]
    return jax.sharding.reshard(parameter, PartitionSpec(*map(entry_of, remaining)))


def defer_gradient_reduction[T](tree: T) -> T:
    """Returns arrays whose gradients are all-reduced once here instead of at every use.

    For arrays that every layer of a scan, or every microbatch, reads: their gradients would be
    all-reduced in every one. Gradients with respect to what is returned are not reduced yet: add
    them to `zero_gradients`, and apply `reduce_gradients` in the end. Inside `shard_map`, apply
    `kernels.match_vma` before any other use.
    """

    def reduced(array: Array) -> Array:
        return jax.sharding.reshard(
            array, PartitionSpec(*spec(array), reduced=_replicating_axes(array))
        )

    return jax.tree.map(reduced, tree) if on_mesh() else tree


def zero_gradients[T](tree: T) -> T:
    """Returns zeros to which gradients with respect to these arrays can be added.

    If the reduction of the gradients is deferred, the zeros are not reduced yet either.
    """

    def zeros(array: Array) -> Array:
        own = spec(array)
        sharded = PartitionSpec(*own.partitions)
        plain = jnp.zeros(array.shape, array.dtype, out_sharding=sharded)
        return jax.sharding.reshard(plain, PartitionSpec(*own.partitions, unreduced=own.reduced))

    return jax.tree.map(zeros if on_mesh() else jnp.zeros_like, tree)


def reduce_gradients[T](gradients: T, arrays: T) -> T:
    """All-reduces gradients that were deferred; the result is sharded like the arrays."""

    def reduce(gradient: Array, array: Array) -> Array:
        return jax.sharding.reshard(gradient, spec(array))

    return jax.tree.map(reduce, gradients, arrays) if on_mesh() else gradients


def _replicating_axes(array: Array) -> set[str]:
    """Returns the mesh axes, of more than one device, that do not shard an array."""
    sizes = jax.sharding.get_abstract_mesh().shape
    used = {axis for entry in spec(array) for axis in axes_of(entry)}
    return {axis for axis in AXES if sizes[axis] > 1} - used


def linear(x: Float[Array, "*b i"], weight: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """Returns x @ weight in the dtype of x, gathering the weight in that dtype.

    The result is sharded like x, except for the last axis, which is sharded like the weight's. If
    the contracted axis is sharded, the result is all-reduced, in the dtype of x.

    All products accumulate in float32 (float64 for float64), and those of the backward pass have
    operands in the dtype of x too. The gradient of a float32 weight is not rounded to that dtype.
    """
    if x.dtype == accumulation_dtype(x.dtype):
        return _linear(x, weight)
    # Named for rematerialisation to save it rather than the wider result of the product.
    return checkpoint_name(_narrow_linear(x, weight, jax.typeof(weight)), ROUNDED_PRODUCT)


def _linear(x: Array, weight: Array) -> Array:
    return _contract(x, gathered(weight.astype(x.dtype)), ((x.ndim - 1,), (0,)), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_linear(x: Array, weight: Array, stored: Any) -> Array:
    """Computes `linear` for a dtype narrower than float32; `stored` is the type of the weight."""
    del stored
    return _linear(x, weight)


def _narrow_linear_forward(
    x: Array, weight: Array, stored: Any
) -> tuple[Array, tuple[Array, Array]]:
    del stored
    weight = gathered(weight.astype(x.dtype))
    return _linear(x, weight), (x, weight)


def _narrow_linear_backward(
    stored: Any, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    x_grad = _contract(grad, weight, ((x.ndim - 1,), (1,)), x.dtype)
    tokens = tuple(range(x.ndim - 1))
    weight_grad = _contract(x, grad, (tokens, tokens), stored.dtype, stored.sharding.spec)
    return x_grad, weight_grad


_narrow_linear.defvjp(_narrow_linear_forward, _narrow_linear_backward)


def _contract(
    a: Array,
    b: Array,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: jnp.dtype,
    out: PartitionSpec | None = None,
) -> Array:
    """Contracts axes of `a` with axes of `b`, accumulating in float32, and rounds to `dtype`.

    Sums over devices after rounding. The result is sharded like `out` or, by default, like the
    remaining axes of both.
    """
    product = functools.partial(
        jax.lax.dot_general,
        a,
        b,
        (axes, ((), ())),
        preferred_element_type=accumulation_dtype(a.dtype),
    )
    if not on_mesh():
        return product().astype(dtype)
    remaining = [
        spec(array)[axis]
        for array, contracted in ((a, axes[0]), (b, axes[1]))
        for axis in range(array.ndim)
        if axis not in contracted
    ]
    over = {name for axis in axes[0] for name in axes_of(spec(a)[axis])}
    partial = product(out_sharding=PartitionSpec(*remaining, unreduced=over)).astype(dtype)
    return jax.sharding.reshard(partial, PartitionSpec(*remaining) if out is None else out)


def lookup(table: Float[Array, "n d"], ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns `table[ids]`, sharded like the ids."""
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


def take_positions(x: Float[Array, "b t d"], positions: Int[Array, "b a"]) -> Float[Array, "b a d"]:
    """Gathers the given positions of each row."""

    def per_device(x: Array, positions: Array) -> Array:
        return jnp.take_along_axis(x, positions[:, :, None], axis=1)

    return shard_map(per_device, x, positions, out_specs=spec(x) if on_mesh() else None)


def shard_batch_like(array: Array, x: Array) -> Array:
    """Reshards the leading (batch) axis of an array like that of x."""
    if not on_mesh():
        return array
    return jax.sharding.reshard(array, PartitionSpec(spec(x)[0]))


def shard_batch_only(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """Reshards an array along the batch axis only."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def zeros(
    shape: tuple[int, ...], dtype: str, *names: Literal["batch", "heads"] | None
) -> Float[Array, "..."]:
    """Returns zeros whose leading axes are sharded like the named logical axes."""
    if not on_mesh():
        return jnp.zeros(shape, dtype)
    heads = TENSOR if jax.sharding.get_abstract_mesh().shape[TENSOR] > 1 else None
    over = {"batch": DATA_AXES, "heads": heads, None: None}
    return jnp.zeros(shape, dtype, out_sharding=PartitionSpec(*(over[name] for name in names)))


def shard_map(
    function: Callable[..., Any], *arguments: Any, out_specs: Any, check_vma: bool = True
) -> Any:
    """Calls a per-device function on the shards of its arguments, without resharding them.

    Args:
      function: the per-device function.
      *arguments: its arguments.
      out_specs: how its results are sharded.
      check_vma: whether JAX tracks over which mesh axes values vary. Kernels that do not declare it
        need False; then no differentiated argument may be replicated.
    """
    if not on_mesh():
        return function(*arguments)
    in_specs = jax.tree.map(spec, arguments)
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    return mapped(*arguments)


def shard_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Shards the sequence axis over `tensor`, whose devices hold the same tokens.

    A sequence that cannot be sharded evenly, as in decoding, is returned unchanged: the devices
    along `tensor` then do the same work.
    """
    if not on_mesh():
        return x
    size = jax.sharding.get_abstract_mesh().shape[TENSOR]
    return x if x.shape[1] % size else jax.sharding.reshard(x, PartitionSpec(DATA_AXES, TENSOR))


def gather_sequence(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Gathers the sequence axis; the inverse of `shard_sequence`."""
    return jax.sharding.reshard(x, PartitionSpec(DATA_AXES)) if on_mesh() else x


def table_layout(values: Float[Array, "*l n v"]) -> Literal["replicated", "rows", "columns"]:
    """Returns which dimension of a value table is sharded over `memory`."""
    if not on_mesh():
        return "replicated"
    rows, columns = (MEMORY in axes_of(entry) for entry in spec(values).partitions[-2:])
    return "rows" if rows else "columns" if columns else "replicated"


def sharded_axes(array: Array, axis: int) -> tuple[str, ...]:
    """Returns the mesh axes that shard one dimension of an array."""
    return axes_of(spec(array)[axis]) if on_mesh() else ()


def gather_tokens[T](tree: T, over: tuple[str, ...]) -> T:
    """All-gathers tokens over `memory` if it is in `over`; called inside `shard_map`.

    Devices along `tensor` already hold the same tokens.
    """
    if MEMORY not in over:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, MEMORY, tiled=True), tree)


def scatter_tokens(x: Float[Array, "mt d"], over: tuple[str, ...]) -> Float[Array, "t d"]:
    """Reduces the partial outputs of gathered tokens and returns those of this device's tokens."""
    if TENSOR in over:
        x = jax.lax.psum(x, TENSOR)
    return jax.lax.psum_scatter(x, MEMORY, tiled=True) if MEMORY in over else x


def reduce_to_shards(
    gradient: Array, shards: Sequence[tuple[str, ...]], *, over: tuple[str, ...]
) -> Array:
    """Sums a gradient over devices with different tokens; called inside `shard_map`.

    Args:
      gradient: of a gathered parameter, from this device's tokens.
      shards: mesh axes that shard each dimension of the parameter.
      over: mesh axes that shard the tokens.

    Returns:
      The gradient of this device's shard of the parameter.
    """
    for dimension, axes in enumerate(shards):
        if scattered := tuple(axis for axis in axes if axis in over):
            gradient = jax.lax.psum_scatter(
                gradient, scattered, scatter_dimension=dimension, tiled=True
            )
            over = tuple(axis for axis in over if axis not in scattered)
    return jax.lax.psum(gradient, over)


def shard_map_tokens(
    function: Callable[..., tuple[Any, Any]], batched: Any, shared: Any
) -> tuple[Any, Any]:
    """Calls a per-device function on every device's shard of the batch.

    Args:
      function: per-device function `(batched, shared) -> (outputs, sums)`.
      batched: pytree of [b, t, ...] arrays, all with the same sharding.
      shared: pytree of other arrays, which keep their shardings.

    Returns:
      `outputs`, [b, t, ...] arrays sharded like `batched`, and `sums`, all-reduced over all tokens.
    """
    if not on_mesh():
        return function(batched, shared)
    tokens = PartitionSpec(*spec(jax.tree.leaves(batched)[0])[:2])
    token_axes = tuple(axis for entry in tokens for axis in axes_of(entry))

    def per_device(batched: Any, shared: Any) -> tuple[Any, Any]:
        outputs, sums = function(batched, shared)
        return outputs, jax.lax.psum(sums, token_axes)

    return shard_map(per_device, batched, shared, out_specs=(tokens, PartitionSpec()))
