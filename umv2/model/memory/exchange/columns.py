"""Tables sharded by columns: each device pools its columns for the tokens of all devices.

Row ids are all-gathered. Each device computes partial pre-scores from its columns, which are
reduce-scattered, and pools its columns of the values, which an all-to-all returns to their tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from umv2 import kernels
from umv2.model.memory.exchange.local import (
    Masters,
    Options,
    divisors,
    fault,
    flat,
    pool,
    smallest_dtype,
)
from umv2.model.rematerialization import keep


def column_sizes(value_dim: int, pre_value_dim: int, num_cores: int) -> list[int]:
    """Returns the numbers of devices over which tables can be sharded by columns, ascending.

    Each must divide the widths of both tables, and give a device either columns of a single core or
    all columns of some cores.
    """
    sizes = divisors(math.gcd(value_dim, pre_value_dim))
    return [size for size in sizes if size % num_cores == 0 or num_cores % size == 0]


def column_fault(value_dim: int, pre_value_dim: int, num_cores: int, size: int) -> str | None:
    """Returns why tables cannot be sharded by columns over `size` devices, or None if they can."""
    sizes = column_sizes(value_dim, pre_value_dim, num_cores)
    rule = f"value_dim={value_dim} and pre_value_dim={pre_value_dim}"
    if num_cores > 1:
        rule += f", and be a divisor or a multiple of num_cores={num_cores}"
    return fault(size, sizes, rule)


def own_cores(num_cores: int, size: int) -> int:
    """Returns the number of cores that the columns of one device belong to."""
    return max(1, num_cores // size)


def pool_columns(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p_all"] | None,
    slots: Int32[Array, "t k"] | None,
    masters: Masters | None,
    options: Options,
) -> Float[Array, "t e"]:
    """Pools this device's columns for all tokens; returns all columns for this device's tokens."""
    axis, num_slots = options.axis, options.num_slots
    num_tokens = rows.shape[0]
    rows = keep(lax.all_gather(rows, axis, tiled=True))
    if pre_values is not None and pre_inputs is not None:
        own_inputs = keep(lax.all_to_all(pre_inputs.astype(options.dtype), axis, 1, 0, tiled=True))
        trained: dict[str, Any] = {}
        if masters is not None:
            trained = {
                "master": flat(masters.tables[1]),
                "first_master": masters.first_row,
                "packed": flat(masters.packed[1]),
            }
        with jax.named_scope("value_aggregation"):
            partial = kernels.row_products(
                flat(pre_values),
                rows,
                own_inputs,
                **trained,
                chunk_size=options.chunk_size,
                implementation=options.implementation,
            )
        pre_scores = keep(lax.psum_scatter(partial.astype(options.dtype), axis, tiled=True))
        gates = kernels.activate(pre_scores.astype(partial.dtype), options.activation)
        weights = weights * gates[:, :, None]
    weights = keep(_own_weights(weights, axis, options.dtype))
    if slots is not None:
        slots = lax.all_gather(slots.astype(smallest_dtype(num_slots)), axis, tiled=True)
        slots = slots.astype(jnp.int32)
    pooled = pool(values, None, rows, weights, None, slots, masters, options)
    pooled = pooled.astype(options.dtype).reshape(-1, num_slots, values.shape[-1])
    return lax.all_to_all(pooled, axis, 0, 2, tiled=True).reshape(num_tokens, -1)


def _own_weights(
    weights: Float[Array, "t k c"], axis: str, dtype: DTypeLike
) -> Float[Array, "mt k own"]:
    """Gathers, for the tokens of all devices, the weights of this device's cores."""
    num_cores = weights.shape[-1]
    if num_cores == 1:
        return lax.all_gather(weights.astype(dtype), axis, tiled=True)
    # Devices that share a core each get a copy of its weights. Repeating before the cast sums the
    # gradients of the copies in the original dtype.
    copies = own_cores(num_cores, lax.axis_size(axis)) * lax.axis_size(axis) // num_cores
    weights = jnp.repeat(weights, copies, axis=2).astype(dtype)
    return lax.all_to_all(weights, axis, 2, 0, tiled=True)
