"""Value aggregation on the TensorCores of a TPU; fetched rows are never written back to HBM.

Each selected row is copied by its own DMA into a ring of buffers, one buffer per token, while rows
that arrived earlier are weighted and summed. Grid step s starts the copies of token block s and
computes block s - 1, token by token. A buffer is refilled as soon as it has been consumed, so the
rows of all but one token of a block are in flight at any time.

    layouts     The kernels read tables row-major (lanes padded to 128 in HBM), and ids and scores
                with tokens along the lanes, [K, T] and [c, K, T], which needs no padding for any K.
                XLA inserts a copy for every array in another layout. By default, a table whose row
                width is not a multiple of 128, say [N, 192], is stored transposed, so every call
                would copy the table. To avoid that, place it with
                `jax.device_put(table, Format(Layout(major_to_minor=(0, 1)), sharding))`, and pass
                the same format in the `in_shardings` of the jitted function.
    bfloat16    Two rows share each 32-bit word of a tile, and a DMA cannot split a word. So XLA
                packs the halves of each row into words, [N, D / 2], once for both passes, unless
                the caller did (`tables.pack_rows`): 192 or 256 columns take half the bandwidth of
                float32. If rows have up to 128 columns, or so few are selected that packing costs
                more than it saves (`blocks.is_packed`), the kernel fetches the pair and picks one
                row, with the bandwidth of float32.
    precision   All arithmetic is float32 on the VPU; the MXU is not used.
    order       The order of the sum over k depends on K only, not on the other tokens.

The backward kernel fetches the rows again and computes the gradients of scores and pre-inputs. The
kernel of `table_gradient/tpu` sums the tables' gradients from its weights.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float
from kernels_pallas.common import tiled_bytes
from kernels_pallas.table_gradient.call import Term
from kernels_pallas.table_gradient.tpu import backend as table_gradient_tpu
from kernels_pallas.tables import pack_rows
from kernels_pallas.value_aggregation.activation import activation_and_slope
from kernels_pallas.value_aggregation.call import AggregationCall, RowGradients, TokenGradients
from kernels_pallas.value_aggregation.cost import cost_estimate
from kernels_pallas.value_aggregation.tpu.blocks import (
    SUBLANES,
    choose_blocks,
    heuristic,
    is_packed,
    rows_per_copy,
    vmem_bytes,
)

_LANES = 128
# Arrays with one entry per selection, [..., K, T]; the others have one row per token.
_SELECTIONS = ("smem_ids", "ids", "scores", "scores_grad", "weights", "pre_scores_grad")
_VMEM_BYTES = 56 * 2**20  # of 64 MiB on v5p and tpu7x; v5e and v6e have 128
_SMEM_BYTES = 896 * 2**10  # of 1 MiB


def unsupported_reason(call: AggregationCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    num_selected = call.indices.shape[1]
    reasons = [(platform != "tpu", f"it compiles for TPU, not for {platform}")]
    reasons.append(
        (call.slots is not None, f"slots are not implemented (num_slots = {call.num_slots})")
    )
    reasons.append((call.dtype != jnp.float32, "it accumulates in float32, not in float64"))
    for name, table in call.tables.items():
        known = table.dtype in (jnp.float32, jnp.bfloat16)
        reasons.append((not known, f"rows must be float32 or bfloat16, {name} are {table.dtype}"))
        odd = table.shape[0] % rows_per_copy(table) != 0 and not is_packed(name, call)
        reasons.append((odd, f"bfloat16 rows are fetched in pairs, {name} has {table.shape[0]}"))
        reasons.append((0 in table.shape, f"{name} is empty, {table.shape}"))
    reasons.append((0 in call.indices.shape, f"indices is empty, {call.indices.shape}"))
    smem_bytes = 2 * 4 * num_selected * _LANES
    needed_vmem = vmem_bytes(heuristic(call, _LANES), call, _LANES)
    for memory, needed, available in (
        ("SMEM", smem_bytes, _SMEM_BYTES),
        ("VMEM", needed_vmem, _VMEM_BYTES),
    ):
        what = f"num_selected = {num_selected} needs {needed} bytes of {memory}"
        reasons.append((needed > available, f"{what}, only {available} are available"))
    return next((reason for holds, reason in reasons if holds), None)


def forward(call: AggregationCall) -> Float[Array, "num_tokens value_dim"]:
    """Computes the output of `value_aggregation` without slots."""
    kernel = _Kernel("forward", call)

    def compute(refs: Any, slot: Array, token: Array, lane: Array) -> None:
        scores = [_column(refs["scores"].at[core], lane) for core in range(kernel.num_cores)]
        if call.pre_values is None:
            weights = scores
        else:
            pre_scores = _pre_scores(refs, slot, token, lane)
            gates, _ = activation_and_slope(pre_scores, call.activation)
            weights = [score * gates for score in scores]
        for lanes in _lane_chunks(kernel.value_dim):
            weight = _by_core(weights, lanes, kernel.value_dim)
            rows = _rows(refs, "values", slot, lane, lanes)
            _put_row(refs["output"], token, lanes, jnp.sum(weight * rows, axis=0, keepdims=True))

    outputs = {"output": kernel.token_rows(kernel.value_dim)}
    return kernel.run("value_aggregation_forward", compute, {}, outputs)["output"]


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
    """The gradients of scores and pre-inputs, and what those of the tables are sums of."""
    pre_values, pre_inputs = call.pre_values, call.pre_inputs
    kernel = _Kernel("backward", call)
    cores = range(kernel.num_cores)

    def compute(refs: Any, slot: Array, token: Array, lane: Array) -> None:
        weights_grad = [jnp.zeros((kernel.num_selected, 1), jnp.float32) for _ in cores]
        for lanes in _lane_chunks(kernel.value_dim):
            rows = _rows(refs, "values", slot, lane, lanes)
            products = rows * _row(refs["output_grad"], token, lanes)
            for core, mask in _cores_in(lanes, kernel.value_dim, kernel.num_cores):
                part = products if mask is None else jnp.where(mask, products, 0)
                weights_grad[core] += jnp.sum(part, axis=1, keepdims=True)
        if pre_values is None:
            for core in cores:
                _put_column(refs["scores_grad"].at[core], lane, weights_grad[core])
            return

        gates, slopes = activation_and_slope(_pre_scores(refs, slot, token, lane), call.activation)
        gates_grad = jnp.zeros_like(gates)
        for core in cores:
            score = _column(refs["scores"].at[core], lane)
            gates_grad += weights_grad[core] * score
            _put_column(refs["scores_grad"].at[core], lane, weights_grad[core] * gates)
            _put_column(refs["weights"].at[core], lane, score * gates)
        pre_scores_grad = gates_grad * slopes
        _put_column(refs["pre_scores_grad"], lane, pre_scores_grad)
        for lanes in _lane_chunks(kernel.pre_value_dim):
            rows = _rows(refs, "pre_values", slot, lane, lanes)
            grad = jnp.sum(pre_scores_grad * rows, axis=0, keepdims=True)
            _put_row(refs["pre_inputs_grad"], token, lanes, grad)

    outputs = {"scores_grad": kernel.selections(kernel.num_cores)}
    if pre_values is not None:
        outputs["weights"] = kernel.selections(kernel.num_cores)
        outputs["pre_scores_grad"] = kernel.selections()
        outputs["pre_inputs_grad"] = kernel.token_rows(kernel.pre_value_dim)
    inputs = {"output_grad": output_grad.astype(jnp.float32)}
    grads = kernel.run("value_aggregation_backward", compute, inputs, outputs)
    scores_grad = jnp.moveaxis(grads["scores_grad"], (0, 2), (2, 0))
    if pre_values is None or pre_inputs is None:
        return TokenGradients(scores_grad, None, [Term(call.scores, output_grad)])
    weights = Term(jnp.moveaxis(grads["weights"], (0, 2), (2, 0)), output_grad)
    pre_weights = Term(grads["pre_scores_grad"].T[:, :, None], pre_inputs)
    return TokenGradients(scores_grad, grads["pre_inputs_grad"], [weights, pre_weights])


class _Kernel:
    """Shapes, blocks and the grid of the forward and the backward kernel."""

    def __init__(self, pass_name: tuned.Pass, call: AggregationCall) -> None:
        self.pass_name, self.call = pass_name, call
        values, scores = call.values, call.scores
        pre_values, pre_inputs = call.pre_values, call.pre_inputs
        self.num_tokens, self.num_selected, self.num_cores = scores.shape
        self.value_dim = values.shape[1]
        self.pre_value_dim = 0 if pre_values is None else pre_values.shape[1]
        blocks = choose_blocks(pass_name, call, _LANES)
        self.block_tokens = blocks.tokens
        self.lane_tokens = min(_LANES, self.num_tokens)
        # The two TensorCores of a device (v5p) get one half each; a single core runs both in turn.
        lane_blocks = pl.cdiv(self.num_tokens, _LANES)
        self.num_parts = min(2, lane_blocks)
        self.part_blocks = pl.cdiv(lane_blocks, self.num_parts) * (_LANES // self.block_tokens)
        self.vmem_bytes = vmem_bytes(blocks, call, _LANES)

        self.tables = {
            name: _packed(name, call) if is_packed(name, call) else table
            for name, table in call.tables.items()
        }
        self.inputs: dict[str, Array] = {"scores": jnp.moveaxis(scores, (0, 2), (2, 0))}
        if pre_values is not None and pre_inputs is not None:
            self.inputs["pre_inputs"] = pre_inputs
        self.inputs = {name: x.astype(jnp.float32) for name, x in self.inputs.items()}
        self.ids = call.indices.T
        if any(rows_per_copy(table) > 1 for table in self.tables.values()):
            self.inputs["ids"] = self.ids  # in VMEM, to pick rows from pairs

        # Inside shard_map, results vary as the arguments do.
        self.axis_type = jax.typeof(values).manual_axis_type

    def token_rows(self, width: int) -> jax.ShapeDtypeStruct:
        """An output with one row per token: [T, width]."""
        return self._output((self.num_tokens, width))

    def selections(self, *leading: int) -> jax.ShapeDtypeStruct:
        """An output with one entry per selection: [..., K, T]."""
        return self._output((*leading, self.num_selected, self.num_tokens))

    def _output(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=self.axis_type)

    def run(self, name: str, compute: Any, inputs: Any, outputs: Any) -> dict[str, Array]:
        """Calls `compute(refs, slot, token in block, lane)` for each token, its rows in VMEM."""
        inputs = self.inputs | inputs
        operands = {"smem_ids": self.ids} | inputs | self.tables
        in_specs = [
            self._block("smem_ids", self.ids),
            *(self._block(key, x) for key, x in inputs.items()),
            *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in self.tables),
        ]
        names = (*operands, *outputs, *(f"{table}_ring" for table in self.tables), "arrived")

        def kernel(*refs: Any) -> None:
            self._pipeline(dict(zip(names, refs, strict=True)), compute)

        kernel.__name__ = f"_{name}_kernel"
        rings = [
            pltpu.VMEM(
                (self.block_tokens, rows_per_copy(table) * self.num_selected, table.shape[1]),
                table.dtype,
            )
            for table in self.tables.values()
        ]
        launch = pl.pallas_call(
            kernel,
            name=name,
            grid=(self.num_parts, self.part_blocks + 1),
            in_specs=in_specs,
            out_specs=[self._block(key, x) for key, x in outputs.items()],
            out_shape=list(outputs.values()),
            scratch_shapes=[
                *rings,
                pltpu.SemaphoreType.DMA((len(self.tables), self.block_tokens)),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=self.vmem_bytes,
            ),
            cost_estimate=self._cost([*inputs.values(), *outputs.values()]),
        )
        # Pallas cannot batch arrays that it leaves in HBM, so vmap becomes a loop of calls.
        results = custom_batching.sequential_vmap(launch)(*operands.values())
        return dict(zip(outputs, results, strict=True))

    def _block(self, name: str, array: Any) -> pl.BlockSpec:
        """The BlockSpec of an array: that of the block being started for ids, else computed."""
        started = name == "smem_ids"
        last_block = pl.cdiv(self.num_tokens, self.block_tokens) - 1

        def block_index(part: Array, step: Array) -> Array:
            step = step if started else jnp.maximum(step - 1, 0)
            first = part * self.part_blocks
            # The last step of a part starts no copies.
            step = jnp.minimum(step, self.part_blocks - 1)
            return jnp.minimum(first + step, last_block)

        if name in _SELECTIONS:
            lane_blocks = _LANES // self.block_tokens
            leading = (0,) * (len(array.shape) - 1)
            return pl.BlockSpec(
                (*array.shape[:-1], self.lane_tokens),
                lambda part, step: (*leading, lax.div(block_index(part, step), lane_blocks)),
                memory_space=pltpu.SMEM if started else pltpu.VMEM,
            )
        return pl.BlockSpec(
            (self.block_tokens, array.shape[1]),
            lambda part, step: (block_index(part, step), 0),
            memory_space=pltpu.VMEM,
        )

    def _pipeline(self, refs: Any, compute: Any) -> None:
        part, step = pl.program_id(0), pl.program_id(1)
        starting = (part * self.part_blocks + step) * self.block_tokens
        computing = starting - self.block_tokens

        def visit(token: Array, _: None) -> None:
            @pl.when((step > 0) & (computing + token < self.num_tokens))
            def _compute() -> None:
                self._copy_rows(refs, token, None)
                compute(refs, token, token, lax.rem(computing + token, _LANES))

            @pl.when((step < self.part_blocks) & (starting + token < self.num_tokens))
            def _start() -> None:
                self._copy_rows(refs, token, lax.rem(starting + token, _LANES))

        lax.fori_loop(0, self.block_tokens, visit, None)

    def _copy_rows(self, refs: Any, slot: Array, lane: Array | None) -> None:
        """Starts the copies for the token in `lane`; if `lane` is None, awaits those of a slot."""

        def copy(k: Array, _: None) -> None:
            for i, (name, table) in enumerate(self.tables.items()):
                # Waiting only uses the size of the copy, so any row will do.
                row = jnp.int32(0) if lane is None else refs["smem_ids"][k, lane]
                size = rows_per_copy(table)
                row = row & -size
                descriptor = pltpu.make_async_copy(
                    refs[name].at[pl.ds(pl.multiple_of(row, size), size)],
                    refs[f"{name}_ring"].at[slot, pl.ds(pl.multiple_of(k * size, size), size)],
                    refs["arrived"].at[i, slot],
                )
                if lane is None:
                    descriptor.wait()
                else:
                    descriptor.start()

        lax.fori_loop(0, self.num_selected, copy, None, unroll=math.gcd(self.num_selected, 8))

    def _cost(self, blocked: list[Any]) -> pl.CostEstimate:
        """The cost, with the arrays that the grid passes through VMEM, each block once."""
        copies = [
            jax.ShapeDtypeStruct((rows_per_copy(table), table.shape[1]), table.dtype)
            for table in self.tables.values()
        ]
        fetched = self.num_tokens * self.num_selected * tiled_bytes(*copies)
        others = tiled_bytes(self.ids, *blocked)
        return cost_estimate(self.pass_name, self.call, fetched + others)


def _pre_scores(refs: Any, slot: Array, token: Array, lane: Array) -> Array:
    """The inner products of a token's pre-input with its pre-value rows: [K, 1]."""
    pre_value_dim = refs["pre_inputs"].shape[1]
    pre_scores = []
    for lanes in _lane_chunks(pre_value_dim):
        products = _rows(refs, "pre_values", slot, lane, lanes)
        products *= _row(refs["pre_inputs"], token, lanes)
        pre_scores.append(jnp.sum(products, axis=1, keepdims=True))
    return sum(pre_scores[1:], start=pre_scores[0])


def _rows(refs: Any, name: str, slot: Array, lane: Array, lanes: slice) -> Array:
    """A chunk of lanes of the rows in a slot, float32: [K, lanes]."""
    ring = refs[f"{name}_ring"]
    # A bfloat16 is the upper half of a float32.
    if ring.dtype == jnp.float32:
        return ring[slot, :, lanes]
    if ring.dtype == jnp.uint32:
        width = ring.shape[2]
        if lanes.start < width:
            words = ring[slot, :, lanes] << 16
        else:
            packed = ring[slot, :, lanes.start - width : lanes.stop - width]
            words = packed & jnp.uint32(0xFFFF0000)
    else:
        # The even row of a pair is in the lower halves.
        is_even = _column(refs["ids"], lane) & 1 == 0
        pairs = pltpu.bitcast(ring[slot, :, lanes], jnp.uint32)
        words = jnp.where(is_even, pairs << 16, pairs & jnp.uint32(0xFFFF0000))
    return lax.bitcast_convert_type(words, jnp.float32)


def _column(ref: Any, lane: Array) -> Array:
    """Column `lane` of a [K, T] block: [K, 1]."""
    block = ref[...]
    here = lax.broadcasted_iota(jnp.int32, block.shape, 1) == lane
    return jnp.sum(jnp.where(here, block, 0), axis=1, keepdims=True)


def _put_column(ref: Any, lane: Array, column: Array) -> None:
    """Writes [K, 1] into column `lane` of a [K, T] block."""
    here = lax.broadcasted_iota(jnp.int32, ref.shape, 1) == lane
    ref[...] = jnp.where(here, column, ref[...])


def _row(ref: Any, token: Array, lanes: slice) -> Array:
    """Row `token` of a [T, D] block: [1, lanes]. Dynamic row indices must address full tiles."""
    block = ref[_tile_of(token), lanes]
    here = lax.broadcasted_iota(jnp.int32, block.shape, 0) == token & (SUBLANES - 1)
    return jnp.sum(jnp.where(here, block, 0), axis=0, keepdims=True)


def _put_row(ref: Any, token: Array, lanes: slice, row: Array) -> None:
    """Writes [1, lanes] into row `token` of a [T, D] block."""
    block = ref[_tile_of(token), lanes]
    here = lax.broadcasted_iota(jnp.int32, block.shape, 0) == token & (SUBLANES - 1)
    ref[_tile_of(token), lanes] = jnp.where(here, row, block)


def _tile_of(token: Array) -> Any:
    return pl.ds(pl.multiple_of(token & -SUBLANES, SUBLANES), SUBLANES)


def _lane_chunks(width: int) -> Iterator[slice]:
    """Slices of at most one register of lanes, which keeps the number of live registers low."""
    for start in range(0, width, _LANES):
        yield slice(start, min(start + _LANES, width))


def _cores_in(lanes: slice, width: int, num_cores: int) -> Iterator[tuple[int, Array | None]]:
    """The cores whose slice of a row overlaps these lanes, with a mask if there are several."""
    core_dim = width // num_cores
    first, last = lanes.start // core_dim, (lanes.stop - 1) // core_dim
    if first == last:
        yield first, None
        return
    position = lax.broadcasted_iota(jnp.int32, (1, lanes.stop - lanes.start), 1) + lanes.start
    for core in range(first, last + 1):
        yield core, (position >= core * core_dim) & (position < (core + 1) * core_dim)


def _by_core(weights: list[Array], lanes: slice, width: int) -> Array:
    """Broadcasts the weight [K, 1] of each core over the lanes of its slice: [K, lanes or 1]."""
    (first, _), *others = _cores_in(lanes, width, len(weights))
    by_column = weights[first]
    for core, mask in others:
        assert mask is not None
        by_column = jnp.where(mask, weights[core], by_column)
    return by_column


def _packed(name: str, call: AggregationCall) -> Array:
    """Returns the packed copy of a table: the given one, or one that is made here."""
    given = call.packed.get(name)
    return pack_rows(call.tables[name], _LANES) if given is None else given
