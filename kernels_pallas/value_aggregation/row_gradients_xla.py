"""Row-sparse gradients of value aggregation in plain XLA operations: runs on every platform.

First the gradients that a token has alone, from rows that are fetched in chunks of tokens as in
`xla.py`; then the rows of the tables' gradients, from selections sorted by id. The order of a sum
is fixed on CPU and TPU, and up to the device's atomics on GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.common import scan_chunks
from kernels_pallas.value_aggregation import xla
from kernels_pallas.value_aggregation.options import Options
from kernels_pallas.value_aggregation.reference import accumulation_dtype
from kernels_pallas.value_aggregation.table_gradient import (
    RowGradients,
    sort_selections,
    sum_by_row,
    unique_ids,
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
    """Computes the gradients of `value_aggregation`, those of the tables row by row."""
    top_m = indices.shape[1]
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)
    scores_grad, pre_inputs_grad, weights, pre_scores_grad = _token_gradients(
        values, indices, scores, pre_values, pre_inputs, slots, output_grad, options
    )
    selections = sort_selections(indices)
    ids, num_rows = unique_ids(selections.ids, values.shape[0], max_rows)
    chunk_size = options.chunk_size * top_m
    rows, order = selections.rows, selections.order
    output_grad = output_grad.astype(dtype).reshape(-1, values.shape[1])
    values_grad = sum_by_row(rows, order, weights, output_grad, slots, max_rows, chunk_size)
    if pre_inputs is None or pre_scores_grad is None:
        return RowGradients(ids, num_rows, values_grad, None, scores_grad, None)
    pre_values_grad = sum_by_row(
        rows, order, pre_scores_grad, pre_inputs.astype(dtype), None, max_rows, chunk_size
    )
    return RowGradients(ids, num_rows, values_grad, pre_values_grad, scores_grad, pre_inputs_grad)


def _token_gradients(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None,
    pre_inputs: Array | None,
    slots: Array | None,
    output_grad: Array,
    options: Options,
) -> tuple[Array, Array | None, Array, Array | None]:
    """Gradients of scores, pre-inputs, and what those of the two tables are made of.

    The latter are outer products, of weights [T, K, c] with the output's gradient, and of the
    pre-scores' gradients [T, K, 1] with the pre-inputs.
    """
    activation, num_slots, chunk_size = options
    dtype = accumulation_dtype(values, scores, pre_values, pre_inputs)
    num_cores = scores.shape[-1]

    def compute(_: None, chunk: Any) -> tuple[None, Any]:
        indices, scores, pre_inputs, slots, output_grad = chunk
        scores = scores.astype(dtype)
        output_grad = output_grad.reshape(-1, num_slots, values.shape[1])
        output_grad = xla._split_cores(output_grad, num_cores)
        rows = xla._split_cores(xla._fetch_rows(values, indices, dtype), num_cores)
        weights_grad = xla._from_slots(xla._einsum("tkcd,tscd->tksc", rows, output_grad), slots)
        if pre_values is None:
            return None, (weights_grad, None, scores, None)

        pre_rows = xla._fetch_rows(pre_values, indices, dtype)
        pre_scores = xla._einsum("tkp,tp->tk", pre_rows, pre_inputs.astype(dtype))
        gates, activation_vjp = jax.vjp(lambda x: xla._activate(x, activation), pre_scores)
        (pre_scores_grad,) = activation_vjp(jnp.sum(weights_grad * scores, axis=-1))
        pre_inputs_grad = xla._einsum("tk,tkp->tp", pre_scores_grad, pre_rows)
        gates = gates[:, :, None]
        scores_grad, weights = weights_grad * gates, scores * gates
        return None, (scores_grad, pre_inputs_grad, weights, pre_scores_grad[:, :, None])

    per_token = (indices, scores, pre_inputs, slots, output_grad.astype(dtype))
    return scan_chunks(compute, None, per_token, chunk_size)[1]
