"""The public operators: validate arguments and choose a backend."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import arguments, dispatch, tables
from kernels_pallas.array_types import AnyArray, Array, Float, Integer
from kernels_pallas.common import check, match_vma
from kernels_pallas.table_gradient.call import (
    TableGradientBackend,
    TableGradientCall,
    TableRows,
)
from kernels_pallas.tables import Implementation

# Sums by row run on the TensorCore, even if the SparseCores fetch the rows.
BACKENDS = dispatch.Backends[TableGradientBackend](
    "kernels_pallas.table_gradient",
    {
        "xla": "xla",
        "pallas_tpu": "tpu.backend",
        "pallas_sparsecore": "tpu.backend",
        "pallas_gpu": "gpu.backend",
    },
)


def table_gradient(
    indices: Integer[AnyArray, "num_tokens num_selected"],
    weights: Float[AnyArray, "num_tokens num_selected num_cores"],
    factors: Float[AnyArray, "num_tokens dim"],
    *,
    num_values: int,
    dtype: DTypeLike = jnp.float32,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "{num_values} dim"]:
    """Computes the dense gradient of a table from the contributions of all selections.

    For token t, selection k, core i and the i-th of `num_cores` equal slices of a row:

        gradient[indices[t, k], slice i] += weights[t, k, i] * factors[t, slice i]

    The derivatives of `value_aggregation` and `row_products` with respect to their tables are such
    sums: of the weights and the output gradient, and of the pre-scores' gradient and the
    pre-inputs.

    Sums are accumulated in float32, or in float64 if an argument or `dtype` is. An id that is
    selected repeatedly contributes each time, in an order that is fixed, except by "xla" on GPU.
    Not differentiable. Inside `jax.shard_map` the gradient is that of the local tokens; outside, on
    a mesh with explicit axes, all arrays must be replicated.

    Args:
        indices: ids of the selected rows, in [0, num_values); see `value_aggregation`.
        weights: the weight of each selection and core.
        factors: one row per token.
        num_values: rows of the table.
        dtype: of the gradient; the Pallas kernels write float32 and bfloat16.
        chunk_size: tokens that "xla" processes at once; by default as many as fit a memory budget.
        implementation: one of those of `value_aggregation`.
        platform: what the call will be compiled for; see `value_aggregation`.

    Raises:
        ValueError: the rank, shape, dtype or value of an argument is invalid; the message names the
            argument, its value and the rule.
        UnsupportedError: the named implementation does not support the call; the message says why.
    """
    given = {"indices": indices, "weights": weights, "factors": factors}
    call = _checked(given, num_values, dtype)
    chosen, call = _choose("table_gradient", call, chunk_size, (implementation, platform))
    return arguments.per_device(
        "table_gradient", _local_gradient, call, chosen, tokens_may_be_sharded=False
    )


def table_gradient_rows(
    indices: Integer[AnyArray, "num_tokens num_selected"],
    weights: Float[AnyArray, "num_tokens num_selected num_cores"],
    factors: Float[AnyArray, "num_tokens dim"],
    *,
    num_values: int,
    max_rows: int | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> TableRows:
    """Computes the row-sparse form of `table_gradient`, without an array of the size of the table.

    The result has one row for each distinct id, in ascending order, in the accumulation dtype. Ids
    out of range are clamped to the nearest row, so each of the first `num_rows` returned ids is
    valid; the others are padding (see `TableRows`).

    Args:
        indices: see `table_gradient`, as for all arguments not listed here.
        weights: the weight of each selection and core.
        factors: one row per token.
        num_values: rows of the table.
        max_rows: capacity of the result; the default, min(num_tokens * num_selected, num_values),
            always suffices. If more distinct ids are selected, the rows of the smallest ids are
            returned, and `num_rows` is the number of distinct ids.
        chunk_size: tokens that "xla" processes at once.
        implementation: one of those of `value_aggregation`.
        platform: what the call will be compiled for.

    Raises:
        ValueError, UnsupportedError: as `table_gradient`.
    """
    given = {"indices": indices, "weights": weights, "factors": factors}
    call = _checked(given, num_values, jnp.float32)
    max_rows = tables.checked_capacity(max_rows, call.indices, num_values)
    name = "table_gradient_rows"
    chosen, call = _choose(name, call, chunk_size, (implementation, platform))
    return arguments.per_device(
        name, _local_rows, call, max_rows, chosen, tokens_may_be_sharded=False
    )


def _local_gradient(call: TableGradientCall, implementation: str) -> Array:
    return BACKENDS[implementation].forward(match_vma(call))


def _local_rows(call: TableGradientCall, max_rows: int, implementation: str) -> TableRows:
    nearest = jnp.clip(call.indices, 0, max(0, call.num_values - 1))
    call = match_vma(dataclasses.replace(call, indices=nearest))
    return BACKENDS[implementation].rows(call, max_rows)


def _choose(
    operator: str,
    call: TableGradientCall,
    chunk_size: Any,
    where: tuple[str | None, dispatch.Platform | None],
) -> tuple[str, TableGradientCall]:
    """Chooses the implementation of a validated call, and its chunk size."""
    implementation, platform = where
    target = dispatch.lowering_platform(platform)
    num_selected, dim = call.indices.shape[1], call.factors.shape[1]
    default = tables.default_chunk(num_selected, dim, call.accumulation_dtype, target)
    chunk = arguments.chunk_tokens(chunk_size) or default
    call = dataclasses.replace(call, chunk_size=chunk)
    reasons = BACKENDS.unsupported_reasons(call, target)
    return dispatch.choose(operator, implementation, target, tables.AUTOMATIC, reasons), call


def _checked(given: dict[str, Any], num_values: Any, dtype: Any) -> TableGradientCall:
    """Converts the arguments to JAX arrays and checks that their shapes are consistent."""
    arrays = arguments.as_arrays(TableGradientCall, given)
    indices, weights, factors = arrays["indices"], arrays["weights"], arrays["factors"]
    num_values = arguments.as_integer("num_values", num_values)
    check(num_values >= 0, "num_values", num_values, "at least 0")
    tables.check_num_values("table", num_values, indices)
    rule = f"the shape of indices, {indices.shape}"
    check(weights.shape[:2] == indices.shape, "weights.shape[:2]", weights.shape[:2], rule)
    rule = f"as many rows as indices, {indices.shape[0]}"
    check(factors.shape[0] == indices.shape[0], "factors.shape", factors.shape, rule)
    num_cores, dim = weights.shape[2], factors.shape[1]
    divides = num_cores > 0 and dim % num_cores == 0
    check(divides, "weights.shape[-1]", num_cores, f"a divisor of factors.shape[1] = {dim}")
    dtype = jnp.dtype(dtype)
    check(jnp.issubdtype(dtype, jnp.floating), "dtype", dtype, "a floating-point dtype")
    arguments.check_ids("indices", indices, num_values)
    return TableGradientCall(**arrays, num_values=num_values, dtype=dtype)
