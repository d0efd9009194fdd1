"""Value aggregation on Hopper and newer GPUs; fetched rows are never written to device memory.

A thread block of one warpgroup computes one token, or a split of its selections. Bulk copies bring
the selected rows into a ring of buffers in shared memory; rows that have arrived are weighted and
summed in registers while later copies are in flight. See `tokens.py` for the pipeline, and
`table_gradient/gpu/fetch.py` for the ring and the register layouts.

    tables      Rows are read in place: no copy and no padding in device memory. A bulk copy moves
                multiples of 16 bytes, so the size of a row must be one: 8 bfloat16, 4 float32.
                The sums of a row stay in registers; beyond 4,000 elements some are spilled.
    precision   All arithmetic is float32 on the CUDA cores; the tensor cores are not used. Scores
                and pre-inputs of another dtype are converted before the kernel.
    order       The order of the sum over k depends on K only, and, for small batches, on the number
                of tokens, because it determines how many splits a token has.

The backward kernel fetches the rows again and computes the gradients of scores and pre-inputs;
`table_gradient/gpu` sums the tables' gradients from its weights. Both are deterministic.

The kernels have been compiled to H200 machine code and interpreted, but never run on a GPU. Block
sizes are estimates, based on the compiler's report and on memory latency and bandwidth.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float
from kernels_pallas.table_gradient.call import Term
from kernels_pallas.table_gradient.gpu import backend as table_gradient_gpu
from kernels_pallas.table_gradient.gpu import fetch
from kernels_pallas.table_gradient.gpu.fetch import QUAD, columns_of
from kernels_pallas.value_aggregation.activation import activation_and_slope
from kernels_pallas.value_aggregation.call import AggregationCall, RowGradients, TokenGradients
from kernels_pallas.value_aggregation.gpu.tokens import Blocks, Kernel, Quad, by_core, row_bytes


def heuristic(num_tokens: int, num_selected: int, selection_bytes: int) -> Blocks:
    """Blocks for tokens that each fetch `num_selected` rows, `selection_bytes` each.

    At 4.8 TB/s and a latency of about 1 microsecond, each of 132 SMs needs about 36 KB of rows in
    flight. A thread block has a ring of about 36 KB, so that five or more of them fit on an SM
    (228 KB): while one waits, starts or ends, the others fetch. A step should be long enough to
    amortize its barriers, but not so long that rows wait for the step to complete. Tokens of small
    batches are split until there are four thread blocks per SM.
    """
    rows = (
        2 * QUAD if 2 * QUAD * selection_bytes <= 12 * 2**10 and num_selected >= 2 * QUAD else QUAD
    )
    steps = pl.cdiv(max(num_selected, rows), rows)
    stages = max(2, min(8, steps, 36 * 2**10 // (rows * selection_bytes)))
    splits = max(1, min(steps, 4 * 132 // num_tokens))
    return Blocks(rows, stages, splits)


def unsupported_reason(call: AggregationCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    reasons = fetch.device_reasons(platform)
    reasons.append(
        (call.slots is not None, f"slots are not implemented (num_slots = {call.num_slots})")
    )
    reasons.append((call.dtype != jnp.float32, "it accumulates in float32, not in float64"))
    for name, table in call.tables.items():
        known = table.dtype in (jnp.float32, jnp.bfloat16)
        reasons.append((not known, f"rows must be float32 or bfloat16, {name} are {table.dtype}"))
        size = row_bytes(table)
        rule = f"rows must be multiples of {fetch.COPY_BYTES} bytes, those of {name} have {size}"
        reasons.append((size % fetch.COPY_BYTES != 0, rule))
        reasons.append((0 in table.shape, f"{name} is empty, {table.shape}"))
    reasons.append((0 in call.indices.shape, f"indices is empty, {call.indices.shape}"))
    widths = [table.shape[1] for table in call.tables.values()]
    needed = max(_shared_bytes(call), table_gradient_gpu.shared_bytes(max(widths)))
    reasons.append(
        (
            needed > fetch.SHARED_BYTES,
            f"rows of {widths} elements need {needed} bytes of shared memory, "
            f"only {fetch.SHARED_BYTES} are available",
        )
    )
    return next((reason for holds, reason in reasons if holds), None)


def forward(call: AggregationCall) -> Float[Array, "num_tokens value_dim"]:
    """Computes the output of `value_aggregation` without slots."""
    kernel = Kernel("forward", call, _choose_blocks("forward", call))

    def compute(quad: Quad, sums: list[Array]) -> list[Array]:
        weights = quad.scores
        if call.pre_values is not None:
            gates, _ = activation_and_slope(quad.dot("pre_values", "pre_inputs"), call.activation)
            weights = [weight * gates for weight in weights]
        return [
            total
            + quad.valid(by_core(weights, columns, kernel.core_dim) * quad.tile("values", columns))
            for total, columns in zip(sums, columns_of(kernel.value_dim), strict=True)
        ]

    output, _ = kernel.run("value_aggregation_forward", compute, {}, kernel.value_dim, {})
    assert output is not None
    return output


def backward(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"]
) -> dict[str, Array]:
    """Computes the gradients of the tables, scores and pre-inputs, each in its own dtype."""
    return token_gradients(call, output_grad).backward(call, table_gradient_gpu)


def row_gradients(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"], max_rows: int
) -> RowGradients:
    """Computes the same gradients in float32, with row-sparse gradients of the tables."""
    return token_gradients(call, output_grad).row_gradients(call, max_rows, table_gradient_gpu)


def token_gradients(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"]
) -> TokenGradients:
    """Computes the gradients of scores and pre-inputs, and the terms of the table gradients."""
    pre_inputs = call.pre_inputs
    kernel = Kernel("backward", call, _choose_blocks("backward", call))
    cores = range(kernel.num_cores)

    def compute(quad: Quad, sums: list[Array]) -> list[Array]:
        weights_grad = [
            quad.dot("values", "output_grad", core * kernel.core_dim, (core + 1) * kernel.core_dim)
            for core in cores
        ]
        if pre_inputs is None:
            for core in cores:
                quad.put("scores_grad", weights_grad[core], core)
            return sums
        pre_scores = quad.dot("pre_values", "pre_inputs")
        gates, slopes = activation_and_slope(pre_scores, call.activation)
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
            for total, columns in zip(sums, columns_of(kernel.pre_value_dim), strict=True)
        ]

    outputs = {"scores_grad": kernel.selections(kernel.num_cores)}
    if pre_inputs is not None:
        outputs["weights"] = kernel.selections(kernel.num_cores)
        outputs["pre_scores_grad"] = kernel.selections()
    inputs = {"output_grad": output_grad.astype(jnp.float32)}
    pre_inputs_grad, grads = kernel.run(
        "value_aggregation_backward", compute, inputs, kernel.pre_value_dim, outputs
    )
    if pre_inputs is None:
        weights = Term(call.scores.astype(jnp.float32), output_grad)
        return TokenGradients(grads["scores_grad"], None, [weights])
    terms = [
        Term(grads["weights"], output_grad),
        Term(grads["pre_scores_grad"][:, :, None], pre_inputs),
    ]
    return TokenGradients(grads["scores_grad"], pre_inputs_grad, terms)


def _choose_blocks(pass_name: tuned.Pass, call: AggregationCall) -> Blocks:
    """The tuned blocks for exactly these sizes if there are any, else those of `heuristic`."""
    num_tokens, num_selected = call.indices.shape
    blocks = heuristic(num_tokens, num_selected, row_bytes(*call.tables.values()))
    dtype = call.values.dtype
    key = tuned.Key.of("value_aggregation", "pallas_gpu", pass_name, call.sizes, dtype)
    return tuned.lookup(blocks, key, platform="gpu") or blocks


def _shared_bytes(call: AggregationCall) -> int:
    """The minimum shared memory of a token: two stages of four rows, and its own rows."""
    tokens = sum(
        (2 * QUAD * table.dtype.itemsize + 2 * 4) * fetch.padded(table.shape[1])
        for table in call.tables.values()
    )
    return tokens + fetch.OTHER_SHARED_BYTES
