"""Value aggregation on Hopper and newer GPUs, where rows travel to shared memory and no further.

A block of one warpgroup computes one token, or a share of its selections: bulk copies bring the
selected rows into a ring of buffers in shared memory, and rows that have arrived are weighted and
summed in registers while later ones are on their way. See `tokens_gpu.py` for the pipeline,
`fetch_gpu.py` for rows and registers.

    tables      Read row by row where they lie: no copy, no padding in device memory. A bulk copy
                moves whole 16 bytes, so a row must be a multiple of that: 8 bfloat16, 4 float32.
                A row's sums stay in registers: beyond 4,000 elements some are spilled.
    precision   Everything is float32 on the ordinary units; the matrix units are not used. Scores
                and pre-inputs in another dtype are converted outside of the kernel first.
    order       The sum over k is fixed by K, and for few tokens by their number, on which it
                depends into how many shares the selections of a token are split.

The backward kernel fetches the rows again and computes the gradients of scores and pre-inputs; the
tables' gradients are summed from its weights by `table_gradient_gpu.py`. Both are deterministic.

Compiled for the H200 down to machine code and interpreted, but never run on a GPU: the block sizes
are reasoned, from the report of the compiler and the latency and bandwidth of the memory.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, tuned
from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.value_aggregation import fetch_gpu as fetch
from kernels_pallas.value_aggregation.activation import activation_and_slope
from kernels_pallas.value_aggregation.fetch_gpu import QUAD, columns_of
from kernels_pallas.value_aggregation.options import Options
from kernels_pallas.value_aggregation.reference import accumulation_dtype
from kernels_pallas.value_aggregation.shapes import sizes
from kernels_pallas.value_aggregation.table_gradient import (
    RowGradients,
    sort_selections,
    unique_ids,
)
from kernels_pallas.value_aggregation.table_gradient_gpu import (
    TableBlocks,
    sum_by_row,
    table_heuristic,
)
from kernels_pallas.value_aggregation.tokens_gpu import Blocks, Call, Quad, by_core, row_bytes

_COPY_BYTES = 16  # a bulk copy moves a multiple of them
_SHARED_BYTES = 227 * 2**10  # that a block may have
_OTHER_SHARED_BYTES = 8 * 2**10  # barriers, scratch of reductions, alignment
_COMPUTE_CAPABILITY = 9  # Hopper


@dataclasses.dataclass(frozen=True)
class BackwardBlocks(Blocks, TableBlocks):
    """The same of the kernel for the gradients of tokens, and those of the tables' kernel."""


def heuristic(num_tokens: int, top_m: int, selection_bytes: int) -> Blocks:
    """Blocks for tokens that each fetch `top_m` rows of all tables, `selection_bytes` together.

    At 4.8 TB/s and a latency of about 1 microsecond, each of 132 multiprocessors has to have some
    36 KB of rows on their way. A block has a ring of about 36 KB, so that five or more share a
    multiprocessor (228 KB), and while one waits, starts or ends, the others fetch. A step should
    be long enough to pay for its barriers, yet few rows wait for a step to be complete. A batch
    of few tokens is split until there are four blocks for each multiprocessor.
    """
    rows = 2 * QUAD if 2 * QUAD * selection_bytes <= 12 * 2**10 and top_m >= 2 * QUAD else QUAD
    steps = pl.cdiv(max(top_m, rows), rows)
    stages = max(2, min(8, steps, 36 * 2**10 // (rows * selection_bytes)))
    splits = max(1, min(steps, 4 * 132 // num_tokens))
    return Blocks(rows, stages, splits)


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
    """Why this implementation cannot take arguments of these shapes and dtypes, or None."""
    tables = {"values": values} | ({} if pre_values is None else {"pre_values": pre_values})
    reasons = [(platform != "gpu", f"it compiles for GPU, not for {platform}")]
    capability = dispatch.compute_capability()
    reasons.append(
        (
            capability is not None and _major(capability) < _COMPUTE_CAPABILITY,
            f"it needs compute capability 9.0 (Hopper) or more, the device has {capability}",
        )
    )
    reasons.append(
        (slots is not None, f"slots are not implemented (num_slots = {options.num_slots})")
    )
    is_float32 = accumulation_dtype(values, scores, pre_values, pre_inputs) == jnp.float32
    reasons.append((not is_float32, "it accumulates in float32, not in float64"))
    for name, table in tables.items():
        known = table.dtype in (jnp.float32, jnp.bfloat16)
        reasons.append((not known, f"rows must be float32 or bfloat16, {name} are {table.dtype}"))
        size = row_bytes(table)
        rule = f"rows must be multiples of {_COPY_BYTES} bytes, those of {name} have {size}"
        reasons.append((size % _COPY_BYTES != 0, rule))
        reasons.append((0 in table.shape, f"{name} is empty, {table.shape}"))
    reasons.append((0 in indices.shape, f"indices is empty, {indices.shape}"))
    needed = _shared_bytes(list(tables.values()))
    reasons.append(
        (
            needed > _SHARED_BYTES,
            f"rows of {[table.shape[1] for table in tables.values()]} elements need {needed} bytes"
            f" of shared memory, there are {_SHARED_BYTES}",
        )
    )
    return next((reason for holds, reason in reasons if holds), None)


def forward(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: None,
    options: Options,
) -> Float[Array, "num_tokens value_dim"]:
    """Computes the output of `value_aggregation` without slots."""
    del slots
    num_tokens, top_m = indices.shape
    blocks = heuristic(num_tokens, top_m, row_bytes(values, pre_values))
    key = tuned.Key.of(
        "value_aggregation",
        "pallas_gpu",
        "forward",
        sizes(values, scores, pre_values, options.num_slots),
        values.dtype,
    )
    blocks = tuned.lookup(blocks, key, platform="gpu") or blocks
    call = Call(values, indices, scores, pre_values, pre_inputs, blocks)

    def compute(quad: Quad, sums: list[Array]) -> list[Array]:
        weights = quad.scores
        if pre_values is not None:
            gates, _ = activation_and_slope(
                quad.dot("pre_values", "pre_inputs"), options.activation
            )
            weights = [weight * gates for weight in weights]
        return [
            total
            + quad.valid(by_core(weights, columns, call.core_dim) * quad.tile("values", columns))
            for total, columns in zip(sums, columns_of(call.value_dim), strict=True)
        ]

    output, _ = call.run("value_aggregation_forward", compute, {}, call.value_dim, {})
    assert output is not None
    return output


def backward(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: None,
    output_grad: Float[Array, "num_tokens value_dim"],
    options: Options,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Computes the gradients of (values, scores, pre_values, pre_inputs), each in its own dtype."""
    del slots
    num_values = values.shape[0]
    grads, blocks = _token_grads(
        values, indices, scores, pre_values, pre_inputs, output_grad, options
    )
    selections = sort_selections(indices)
    rows, order = selections.ids, selections.order
    values_grad = sum_by_row(
        rows, order, grads.weights, output_grad, num_values, values.dtype, blocks
    )
    scores_grad = grads.scores.astype(scores.dtype)
    if pre_values is None or pre_inputs is None:
        return values_grad, scores_grad, None, None
    assert grads.pre_scores is not None and grads.pre_inputs is not None
    pre_values_grad = sum_by_row(
        rows, order, grads.pre_scores, pre_inputs, num_values, pre_values.dtype, blocks
    )
    return values_grad, scores_grad, pre_values_grad, grads.pre_inputs.astype(pre_inputs.dtype)


def row_gradients(
    values: Float[Array, "num_values value_dim"],
    indices: Int32[Array, "num_tokens top_m"],
    scores: Float[Array, "num_tokens top_m num_cores"],
    pre_values: Float[Array, "num_values pre_value_dim"] | None,
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None,
    slots: None,
    output_grad: Float[Array, "num_tokens value_dim"],
    max_rows: int,
    options: Options,
) -> RowGradients:
    """Computes the gradients of `value_aggregation`, those of the tables row by row."""
    del slots
    grads, blocks = _token_grads(
        values, indices, scores, pre_values, pre_inputs, output_grad, options
    )
    selections = sort_selections(indices)
    ids, num_rows = unique_ids(selections.ids, values.shape[0], max_rows)
    rows, order = selections.rows, selections.order
    values_grad = sum_by_row(rows, order, grads.weights, output_grad, max_rows, jnp.float32, blocks)
    pre_values_grad = None
    if pre_inputs is not None:
        assert grads.pre_scores is not None
        pre_values_grad = sum_by_row(
            rows, order, grads.pre_scores, pre_inputs, max_rows, jnp.float32, blocks
        )
    return RowGradients(ids, num_rows, values_grad, pre_values_grad, grads.scores, grads.pre_inputs)


def row_products(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens top_m"],
    inputs: Float[Array, "num_tokens dim"],
    options: Options,
) -> Float[Array, "num_tokens top_m"]:
    """Computes the output of `row_products`: without pre-values, no score enters its gradient."""
    scores = jnp.zeros_like(indices, jnp.float32)[:, :, None]
    grads, _ = _token_grads(table, indices, scores, None, None, inputs, options)
    return grads.scores[:, :, 0]


def table_gradient(
    table: Float[Array, "num_values dim"],
    indices: Int32[Array, "num_tokens top_m"],
    weights: Float[Array, "num_tokens top_m 1"],
    factors: Float[Array, "num_tokens dim"],
    options: Options,
) -> Float[Array, "num_values dim"]:
    """Adds weight x factor to the row of each selection; in the dtype of the table."""
    blocks = _backward_blocks(table, indices, weights, None, options)
    ids, order, _ = sort_selections(indices)
    return sum_by_row(ids, order, weights, factors, table.shape[0], table.dtype, blocks)


class _TokenGrads(NamedTuple):
    """What the rows are needed for: gradients of scores and pre-inputs, and factors of the tables'.

    The latter are outer products, of `weights` [T, K, c] with the output's gradient, and of
    `pre_scores`, the gradients of the pre-scores [T, K, 1], with the pre-inputs.
    """

    scores: Float[Array, "num_tokens top_m num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None
    weights: Float[Array, "num_tokens top_m num_cores"]
    pre_scores: Float[Array, "num_tokens top_m 1"] | None


def _token_grads(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None,
    pre_inputs: Array | None,
    output_grad: Array,
    options: Options,
) -> tuple[_TokenGrads, BackwardBlocks]:
    """The gradients of a token's own arguments, and the blocks of the whole backward pass."""
    blocks = _backward_blocks(values, indices, scores, pre_values, options)
    call = Call(values, indices, scores, pre_values, pre_inputs, blocks)
    cores = range(call.num_cores)

    def compute(quad: Quad, sums: list[Array]) -> list[Array]:
        weights_grad = [
            quad.dot("values", "output_grad", core * call.core_dim, (core + 1) * call.core_dim)
            for core in cores
        ]
        if pre_values is None:
            for core in cores:
                quad.put("scores_grad", weights_grad[core], core)
            return sums
        pre_scores = quad.dot("pre_values", "pre_inputs")
        gates, slopes = activation_and_slope(pre_scores, options.activation)
        gates_grad = jnp.zeros_like(gates)
        for core in cores:
            score = quad.scores[core]
            gates_grad += weights_grad[core] * score
            quad.put("scores_grad", weights_grad[core] * gates, core)
            quad.put("weights", score * gates, core)
        pre_scores_grad = gates_grad * slopes
        quad.put("pre_scores_grad", pre_scores_grad)
        return [
            total
            + quad.valid(fetch.across_columns(pre_scores_grad) * quad.tile("pre_values", columns))
            for total, columns in zip(sums, columns_of(call.pre_value_dim), strict=True)
        ]

    outputs = {"scores_grad": call.selections(call.num_cores)}
    if pre_values is not None:
        outputs["weights"] = call.selections(call.num_cores)
        outputs["pre_scores_grad"] = call.selections()
    inputs = {"output_grad": output_grad.astype(jnp.float32)}
    pre_inputs_grad, grads = call.run(
        "value_aggregation_backward", compute, inputs, call.pre_value_dim, outputs
    )
    if pre_values is None:
        weights = scores.astype(jnp.float32)
        return _TokenGrads(grads["scores_grad"], None, weights, None), blocks
    pre_scores_grad = grads["pre_scores_grad"][:, :, None]
    return (
        _TokenGrads(grads["scores_grad"], pre_inputs_grad, grads["weights"], pre_scores_grad),
        blocks,
    )


def _backward_blocks(
    values: Array, indices: Array, scores: Array, pre_values: Array | None, options: Options
) -> BackwardBlocks:
    """Measured blocks, where there are some for these very sizes, else those of the heuristics."""
    num_tokens, top_m = indices.shape
    token_blocks = heuristic(num_tokens, top_m, row_bytes(values, pre_values))
    widths = [table.shape[1] for table in (values, pre_values) if table is not None]
    table_blocks = table_heuristic(indices.size, 4 * max(widths))
    blocks = BackwardBlocks(**vars(token_blocks), **vars(table_blocks))
    key = tuned.Key.of(
        "value_aggregation",
        "pallas_gpu",
        "backward",
        sizes(values, scores, pre_values, options.num_slots),
        values.dtype,
    )
    return tuned.lookup(blocks, key, platform="gpu") or blocks


def _shared_bytes(tables: list[Any]) -> int:
    """The least shared memory that the kernels need: two stages of four rows, and single rows."""
    widths = [fetch.padded(table.shape[1]) for table in tables]
    rings = [2 * QUAD * table.dtype.itemsize for table in tables]
    tokens = sum((ring + 2 * 4) * width for ring, width in zip(rings, widths, strict=True))
    sums = (2 * QUAD * 4 + 4) * (max(widths) + fetch.COLUMNS)
    return max(tokens, sums) + _OTHER_SHARED_BYTES


def _major(capability: str) -> int:
    """9 of "9.0"; 0 of what is no NVIDIA GPU."""
    major = capability.split(".", maxsplit=1)[0]
    return int(major) if major.isdigit() else 0
