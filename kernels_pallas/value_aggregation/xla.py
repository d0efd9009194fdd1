"""Value aggregation in plain XLA operations: runs on every platform.

Tokens are processed in chunks, so that the gathered rows, [chunk, K, D] and not [T, K, D], are all
that is ever held. The backward pass fetches the rows again rather than saving them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import scan_chunks
from kernels_pallas.value_aggregation.activation import activate
from kernels_pallas.value_aggregation.options import Options
from kernels_pallas.value_aggregation.reference import accumulation_dtype
from kernels_pallas.value_aggregation.table_gradient import (
    RowGradients,
    sort_selections,
    sum_by_row,
    unique_ids,
)

# DEFAULT precision would round float32 operands to bfloat16 on TPU and to TF32 on GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def unsupported_reason(
    values: Any,
    indices: Any,
    scores: Any,
    pre_values: Any,
    pre_inputs: Any,
    slots: Any,
    options: Options,
    platform: str,
) -> str | None:
    """Why this implementation cannot take arguments of these shapes and dtypes: it always can."""
    del values, indices, scores, pre_values, pre_inputs, slots, options, platform
    return None


def forward(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: Int32[Array, "num_tokens top_m"] | None,
    options: Options,
) -> Float[Array, "num_tokens {options.num_slots}*value_dim"]:
    """Computes the output of `value_aggregation`, `chunk_size` tokens at a time."""
    activation, num_slots, chunk_size = options
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)
    num_cores = scores.shape[-1]

    def aggregate(_: None, chunk: Any) -> tuple[None, Array]:
        indices, scores, pre_inputs, slots = chunk
        weights = scores.astype(dtype)
        if pre_values is not None:
            pre_rows = _fetch_rows(pre_values, indices, dtype)
            pre_scores = _einsum("tkp,tp->tk", pre_rows, pre_inputs.astype(dtype))
            weights *= activate(pre_scores, activation)[:, :, None]
        rows = _split_cores(_fetch_rows(values, indices, dtype), num_cores)
        return None, _einsum("tksc,tkcd->tscd", _to_slots(weights, slots, num_slots), rows)

    _, output = scan_chunks(aggregate, None, (indices, scores, pre_inputs, slots), chunk_size)
    return output.reshape(indices.shape[0], num_slots * values.shape[1])


def backward(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: Int32[Array, "num_tokens top_m"] | None,
    output_grad: Float[Array, "num_tokens {options.num_slots}*value_dim"],
    options: Options,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Computes the gradients of (values, scores, pre_values, pre_inputs), each in its own dtype.

    Table gradients are dense and start from zero once; every chunk adds its rows in place, in the
    accumulation dtype.
    """
    _, num_slots, chunk_size = options
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)
    num_cores = scores.shape[-1]

    def accumulate(table_grads: Any, chunk: Any) -> tuple[Any, Any]:
        values_grad, pre_values_grad = table_grads
        indices, _, pre_inputs, slots, output_grad = chunk
        token_grads = _token_gradients(values, pre_values, chunk, options, dtype)
        scores_grad, pre_inputs_grad, weights, pre_scores_grad = token_grads
        if pre_scores_grad is not None:
            pre_rows_grad = pre_scores_grad * pre_inputs.astype(dtype)[:, None, :]
            pre_values_grad = _scatter_add_rows(pre_values_grad, indices, pre_rows_grad)
        output_grad = _split_slots_and_cores(output_grad, num_slots, num_cores)
        rows_grad = _einsum("tksc,tscd->tkcd", _to_slots(weights, slots, num_slots), output_grad)
        rows_grad = rows_grad.reshape(*indices.shape, values.shape[1])
        values_grad = _scatter_add_rows(values_grad, indices, rows_grad)
        return (values_grad, pre_values_grad), (scores_grad, pre_inputs_grad)

    # zeros_like keeps the manual axes over which a table varies inside shard_map; zeros would not.
    zeros = jax.tree.map(lambda table: jnp.zeros_like(table, dtype), (values, pre_values))
    per_token = (indices, scores, pre_inputs, slots, output_grad)
    grads = scan_chunks(accumulate, zeros, per_token, chunk_size)
    (values_grad, pre_values_grad), (scores_grad, pre_inputs_grad) = grads
    return jax.tree.map(
        lambda grad, primal: grad.astype(primal.dtype),
        (values_grad, scores_grad, pre_values_grad, pre_inputs_grad),
        (values, scores, pre_values, pre_inputs),
    )


def row_gradients(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: Int32[Array, "num_tokens top_m"] | None,
    output_grad: Float[Array, "num_tokens {options.num_slots}*value_dim"],
    max_rows: int,
    options: Options,
) -> RowGradients:
    """Computes the gradients of `value_aggregation`, those of the tables row by row.

    The gradients that a token has alone come first, from rows that are fetched in chunks of tokens;
    then the rows of the tables' gradients, from selections sorted by id. The order of a sum is
    fixed on CPU and TPU, and up to the device's atomics on GPU.
    """
    top_m = indices.shape[1]
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)

    def compute(_: None, chunk: Any) -> tuple[None, Any]:
        return None, _token_gradients(values, pre_values, chunk, options, dtype)

    output_grad = output_grad.astype(dtype)
    per_token = (indices, scores, pre_inputs, slots, output_grad)
    token_grads = scan_chunks(compute, None, per_token, options.chunk_size)[1]
    scores_grad, pre_inputs_grad, weights, pre_scores_grad = token_grads

    selections = sort_selections(indices)
    ids, num_rows = unique_ids(selections.ids, values.shape[0], max_rows)
    chunk_size = options.chunk_size * top_m
    rows, order = selections.rows, selections.order
    factors = output_grad.reshape(-1, values.shape[1])
    values_grad = sum_by_row(rows, order, weights, factors, slots, max_rows, chunk_size)
    if pre_inputs is None or pre_scores_grad is None:
        return RowGradients(ids, num_rows, values_grad, None, scores_grad, None)
    pre_values_grad = sum_by_row(
        rows, order, pre_scores_grad, pre_inputs.astype(dtype), None, max_rows, chunk_size
    )
    return RowGradients(ids, num_rows, values_grad, pre_values_grad, scores_grad, pre_inputs_grad)


def row_products(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens top_m"],
    inputs: Float[Array, "num_tokens dim"],
    options: Options,
) -> Float[Array, "num_tokens top_m"]:
    """Computes the output of `row_products`, `chunk_size` tokens at a time."""
    dtype = accumulation_dtype(table, inputs)

    def multiply(_: None, chunk: Any) -> tuple[None, Array]:
        indices, inputs = chunk
        rows = _fetch_rows(table, indices, dtype)
        return None, _einsum("tkd,td->tk", rows, inputs.astype(dtype))

    return scan_chunks(multiply, None, (indices, inputs), options.chunk_size)[1]


def table_gradient(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens top_m"],
    weights: Float[Array, "num_tokens top_m 1"],
    factors: Float[Array, "num_tokens dim"],
    options: Options,
) -> Float[Array, "num_values dim"]:
    """Adds weight x factor to the row of each selection; in the dtype of the table."""
    dtype = accumulation_dtype(table, weights, factors)

    def accumulate(table_grad: Array, chunk: Any) -> tuple[Array, None]:
        indices, weights, factors = chunk
        rows_grad = weights.astype(dtype) * factors.astype(dtype)[:, None, :]
        return _scatter_add_rows(table_grad, indices, rows_grad), None

    zeros = jnp.zeros_like(table, dtype)
    grads = scan_chunks(accumulate, zeros, (indices, weights, factors), options.chunk_size)
    return grads[0].astype(table.dtype)


def _token_gradients(
    values: Array, pre_values: Array | None, chunk: Any, options: Options, dtype: jnp.dtype
) -> tuple[Array, Array | None, Array, Array | None]:
    """Gradients of scores, pre-inputs, and what those of the two tables are made of.

    The latter are outer products, of weights [t, k, c] with the output's gradient, and of the
    pre-scores' gradients [t, k, 1] with the pre-inputs.
    """
    indices, scores, pre_inputs, slots, output_grad = chunk
    activation, num_slots, _ = options
    num_cores = scores.shape[-1]
    scores = scores.astype(dtype)
    output_grad = _split_slots_and_cores(output_grad, num_slots, num_cores)
    rows = _split_cores(_fetch_rows(values, indices, dtype), num_cores)
    weights_grad = _from_slots(_einsum("tkcd,tscd->tksc", rows, output_grad), slots)
    if pre_values is None:
        return weights_grad, None, scores, None

    pre_rows = _fetch_rows(pre_values, indices, dtype)
    pre_scores = _einsum("tkp,tp->tk", pre_rows, pre_inputs.astype(dtype))
    gates, activation_vjp = jax.vjp(lambda x: activate(x, activation), pre_scores)
    (pre_scores_grad,) = activation_vjp(jnp.sum(weights_grad * scores, axis=-1))
    pre_inputs_grad = _einsum("tk,tkp->tp", pre_scores_grad, pre_rows)
    gates = gates[:, :, None]
    return weights_grad * gates, pre_inputs_grad, scores * gates, pre_scores_grad[:, :, None]


def _fetch_rows(table: Array, indices: Array, dtype: jnp.dtype) -> Array:
    # promise_in_bounds spares a masked copy of the rows ("fill") or a clamp of the ids ("clip").
    rows = table.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.astype(dtype)


def _scatter_add_rows(table: Array, indices: Array, rows: Array) -> Array:
    return table.at[indices].add(rows, mode="promise_in_bounds", wrap_negative_indices=False)


def _split_cores(rows: Array, num_cores: int) -> Array:
    return rows.reshape(*rows.shape[:-1], num_cores, rows.shape[-1] // num_cores)


def _split_slots_and_cores(output_grad: Array, num_slots: int, num_cores: int) -> Array:
    """[t, slots * d] to [t, slot, c, d / c]."""
    num_tokens, width = output_grad.shape
    return _split_cores(output_grad.reshape(num_tokens, num_slots, width // num_slots), num_cores)


def _to_slots(weights: Array, slots: Array | None, num_slots: int) -> Array:
    """[t, k, c] to [t, k, slot, c]: each weight in its own slot, zero in the others."""
    if slots is None:
        return weights[:, :, None, :]
    return weights[:, :, None, :] * jax.nn.one_hot(slots, num_slots, dtype=weights.dtype)[..., None]


def _from_slots(slot_weights: Array, slots: Array | None) -> Array:
    """[t, k, slot, c] to [t, k, c]: the entry of each weight's own slot, transpose of _to_slots."""
    if slots is None:
        return slot_weights[:, :, 0, :]
    return jnp.take_along_axis(
        slot_weights, slots[:, :, None, None], axis=2, mode="promise_in_bounds"
    )[:, :, 0, :]
