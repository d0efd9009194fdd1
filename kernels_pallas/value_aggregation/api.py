"""The public operator: validates arguments, chooses a backend and defines the derivative."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, dispatch, tables, tuned
from kernels_pallas.array_types import AnyArray, Array, Float, Integer, UInt32
from kernels_pallas.common import check, match_vma
from kernels_pallas.protocol import ArraySpec, cotangents
from kernels_pallas.tables import Implementation
from kernels_pallas.value_aggregation.activation import check_activation
from kernels_pallas.value_aggregation.call import (
    AggregationBackend,
    AggregationCall,
    RowGradients,
)
from kernels_pallas.value_aggregation.reference import Activation

BACKENDS = dispatch.Backends[AggregationBackend](
    "kernels_pallas.value_aggregation",
    {
        "xla": "xla",
        "pallas_tpu": "tpu.backend",
        "pallas_sparsecore": "sparsecore.backend",
        "pallas_gpu": "gpu.backend",
    },
)

# Pre-values and values are two tables, not one table of wider rows. Left: forward + backward on CPU
# in milliseconds, medians of 9 interleaved runs on 2 shared cores, float32, T = 2048, K = 32,
# 129,600 rows. Right: MiB of the tables in the tiled layout of a TPU, which pads rows to 128 lanes,
# at the paper's sizes, as reported by the compiler:
#
#     D_p + D_v    two tables     one        N           two tables      one
#     192 + 192      70 + 277     44 + 312     360^2            253      190
#     384 + 768     133 + 513     95 + 520     528^2          1,225    1,225
#     72 + 216       38 + 126     19 + 173     964^2          1,361    1,361
#     320 + 960                              1,696^2         15,450   14,045
#
# A single gather makes the forward pass faster, but gradients must be concatenated before the
# scatter: in total, one table is between 0.86 and 1.05 times as fast. It saves a quarter of the
# memory at the smallest size, through less padding, and almost nothing at the others.


def value_aggregation(
    values: Float[AnyArray, "num_values value_dim"],
    indices: Integer[AnyArray, "num_tokens num_selected"],
    scores: Float[AnyArray, "num_tokens num_selected num_cores"],
    *,
    pre_values: Float[AnyArray, "num_values pre_value_dim"] | None = None,
    pre_inputs: Float[AnyArray, "num_tokens pre_value_dim"] | None = None,
    activation: Activation | None = None,
    slots: Integer[AnyArray, "num_tokens num_selected"] | None = None,
    num_slots: int = 1,
    master_values: Float[AnyArray, "num_masters value_dim"] | None = None,
    master_pre_values: Float[AnyArray, "num_masters pre_value_dim"] | None = None,
    first_master: Integer[AnyArray, "1"] | None = None,
    packed_values: UInt32[AnyArray, "num_values value_words"] | None = None,
    packed_pre_values: UInt32[AnyArray, "num_values pre_value_words"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "num_tokens {num_slots}*value_dim"]:
    """Sums the selected rows of a table for each token, weighted by score and pre-score.

    For token t, selection k, core i and the i-th of `num_cores` equal slices of a row:

        gate[t, k] = activation(<pre_inputs[t], pre_values[indices[t, k]]>)   # 1 without pre-values
        weight[t, k, i] = scores[t, k, i] * gate[t, k]
        output[t, slots[t, k], slice i] += weight[t, k, i] * values[indices[t, k], slice i]

    Sources: multi-core scoring, UltraMem (arXiv 2411.12364); pre-values, UltraMemV2
    (arXiv 2508.18756), eq. 13-15, where `activation` is None; PEER (arXiv 2407.04153) has one. With
    `slots`, the output of a token is the concatenation of its slots: the implicit value expansion
    of UltraMem. `reference.py` is the equivalent unblocked JAX code.

    Accumulation and output are in float32, or in float64 if an argument is; cast the result as
    needed. Tables may be bfloat16: only fetched rows are converted. Gradients are accumulated in
    the same dtype and returned in the dtype of their argument; those of the tables are dense. An
    id that is selected repeatedly contributes each time, to the output and to the gradient. The
    order of every sum is fixed, except that "xla" on GPU scatters the gradients of the tables with
    atomics.

    Only reverse-mode differentiation is supported. Inside `jax.shard_map` the operator works on the
    local arrays, which may vary over different manual axes. Outside, on a mesh with explicit axes,
    arrays may be sharded over tokens but no other axis. NumPy arrays are accepted.

    Args:
        values: the table.
        indices: ids of the selected rows. They must be in [0, num_values); otherwise, the result is
            undefined. Set KERNELS_PALLAS_CHECK_IDS=1 in the environment to check them, and `slots`,
            at run time: see `arguments.py`.
        scores: the weight of each selection and core.
        pre_values: table whose rows, multiplied with `pre_inputs`, give the pre-scores.
        pre_inputs: the vector of each token that multiplies `pre_values`; both or neither.
        activation: applied to the pre-score; "gelu" is exact (erf).
        slots: the slot of its token's output that each selection adds to, in [0, num_slots).
        num_slots: number of slots per token; 1 without `slots`.
        master_values: the trained rows, if `values` is a copy of them, in a narrower dtype or among
            rows of other tables. They are not read. They get the gradient, in their own dtype, and
            `values` gets none.
        master_pre_values: likewise for `pre_values`; given if both others are.
        first_master: [1], the row of `values` that is row 0 of the masters. All ids must be of rows
            that have a master.
        packed_values: `pack_rows(values)`, for bfloat16 values that many calls read. "pallas_tpu"
            reads it instead of `values`, and the others do not need it.
        packed_pre_values: likewise for `pre_values`.
        chunk_size: tokens that "xla" processes at once. By default the tuned value (`tuned.py`) if
            there is one, else a power of two that fits a memory budget of the platform.
        implementation: for the forward and the backward pass. "xla" runs everywhere. The others
            never write the fetched rows back to memory: "pallas_tpu" runs on TPU,
            "pallas_sparsecore" on TPUs that have SparseCores, "pallas_gpu" on Hopper. By default,
            the first of `AUTOMATIC` that supports the call; the choice is logged once.
        platform: what the call will be compiled for, if that is neither the platform of the mesh in
            context nor the default backend: ahead-of-time compilation for TPU in a CPU process.

    Raises:
        ValueError: the rank, shape, dtype or value of an argument is invalid; the message names the
            argument, its value and the rule.
        UnsupportedError: the named implementation does not support the call; the message says why.
    """
    arrays = {
        "values": values,
        "indices": indices,
        "scores": scores,
        "pre_values": pre_values,
        "pre_inputs": pre_inputs,
        "slots": slots,
        "master_values": master_values,
        "master_pre_values": master_pre_values,
        "first_master": first_master,
        "packed_values": packed_values,
        "packed_pre_values": packed_pre_values,
    }
    name = "value_aggregation"
    call = _checked(arrays, activation, num_slots)
    chosen, call = _choose(name, call, chunk_size, (implementation, platform))
    return arguments.per_device(name, _local_aggregate, call, chosen)


def value_aggregation_row_gradients(
    values: Float[AnyArray, "num_values value_dim"],
    indices: Integer[AnyArray, "num_tokens num_selected"],
    scores: Float[AnyArray, "num_tokens num_selected num_cores"],
    output_grad: Float[AnyArray, "num_tokens {num_slots}*value_dim"],
    *,
    pre_values: Float[AnyArray, "num_values pre_value_dim"] | None = None,
    pre_inputs: Float[AnyArray, "num_tokens pre_value_dim"] | None = None,
    activation: Activation | None = None,
    slots: Integer[AnyArray, "num_tokens num_selected"] | None = None,
    num_slots: int = 1,
    max_rows: int | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> RowGradients:
    """Computes the gradients of `value_aggregation`, with row-sparse gradients of the tables.

    Given `output_grad`, the gradient of the output, it returns the gradients of the arguments, all
    in the accumulation dtype. The gradients of the tables have one row for each distinct id, in
    ascending order, and share the ids. No array of the size of a table is created, so an optimizer
    can update the rows of a few tokens at a cost that does not depend on num_values.

    Not differentiable. Inside `jax.shard_map` the gradients are those of the local tokens; if a
    table is replicated, the caller must sum them over devices. Outside, on a mesh with explicit
    axes, all arrays must be replicated.

    Ids out of range are clamped to the nearest row, so each of the first `num_rows` returned ids is
    valid; the others are padding (see `RowGradients`).

    Args:
        values: see `value_aggregation`, as for all arguments not listed here.
        output_grad: the gradient of the output.
        max_rows: capacity for gradient rows; the default, min(num_tokens * num_selected,
            num_values), always suffices. If more distinct ids are selected, the rows of the
            smallest ids are returned, and `num_rows` is the number of distinct ids.

    Raises:
        ValueError, UnsupportedError: as `value_aggregation`.
    """
    arrays = {
        "values": values,
        "indices": indices,
        "scores": scores,
        "pre_values": pre_values,
        "pre_inputs": pre_inputs,
        "slots": slots,
        "master_values": None,
        "master_pre_values": None,
        "first_master": None,
        "packed_values": None,
        "packed_pre_values": None,
    }
    name = "value_aggregation_row_gradients"
    call = _checked(arrays, activation, num_slots)
    chosen, call = _choose(name, call, chunk_size, (implementation, platform))
    spec = ArraySpec("[num_tokens, num_slots * value_dim]", "floats", False, None)
    gradient = arguments.as_array("output_grad", output_grad, spec)
    expected = (call.indices.shape[0], call.num_slots * call.values.shape[1])
    check(
        gradient.shape == expected, "output_grad.shape", gradient.shape, f"{spec.axes} = {expected}"
    )
    capacity = tables.checked_capacity(max_rows, call.indices, call.values.shape[0])
    return arguments.per_device(
        name,
        _local_row_gradients,
        call,
        capacity,
        chosen,
        others={"output_grad": gradient},
        tokens_may_be_sharded=False,
    )


def _local_aggregate(call: AggregationCall, implementation: str) -> Array:
    return _aggregate(match_vma(call), implementation)


def _local_row_gradients(
    call: AggregationCall, output_grad: Array, max_rows: int, implementation: str
) -> RowGradients:
    # Clamp, so that every returned id is valid.
    nearest = jnp.clip(call.indices, 0, max(0, call.values.shape[0] - 1))
    call = dataclasses.replace(call, indices=nearest)
    call, output_grad = match_vma((call, output_grad))
    return BACKENDS[implementation].row_gradients(call, output_grad, max_rows)


def _choose(
    operator: str,
    call: AggregationCall,
    chunk_size: Any,
    where: tuple[str | None, dispatch.Platform | None],
) -> tuple[str, AggregationCall]:
    """Chooses the implementation of a validated call, and its chunk size."""
    implementation, platform = where
    target = dispatch.lowering_platform(platform)
    asked = arguments.chunk_tokens(chunk_size)
    row_dim = sum(table.shape[1] for table in call.tables.values())
    default = tables.default_chunk(call.indices.shape[1], row_dim, call.dtype, target)
    call = dataclasses.replace(call, chunk_size=asked or default)
    reasons = BACKENDS.unsupported_reasons(call, target)
    chosen = dispatch.choose(operator, implementation, target, tables.AUTOMATIC, reasons)
    if chosen == "xla" and asked is None:
        key = tuned.Key.of("value_aggregation", "xla", "both", call.sizes, call.values.dtype)
        chunks = tuned.lookup(tuned.Chunks(default), key, platform=target)
        call = dataclasses.replace(call, chunk_size=chunks.chunk_size if chunks else default)
    return chosen, call


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _aggregate(call: AggregationCall, implementation: str) -> Array:
    return BACKENDS[implementation].forward(call)


def _aggregate_fwd(call: AggregationCall, implementation: str) -> tuple[Array, AggregationCall]:
    return _aggregate(call, implementation), call


def _aggregate_bwd(
    implementation: str, call: AggregationCall, output_grad: Array
) -> tuple[AggregationCall]:
    return (cotangents(call, BACKENDS[implementation].backward(call, output_grad)),)


_aggregate.defvjp(_aggregate_fwd, _aggregate_bwd)


def _checked(passed: dict[str, Any], activation: Any, num_slots: Any) -> AggregationCall:
    """Converts the arguments to JAX arrays and checks that their shapes are consistent."""
    arrays = arguments.as_arrays(AggregationCall, passed)
    values, indices, scores = arrays["values"], arrays["indices"], arrays["scores"]
    pre_values, pre_inputs, slots = (arrays[n] for n in ("pre_values", "pre_inputs", "slots"))
    num_values, value_dim = values.shape
    num_tokens, _, num_cores = scores.shape
    tables.check_num_values("values", num_values, indices)
    rule = f"the shape of indices, {indices.shape}"
    check(scores.shape[:2] == indices.shape, "scores.shape[:2]", scores.shape[:2], rule)
    divides = num_cores > 0 and value_dim % num_cores == 0
    check(divides, "scores.shape[-1]", num_cores, f"a divisor of value_dim = {value_dim}")
    if slots is not None:
        check(slots.shape == indices.shape, "slots.shape", slots.shape, rule)

    given = f"pre_values {_presence(pre_values)}, pre_inputs {_presence(pre_inputs)}"
    check((pre_values is None) == (pre_inputs is None), "pre-values", given, "both or neither")
    if pre_values is not None and pre_inputs is not None:
        rule = f"as many rows as values, {num_values}"
        check(pre_values.shape[0] == num_values, "pre_values.shape", pre_values.shape, rule)
        expected = (num_tokens, pre_values.shape[1])
        rule = f"[num_tokens, pre_value_dim] = {expected}"
        check(pre_inputs.shape == expected, "pre_inputs.shape", pre_inputs.shape, rule)
    arguments.check_ids("indices", indices, num_values)

    check_activation(activation)
    _check_masters(arrays)
    for name in ("values", "pre_values"):
        tables.check_packed(f"packed_{name}", arrays[f"packed_{name}"], arrays[name])
    unused = activation is not None and pre_values is None
    check(not unused, "activation", repr(activation), "None without pre_values")
    num_slots = arguments.as_integer("num_slots", num_slots)
    check(num_slots >= 1, "num_slots", num_slots, "at least 1")
    check(slots is not None or num_slots == 1, "num_slots", num_slots, "1 without slots")
    if slots is not None:
        arguments.check_ids("slots", slots, num_slots)
    return AggregationCall(**arrays, activation=activation, num_slots=num_slots)


def _check_masters(arrays: dict[str, Array | None]) -> None:
    """Checks that there are masters for every table or for none, of the same width."""
    first, num_masters = arrays["first_master"], set[int]()
    given = f"{_presence(first)} with {_presence(arrays['master_values'])} masters"
    check((first is None) == (arrays["master_values"] is None), "first_master", given, "with both")
    if first is not None:
        check(first.shape == (1,), "first_master.shape", first.shape, "[1]")
    for name in ("values", "pre_values"):
        table, master = arrays[name], arrays[f"master_{name}"]
        needed = first is not None and table is not None
        rule = "given with the masters of values" if needed else "absent without them"
        check((master is not None) == needed, f"master_{name}", _presence(master), rule)
        if master is not None and table is not None:
            rule = f"as wide as {name}, {table.shape[1]}"
            check(master.shape[1] == table.shape[1], f"master_{name}.shape", master.shape, rule)
            num_masters.add(master.shape[0])
    check(len(num_masters) < 2, "rows of masters", sorted(num_masters), "equal")


def _presence(array: Array | None) -> str:
    return "absent" if array is None else "given"
