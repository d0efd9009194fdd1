"""Value aggregation on the SparseCores of a TPU, which leaves the TensorCore free for other work.

A SparseCore has 16 vector subcores, each with its own local memory. Each of the n subcores
processes every n-th token. It fetches the rows of a window of selections from HBM into a ring of
buffers, with one indirect stream per table, and weights and sums a window while the next ones are
in flight. Only per-token results are written back to HBM. XLA launches such a kernel
asynchronously, so independent work, such as the FFN, overlaps with it on the TensorCore.

    chips       v5p (4 SparseCores), v6e (2) and tpu7x (2 per device); v5e has none. The number of
                lanes and cores and the size of the local memory depend on the chip, so it must be
                known at trace time: attached devices, or a mesh in context (`jax.set_mesh`).
    layouts     Streams need contiguous rows: the kernels read tables without the usual 8 x 128
                tiling of a TPU, each row padded to 32 bytes. XLA copies a table in another layout,
                at every call. To avoid that, place it with
                `jax.device_put(table, Format(Layout((0, 1), tiling=((n,),)), sharding))`, n = 8 for
                float32 and 16 for bfloat16, and pass the same format in the `in_shardings` of the
                jitted function. If 8 divides D, a float32 array [N * D / 128, 128] in the default
                layout has the same bytes: reshaping it to [N, D] needs no copy either. Ids, scores
                as [T, c, K], other per-token inputs and the results use the same layout; XLA
                converts them if needed, which costs a few per cent of the bytes of the rows.
    bfloat16    Rows are fetched as bfloat16, half the bytes of float32, and split into two float32
                vectors by shifts. A pair of columns must not straddle two cores.
    padding     An indirect stream has the row length as its stride. Rows whose size is not a
                multiple of 32 bytes, for example 216 columns of bfloat16, are padded and copied one
                by one instead.
    narrow rows A core's slice of a row must fill a vector: 8 columns, 16 on tpu7x, twice as many
                in bfloat16.
    precision   All arithmetic is float32; erf does not lower and is replaced by a polynomial
                (`activation.py`).
    order       The order of the sum over k depends on K and the chip, not on the other tokens.
    cost        In the compiler's schedule of the forward kernel, a selection of 192 + 192 float32
                columns takes about 73 bundles of a v6e subcore and 43 on tpu7x, of which 48 and 24
                load rows; bfloat16 takes 70 and 42, because splitting costs as much as it saves.
                The kernel would be HBM-bound at a clock above 2.4 GHz (v6e, float32). Counted in
                the schedule, not measured.

The backward kernel also fetches the rows on the SparseCores and computes the gradients of scores
and pre-inputs. The TensorCore sums the gradients of the tables from its weights, as in
`pallas_tpu`.

The kernels have been compiled for these chips and interpreted, but not run on any. JAX's
interpreter has no indirect streams; the tests use copies of single rows instead. Neither way can
show whether streams address tables of more than 2^31 elements correctly.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float
from kernels_pallas.table_gradient.call import Term
from kernels_pallas.table_gradient.tpu import backend as table_gradient_tpu
from kernels_pallas.value_aggregation.activation import activation_and_slope
from kernels_pallas.value_aggregation.call import AggregationCall, RowGradients, TokenGradients
from kernels_pallas.value_aggregation.cost import cost_estimate
from kernels_pallas.value_aggregation.sparsecore import arithmetic, pipeline
from kernels_pallas.value_aggregation.sparsecore.arithmetic import Columns


def unsupported_reason(call: AggregationCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    kind = tuned.device_kind(platform)
    reasons = [
        (platform != "tpu", f"it compiles for TPU, not for {platform}"),
        (call.slots is not None, f"slots are not implemented (num_slots = {call.num_slots})"),
        (call.dtype != jnp.float32, "it accumulates in float32, not in float64"),
        (0 in call.indices.shape, f"indices is empty, {call.indices.shape}"),
        (
            kind is None,
            "the chip is unknown, which determines the numbers of SparseCores and lanes: compile "
            "with its devices attached or with their mesh in context (jax.set_mesh)",
        ),
    ]
    reason = next((reason for holds, reason in reasons if holds), None)
    if reason is not None:
        return reason
    chip = pipeline.target_chip()
    if chip is None:
        return f"{kind} has no SparseCores"
    return _reason_of_rows(call, chip)


def _reason_of_rows(call: AggregationCall, chip: pipeline.Chip) -> str | None:
    """Why the rows do not fit the vectors or the local memory of a chip, or None."""
    tables = {
        name: (table, call.scores.shape[2] if name == "values" else 1)
        for name, table in call.tables.items()
    }
    for name, (table, num_slices) in tables.items():
        if table.dtype not in (jnp.float32, jnp.bfloat16):
            return f"rows must be float32 or bfloat16, {name} are {table.dtype}"
        if 0 in table.shape:
            return f"{name} is empty, {table.shape}"
        width = table.shape[1] // num_slices
        chunk = arithmetic.columns_per_chunk(table.dtype, chip.lanes)
        if width < chunk:
            return f"a vector holds {chunk} columns, a slice of {name} for one core has {width}"
        if chunk > chip.lanes and width % 2:
            return f"bfloat16 columns come in pairs, a slice of {name} for one core has {width}"
    # The backward kernel holds more than the forward kernel.
    arrays = _Kernel(call, chip).backward_arrays()
    if pipeline.heuristic(arrays, chip) is None:
        return f"two windows of 8 rows do not fit a local memory of {chip.local_bytes} bytes"
    return None


def forward(call: AggregationCall) -> Float[Array, "num_tokens value_dim"]:
    """Computes the output of `value_aggregation` without slots."""
    chip = pipeline.target_chip()
    assert chip is not None
    kernel = _Kernel(call, chip)

    def compute(refs: dict[str, Any], count: Any, first_k: Any) -> None:
        weights = refs["scratch"]
        if call.pre_values is not None:
            kernel.multiply_pre_rows(refs, count)

        def weigh(k: Any) -> None:
            gate: Array | float = 1.0
            if call.pre_values is not None:
                gate, _ = activation_and_slope(kernel.pre_score(refs, k), call.activation)
            for core in range(kernel.num_cores):
                weights[core, k] = kernel.score(refs, core, first_k + k) * gate

        arithmetic.for_rows(count, weigh)
        for core in range(kernel.num_cores):
            columns, weight = kernel.slice_of(core), weights.at[core]
            arithmetic.add_weighted_rows(
                refs["values"], count, columns, weight, refs["output"], first_k == 0, chip.lanes
            )

    operands = kernel.operands(call)
    return kernel.run("forward", compute, kernel.forward_arrays(), operands)["output"]


def backward(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"]
) -> dict[str, Array]:
    """Computes the gradients of the tables, scores and pre-inputs, each in its own dtype."""
    return token_gradients(call, output_grad).backward(call, table_gradient_tpu)


def row_gradients(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"], max_rows: int
) -> RowGradients:
    """Computes the same gradients in float32, with row-sparse gradients of the tables."""
    return token_gradients(call, output_grad).row_gradients(call, max_rows, table_gradient_tpu)


def token_gradients(
    call: AggregationCall, output_grad: Float[Array, "num_tokens value_dim"]
) -> TokenGradients:
    """Computes the gradients of scores and pre-inputs, and the terms of the table gradients."""
    chip = pipeline.target_chip()
    assert chip is not None
    pre_values, pre_inputs = call.pre_values, call.pre_inputs
    kernel = _Kernel(call, chip)
    cores = range(kernel.num_cores)

    def compute(refs: dict[str, Any], count: Any, first_k: Any) -> None:
        products = refs["scratch"]
        for core in cores:
            columns, product = kernel.slice_of(core), products.at[core]
            arithmetic.multiply_rows(
                refs["values"], count, columns, refs["output_grad"], product, chip.lanes
            )
        if pre_values is not None:
            kernel.multiply_pre_rows(refs, count)

        # A scalar is stored as a vector of equal lanes, and the next store overwrites all but its
        # first lane, so this loop must run in order.
        @pl.loop(0, count)
        def _differentiate(k: Array) -> None:
            here = pl.ds(first_k + k, chip.lanes)
            weights_grad = [arithmetic.broadcast_sum(products[core, k]) for core in cores]
            if pre_values is None:
                for core in cores:
                    refs["scores_grad"][core, here] = weights_grad[core]
                return
            gate, slope = activation_and_slope(kernel.pre_score(refs, k), call.activation)
            gate_grad = jnp.zeros_like(gate)
            for core in cores:
                score = kernel.score(refs, core, first_k + k)
                gate_grad += weights_grad[core] * score
                refs["scores_grad"][core, here] = weights_grad[core] * gate
                refs["weights"][core, here] = score * gate
            refs["pre_scores_grad"][0, here] = gate_grad * slope
            products[kernel.num_cores, k] = gate_grad * slope

        if pre_values is not None:
            weight, total = products.at[kernel.num_cores], refs["pre_inputs_grad"]
            columns = Columns(0, kernel.pre_value_dim)
            arithmetic.add_weighted_rows(
                refs["pre_values"], count, columns, weight, total, first_k == 0, chip.lanes
            )

    operands = kernel.operands(call)
    operands["output_grad"] = output_grad.astype(jnp.float32)
    grads = kernel.run("backward", compute, kernel.backward_arrays(), operands)
    scores_grad = jnp.swapaxes(grads["scores_grad"], 1, 2)
    if pre_values is None or pre_inputs is None:
        return TokenGradients(scores_grad, None, [Term(call.scores, output_grad)])
    weights = Term(jnp.swapaxes(grads["weights"], 1, 2), output_grad)
    pre_weights = Term(jnp.swapaxes(grads["pre_scores_grad"], 1, 2), pre_inputs)
    return TokenGradients(scores_grad, grads["pre_inputs_grad"], [weights, pre_weights])


class _Kernel:
    """Sizes of a call, its arrays in the layouts of the kernels, and their common computations."""

    def __init__(self, call: AggregationCall, chip: pipeline.Chip) -> None:
        self.call = call
        values, pre_values = call.values, call.pre_values
        self.num_tokens, self.num_selected, self.num_cores = call.scores.shape
        self.value_dim = values.shape[1]
        self.pre_value_dim = 0 if pre_values is None else pre_values.shape[1]
        self.chip = chip
        # Inside shard_map, results vary as the arguments do.
        self.axis_type = jax.typeof(values).manual_axis_type
        self.tables = {"values": values}
        self.token_inputs = {"ids": call.indices, "scores": self.selections(self.num_cores)}
        if pre_values is not None:
            self.tables["pre_values"] = pre_values
            self.token_inputs["pre_inputs"] = self.token_rows(self.pre_value_dim)
        self.num_scratch = self.num_cores + (pre_values is not None)

    def token_rows(self, width: int) -> jax.ShapeDtypeStruct:
        """One row per token: [T, width]."""
        return self._per_token(width)

    def selections(self, count: int) -> jax.ShapeDtypeStruct:
        """`count` entries per selection: [T, count, K]."""
        return self._per_token(count, self.num_selected)

    def _per_token(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (self.num_tokens, *shape), jnp.float32, manual_axis_type=self.axis_type
        )

    def forward_arrays(self) -> pipeline.Arrays:
        outputs = {"output": self.token_rows(self.value_dim)}
        return pipeline.Arrays(self.tables, self.token_inputs, outputs, self.num_scratch)

    def backward_arrays(self) -> pipeline.Arrays:
        inputs = self.token_inputs | {"output_grad": self.token_rows(self.value_dim)}
        outputs = {"scores_grad": self.selections(self.num_cores)}
        if self.pre_value_dim:
            outputs["weights"] = self.selections(self.num_cores)
            outputs["pre_scores_grad"] = self.selections(1)
            outputs["pre_inputs_grad"] = self.token_rows(self.pre_value_dim)
        return pipeline.Arrays(self.tables, inputs, outputs, self.num_scratch)

    def operands(self, call: AggregationCall) -> dict[str, Array]:
        operands = {"values": call.values, "ids": call.indices}
        operands["scores"] = jnp.swapaxes(call.scores, 1, 2).astype(jnp.float32)
        if call.pre_values is not None and call.pre_inputs is not None:
            operands["pre_values"] = call.pre_values
            operands["pre_inputs"] = call.pre_inputs.astype(jnp.float32)
        return operands

    def run(
        self, pass_name: Any, compute: Any, arrays: pipeline.Arrays, operands: dict[str, Array]
    ) -> dict[str, Array]:
        blocks = pipeline.heuristic(arrays, self.chip)
        assert blocks is not None
        dtype = self.tables["values"].dtype
        key = tuned.Key.of(
            "value_aggregation", "pallas_sparsecore", pass_name, self.call.sizes, dtype
        )
        blocks = tuned.lookup(blocks, key, platform="tpu") or blocks
        cost = cost_estimate(pass_name, self.call, pipeline.bytes_accessed(arrays))
        name = f"value_aggregation_{pass_name}"
        return pipeline.run(name, compute, arrays, operands, blocks, self.chip, cost)

    def slice_of(self, core: int) -> Columns:
        width = self.value_dim // self.num_cores
        return Columns(core * width, width)

    def score(self, refs: dict[str, Any], core: int, k: Any) -> Array:
        return arithmetic.broadcast_entry(refs["scores"].at[core], k, self.chip.lanes)

    def multiply_pre_rows(self, refs: dict[str, Any], count: Any) -> None:
        """Writes the lane-wise partial sums of the pre-scores to the last scratch of the window."""
        columns, product = Columns(0, self.pre_value_dim), refs["scratch"].at[self.num_cores]
        arithmetic.multiply_rows(
            refs["pre_values"], count, columns, refs["pre_inputs"], product, self.chip.lanes
        )

    def pre_score(self, refs: dict[str, Any], k: Any) -> Array:
        return arithmetic.broadcast_sum(refs["scratch"][self.num_cores, k])
