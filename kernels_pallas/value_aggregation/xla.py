"""Value aggregation in plain XLA operations, for every platform.

Tokens are processed in chunks, so that only [chunk, K, D] gathered rows are live at a time, not
[T, K, D]. The backward pass gathers the rows again instead of saving them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.array_types import Array, Float
from kernels_pallas.common import scan_chunks
from kernels_pallas.table_gradient.selections import sort_selections, unique_ids
from kernels_pallas.table_gradient.xla import scatter_add_rows, sum_by_row
from kernels_pallas.tables import fetch_rows
from kernels_pallas.value_aggregation.activation import activate
from kernels_pallas.value_aggregation.call import AggregationCall, RowGradients

# DEFAULT precision would round float32 operands to bfloat16 on TPU and to TF32 on GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def unsupported_reason(call: AggregationCall, platform: str) -> str | None:
    """Returns None: this implementation supports every call."""
    del call, platform
    return None


def forward(call: AggregationCall) -> Float[Array, "num_tokens output_dim"]:
    """Computes the output of `value_aggregation`, `chunk_size` tokens at a time."""
    values, pre_values, dtype, num_slots = call.values, call.pre_values, call.dtype, call.num_slots
    num_cores = call.scores.shape[-1]

    def aggregate(_: None, chunk: Any) -> tuple[None, Array]:
        indices, scores, pre_inputs, slots = chunk
        weights = scores.astype(dtype)
        if pre_values is not None:
            pre_rows = fetch_rows(pre_values, indices, dtype)
            pre_scores = _einsum("tkp,tp->tk", pre_rows, pre_inputs.astype(dtype))
            weights *= activate(pre_scores, call.activation)[:, :, None]
        rows = _split_cores(fetch_rows(values, indices, dtype), num_cores)
        return None, _einsum("tksc,tkcd->tscd", _to_slots(weights, slots, num_slots), rows)

    per_token = (call.indices, call.scores, call.pre_inputs, call.slots)
    _, output = scan_chunks(aggregate, None, per_token, call.chunk_size)
    return output.reshape(call.indices.shape[0], num_slots * values.shape[1])


def backward(
    call: AggregationCall,
    output_grad: Float[Array, "num_tokens output_dim"],
) -> dict[str, Array]:
    """Computes the gradients of the tables, scores and pre-inputs, each in its own dtype.

    Table gradients are dense: they are zero-initialized once, and every chunk scatter-adds its rows
    in place, in the accumulation dtype.
    """
    dtype, num_slots, num_cores = call.dtype, call.num_slots, call.scores.shape[-1]

    def accumulate(table_grads: Any, chunk: Any) -> tuple[Any, Any]:
        values_grad, *pre_values_grads = table_grads
        indices, trained_indices, _, pre_inputs, slots, output_grad = chunk
        token_grads = _token_gradients(call, (indices, *chunk[2:]))
        scores_grad, pre_inputs_grad, weights, pre_scores_grad = token_grads
        if pre_scores_grad is not None:
            pre_rows_grad = pre_scores_grad * pre_inputs.astype(dtype)[:, None, :]
            pre_values_grads = [
                scatter_add_rows(grad, trained_indices, pre_rows_grad) for grad in pre_values_grads
            ]
        output_grad = _split_slots_and_cores(output_grad, num_slots, num_cores)
        rows_grad = _einsum("tksc,tscd->tkcd", _to_slots(weights, slots, num_slots), output_grad)
        rows_grad = rows_grad.reshape(*indices.shape, call.values.shape[1])
        values_grad = scatter_add_rows(values_grad, trained_indices, rows_grad)
        return [values_grad, *pre_values_grads], (scores_grad, pre_inputs_grad)

    # Unlike zeros, zeros_like keeps the manual axes over which a table varies inside shard_map.
    with jax.named_scope("table_gradient"):
        zeros = [jnp.zeros_like(table, dtype) for table in call.trained.values()]
    indices = (call.indices, call.trained_indices)
    per_token = (*indices, call.scores, call.pre_inputs, call.slots, output_grad)
    table_grads, token_grads = scan_chunks(accumulate, zeros, per_token, call.chunk_size)
    names = (*call.trained, "scores", "pre_inputs")
    grads = dict(zip(names, (*table_grads, *token_grads), strict=True))
    arrays = call.arrays
    return {name: grads[name].astype(arrays[name].dtype) for name in names if name in arrays}


def row_gradients(
    call: AggregationCall,
    output_grad: Float[Array, "num_tokens output_dim"],
    max_rows: int,
) -> RowGradients:
    """Computes the gradients of `value_aggregation`, with row-sparse gradients of the tables.

    First come the per-token gradients, from rows that are gathered in chunks of tokens, then the
    rows of the tables' gradients, from selections sorted by id. The order of summation is fixed on
    CPU and TPU; on GPU it depends on atomics.
    """
    values, pre_inputs = call.values, call.pre_inputs

    def compute(_: None, chunk: Any) -> tuple[None, Any]:
        return None, _token_gradients(call, chunk)

    output_grad = output_grad.astype(call.dtype)
    per_token = (call.indices, call.scores, pre_inputs, call.slots, output_grad)
    token_grads = scan_chunks(compute, None, per_token, call.chunk_size)[1]
    scores_grad, pre_inputs_grad, weights, pre_scores_grad = token_grads

    selections = sort_selections(call.indices)
    ids, num_rows = unique_ids(selections.ids, values.shape[0], max_rows)
    chunk_size = call.chunk_size * call.indices.shape[1]
    rows, order = selections.rows, selections.order
    factors = output_grad.reshape(-1, values.shape[1])
    values_grad = sum_by_row(rows, order, weights, factors, call.slots, max_rows, chunk_size)
    if pre_inputs is None or pre_scores_grad is None:
        return RowGradients(ids, num_rows, values_grad, None, scores_grad, None)
    pre_inputs = pre_inputs.astype(call.dtype)
    pre_values_grad = sum_by_row(
        rows, order, pre_scores_grad, pre_inputs, None, max_rows, chunk_size
    )
    return RowGradients(ids, num_rows, values_grad, pre_values_grad, scores_grad, pre_inputs_grad)


def _token_gradients(
    call: AggregationCall, chunk: Any
) -> tuple[Array, Array | None, Array, Array | None]:
    """Gradients of scores and pre-inputs, and the terms of the gradients of the two tables.

    Returns (scores_grad, pre_inputs_grad, weights, pre_scores_grad). The gradient of the values
    sums outer products of `weights` [t, k, c] with the output gradient; that of the pre-values,
    outer products of `pre_scores_grad` [t, k, 1] with the pre-inputs.
    """
    indices, scores, pre_inputs, slots, output_grad = chunk
    values, pre_values, dtype = call.values, call.pre_values, call.dtype
    num_cores = scores.shape[-1]
    scores = scores.astype(dtype)
    output_grad = _split_slots_and_cores(output_grad, call.num_slots, num_cores)
    rows = _split_cores(fetch_rows(values, indices, dtype), num_cores)
    weights_grad = _from_slots(_einsum("tkcd,tscd->tksc", rows, output_grad), slots)
    if pre_values is None:
        return weights_grad, None, scores, None

    pre_rows = fetch_rows(pre_values, indices, dtype)
    pre_scores = _einsum("tkp,tp->tk", pre_rows, pre_inputs.astype(dtype))
    gates, activation_vjp = jax.vjp(lambda x: activate(x, call.activation), pre_scores)
    (pre_scores_grad,) = activation_vjp(jnp.sum(weights_grad * scores, axis=-1))
    pre_inputs_grad = _einsum("tk,tkp->tp", pre_scores_grad, pre_rows)
    gates = gates[:, :, None]
    return weights_grad * gates, pre_inputs_grad, scores * gates, pre_scores_grad[:, :, None]


def _split_cores(rows: Array, num_cores: int) -> Array:
    return rows.reshape(*rows.shape[:-1], num_cores, rows.shape[-1] // num_cores)


def _split_slots_and_cores(output_grad: Array, num_slots: int, num_cores: int) -> Array:
    """[t, slots * d] to [t, slot, c, d / c]."""
    num_tokens, width = output_grad.shape
    return _split_cores(output_grad.reshape(num_tokens, num_slots, width // num_slots), num_cores)


def _to_slots(weights: Array, slots: Array | None, num_slots: int) -> Array:
    """[t, k, c] to [t, k, slot, c]: each weight in its slot, zero in the others."""
    if slots is None:
        return weights[:, :, None, :]
    return weights[:, :, None, :] * jax.nn.one_hot(slots, num_slots, dtype=weights.dtype)[..., None]


def _from_slots(slot_weights: Array, slots: Array | None) -> Array:
    """[t, k, slot, c] to [t, k, c]: the entry of each selection's slot; transpose of _to_slots."""
    if slots is None:
        return slot_weights[:, :, 0, :]
    return jnp.take_along_axis(
        slot_weights, slots[:, :, None, None], axis=2, mode="promise_in_bounds"
    )[:, :, 0, :]
