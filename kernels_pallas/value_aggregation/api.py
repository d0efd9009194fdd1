"""The public operator: checks its arguments and owns the derivative."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, dispatch, tuned
from kernels_pallas.arguments import Argument
from kernels_pallas.array_types import AnyArray, Array, Float, Integer
from kernels_pallas.common import check, chunk_tokens, vary_alike
from kernels_pallas.value_aggregation.activation import check_activation
from kernels_pallas.value_aggregation.options import Options
from kernels_pallas.value_aggregation.reference import Activation, accumulation_dtype
from kernels_pallas.value_aggregation.shapes import sizes
from kernels_pallas.value_aggregation.table_gradient import RowGradients

Implementation = Literal["xla", "pallas_tpu", "pallas_sparsecore", "pallas_gpu"]

# Each has `unsupported_reason`, `forward`, `backward` and `row_gradients`, which take the same
# arguments in the same order; and, for `row_products`, `row_products` and `table_gradient`.
BACKENDS = dispatch.Backends("kernels_pallas.value_aggregation", get_args(Implementation))

# What an unnamed implementation is: the first that can take the call. The Pallas kernels have been
# compiled and interpreted but not run on a device, so they are there by name until measured.
AUTOMATIC = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}

MAX_NUM_VALUES = 2**31 - 1  # ids, and the bounds XLA compares them with, are int32

# Pre-values and values are two tables, not one of wider rows. Measured on CPU, forward + backward
# in milliseconds, medians of 9 interleaved runs on 2 shared cores, float32, T = 2048, K = 32,
# 129,600 rows; and MiB of the tables in the tiles of a TPU, where rows are padded to 128 lanes, at
# the paper's sizes, from its compiler:
#
#     D_p + D_v    two tables     one        N           two tables      one
#     192 + 192      70 + 277     44 + 312     360^2            253      190
#     384 + 768     133 + 513     95 + 520     528^2          1,225    1,225
#     72 + 216       38 + 126     19 + 173     964^2          1,361    1,361
#     320 + 960                              1,696^2         15,450   14,045
#
# One fetch is faster forward, but its gradients must be joined before they are added: in all 1.05
# times as fast at best, 0.86 at worst. The padding it saves is a quarter at the smallest size and
# next to nothing at the others.

# Bytes of rows that one chunk of tokens fetches, when the caller names no chunk size.
# CPU, measured: forward + backward in milliseconds, best of 5 interleaved runs on 2 shared cores,
# float32, K = 32, 129,600 rows:
#
#     T, D_v = D_p    chunks of 32     64    128    256   1024 tokens   no chunks
#     2048, 192                174    161    176    156    181             360
#     2048, 384                385    375    372    404    488            1020
#     8192, 192                401    361    367    421    414             826
#
# Chunks of 3 to 13 MB of rows are equally good within the noise; 8 MiB lies between.
_CPU_CHUNK_BYTES = 8 * 2**20
# An accelerator pays a launch for each operation of a chunk, so it gets as few chunks as its memory
# easily holds. Reasoned, not measured.
_ACCELERATOR_CHUNK_BYTES = 256 * 2**20


def value_aggregation(
    values: Float[AnyArray, "num_values value_dim"],
    indices: Integer[AnyArray, "num_tokens top_m"],
    scores: Float[AnyArray, "num_tokens top_m num_cores"],
    *,
    pre_values: Float[AnyArray, "num_values pre_value_dim"] | None = None,
    pre_inputs: Float[AnyArray, "num_tokens pre_value_dim"] | None = None,
    activation: Activation | None = None,
    slots: Integer[AnyArray, "num_tokens top_m"] | None = None,
    num_slots: int = 1,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "num_tokens {num_slots}*value_dim"]:
    """Sums, for each token, the selected rows of a table, weighted by score and pre-score.

    For token t, selection k, core i and the i-th of `num_cores` equal slices of a row:

        gate[t, k] = activation(<pre_inputs[t], pre_values[indices[t, k]]>)   # 1 without pre-values
        weight[t, k, i] = scores[t, k, i] * gate[t, k]
        output[t, slots[t, k], slice i] += weight[t, k, i] * values[indices[t, k], slice i]

    Sources: multi-core scoring, UltraMem (arXiv 2411.12364); pre-values, UltraMemV2
    (arXiv 2508.18756), eq. 13-15, where `activation` is None; PEER (arXiv 2407.04153) has one. With
    `slots`, the slots of a token lie side by side in the output, slot-major: the implicit value
    expansion of UltraMem. `reference.py` says the same in unblocked JAX.

    Everything is accumulated in, and the output has, the accumulation dtype: float32, or float64
    if an argument is. The caller casts. Tables may be bfloat16; only fetched rows are converted.
    Gradients are accumulated likewise and returned in the dtype of their argument; those of the
    tables are dense. An id that is selected repeatedly contributes each time, to output and
    gradient alike, in an order that is fixed: only "xla" on GPU leaves the order of the tables'
    gradients to the device's atomics.

    Reverse-mode differentiable only. Inside `jax.shard_map` it works on the local arrays, which may
    vary over different manual axes. Outside, on a mesh with explicit axes, tokens may be sharded,
    and nothing else. Arrays may be NumPy's.

    Args:
        values: the table.
        indices: ids of the selected rows. They must lie in [0, num_values): the result is undefined
            otherwise. KERNELS_PALLAS_CHECK_IDS=1 in the environment has them checked, and those of
            `slots`: see `arguments.py`.
        scores: the weight of each selection and core.
        pre_values: rows that decide, with `pre_inputs`, how much each selection counts.
        pre_inputs: what each token brings to `pre_values`; both or neither.
        activation: applied to the pre-score; "gelu" is the exact one, with erf.
        slots: where in its token's output each selection is added, in [0, num_slots).
        num_slots: outputs a token; 1 without `slots`.
        chunk_size: tokens that "xla" processes at once. By default what was measured (`tuned.py`),
            else a power of two, from a budget of bytes for the platform.
        implementation: of the forward and the backward pass. "xla" runs everywhere; the others
            never write the fetched rows to memory: "pallas_tpu" on TPU, "pallas_sparsecore" on
            those that have SparseCores, "pallas_gpu" on Hopper. By default the first of
            `AUTOMATIC` that supports the call, which is logged once.
        platform: what the call will be compiled for, where it is not the platform of the mesh in
            context nor the default backend: ahead-of-time compilation for TPU in a CPU process.

    Raises:
        ValueError: an argument's rank, shape, dtype or value breaks a rule above; the message names
            the argument, what it got and the rule.
        UnsupportedError: the named implementation cannot take the call; the message says why.
    """
    arrays = _checked_arrays(values, indices, scores, pre_values, pre_inputs, slots)
    asked = _checked_options(arrays, activation, num_slots, chunk_size)
    where = (implementation, platform)
    chosen, options = choose("value_aggregation", tuple(arrays.values()), asked, where)
    return arguments.per_device(
        "value_aggregation",
        _local_aggregate,
        arrays,
        (options, chosen),
        token_axes=dict.fromkeys(("indices", "scores", "pre_inputs", "slots"), 0),
    )


def value_aggregation_row_gradients(
    values: Float[AnyArray, "num_values value_dim"],
    indices: Integer[AnyArray, "num_tokens top_m"],
    scores: Float[AnyArray, "num_tokens top_m num_cores"],
    output_grad: Float[AnyArray, "num_tokens {num_slots}*value_dim"],
    *,
    pre_values: Float[AnyArray, "num_values pre_value_dim"] | None = None,
    pre_inputs: Float[AnyArray, "num_tokens pre_value_dim"] | None = None,
    activation: Activation | None = None,
    slots: Integer[AnyArray, "num_tokens top_m"] | None = None,
    num_slots: int = 1,
    max_rows: int | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> RowGradients:
    """Computes the gradients of `value_aggregation`, those of the tables for selected rows alone.

    With `output_grad` the gradient of the output, these are the gradients of the arguments, all in
    the accumulation dtype. Those of the tables have a row for each different id, in rising order,
    and share the ids: nothing of the size of a table is formed, so that an optimizer can update the
    rows of a few tokens at a cost that does not depend on num_values.

    Not differentiable. Inside `jax.shard_map` the gradients are those of the local tokens; what
    other devices hold of a table that is the same on all of them is the caller's to add. Outside,
    on a mesh with explicit axes, all arrays must be replicated.

    An id outside of the table counts as the nearest row, so that each of the first `num_rows` ids
    that are returned is that of a row; the others are padding (`RowGradients`).

    Args:
        values: see `value_aggregation`, as for all arguments not listed here.
        output_grad: the gradient of the output.
        max_rows: how many rows of the tables there is room for. By default there is for all,
            min(num_tokens * top_m, num_values). Where more are selected, those of the smallest ids
            are returned, and `num_rows` tells how many there are.

    Raises:
        ValueError, UnsupportedError: as `value_aggregation`.
    """
    arrays = _checked_arrays(values, indices, scores, pre_values, pre_inputs, slots)
    asked = _checked_options(arrays, activation, num_slots, chunk_size)
    name = "value_aggregation_row_gradients"
    chosen, options = choose(name, tuple(arrays.values()), asked, (implementation, platform))
    values, indices = arrays["values"], arrays["indices"]
    expected = (indices.shape[0], options.num_slots * values.shape[1])
    axes = "[num_tokens, num_slots * value_dim]"
    arrays |= arguments.as_arrays({"output_grad": Argument(output_grad, axes)})
    shape = arrays["output_grad"].shape
    check(shape == expected, "output_grad.shape", shape, f"{axes} = {expected}")
    if max_rows is None:
        max_rows = min(indices.size, values.shape[0])
    max_rows = arguments.whole_number("max_rows", max_rows)
    check(max_rows >= 0, "max_rows", max_rows, "at least 0")
    static = (max_rows, options, chosen)
    return arguments.per_device(name, _local_row_gradients, arrays, static, {})


def _local_aggregate(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None,
    pre_inputs: Array | None,
    slots: Array | None,
    options: Options,
    implementation: str,
) -> Array:
    values, scores, pre_values, pre_inputs = vary_alike(
        (values, scores, pre_values, pre_inputs), (indices, slots)
    )
    return _aggregate(
        values, indices, scores, pre_values, pre_inputs, slots, options, implementation
    )


def _local_row_gradients(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None,
    pre_inputs: Array | None,
    slots: Array | None,
    output_grad: Array,
    max_rows: int,
    options: Options,
    implementation: str,
) -> RowGradients:
    values, scores, pre_values, pre_inputs, output_grad = vary_alike(
        (values, scores, pre_values, pre_inputs, output_grad), (indices, slots)
    )
    # What is returned names rows, whatever the ids are.
    indices = jnp.clip(indices, 0, max(0, values.shape[0] - 1))
    return BACKENDS[implementation].row_gradients(
        values, indices, scores, pre_values, pre_inputs, slots, output_grad, max_rows, options
    )


def choose(
    operator: str,
    arrays: tuple[Any, Any, Any, Any, Any, Any],
    asked: tuple[Activation | None, int, int | None],
    where: tuple[str | None, dispatch.Platform | None],
) -> tuple[str, Options]:
    """Which of the implementations gets a call whose arguments are sound, and with what options."""
    values, indices, scores, pre_values, pre_inputs, _ = arrays
    activation, num_slots, chunk_size = asked
    implementation, platform = where
    target = dispatch.lowering_platform(platform)
    row_dim = values.shape[1] + (0 if pre_values is None else pre_values.shape[1])
    itemsize = accumulation_dtype(values, scores, pre_values, pre_inputs).itemsize
    chunk_bytes = _CPU_CHUNK_BYTES if target == "cpu" else _ACCELERATOR_CHUNK_BYTES
    default = tuned.Chunks(chunk_tokens(indices.shape[1] * row_dim * itemsize, chunk_bytes))
    options = Options(activation, num_slots, chunk_size or default.chunk_size)
    reasons = BACKENDS.unsupported_reasons(*arrays, options, target)
    chosen = dispatch.choose(operator, implementation, target, AUTOMATIC, reasons)
    if chosen == "xla" and chunk_size is None:
        shape = sizes(values, scores, pre_values, num_slots)
        key = tuned.Key.of("value_aggregation", "xla", "both", shape, values.dtype)
        chunks = tuned.lookup(default, key, platform=target) or default
        options = options._replace(chunk_size=chunks.chunk_size)
    return chosen, options


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _aggregate(
    values: Array,
    indices: Array,
    scores: Array,
    pre_values: Array | None,
    pre_inputs: Array | None,
    slots: Array | None,
    options: Options,
    implementation: str,
) -> Array:
    arrays = (values, indices, scores, pre_values, pre_inputs, slots)
    return BACKENDS[implementation].forward(*arrays, options)


def _aggregate_fwd(*args: Any) -> tuple[Array, Any]:
    return _aggregate(*args), args[:6]


def _aggregate_bwd(
    options: Options, implementation: str, residuals: Any, output_grad: Array
) -> tuple[Array | None, ...]:
    grads = BACKENDS[implementation].backward(*residuals, output_grad, options)
    values_grad, scores_grad, pre_values_grad, pre_inputs_grad = grads
    return values_grad, None, scores_grad, pre_values_grad, pre_inputs_grad, None


_aggregate.defvjp(_aggregate_fwd, _aggregate_bwd)


def _checked_arrays(
    values: Any, indices: Any, scores: Any, pre_values: Any, pre_inputs: Any, slots: Any
) -> dict[str, Any]:
    """Returns the arguments as arrays of JAX that fit together, by name."""
    arrays = arguments.as_arrays(
        {
            "values": Argument(values, "[num_values, value_dim]"),
            "indices": Argument(indices, "[num_tokens, top_m]", "ids"),
            "scores": Argument(scores, "[num_tokens, top_m, num_cores]"),
            "pre_values": Argument(pre_values, "[num_values, pre_value_dim]", optional=True),
            "pre_inputs": Argument(pre_inputs, "[num_tokens, pre_value_dim]", optional=True),
            "slots": Argument(slots, "[num_tokens, top_m]", "ids", optional=True),
        }
    )
    values, indices, scores, pre_values, pre_inputs, slots = arrays.values()
    num_values, value_dim = values.shape
    num_tokens, _, num_cores = scores.shape
    check_num_values("values", num_values, indices)
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
    return arrays


def check_num_values(name: str, num_values: int, indices: Array) -> None:
    """Checks that a table has rows where some are selected, and no more than ids can name.

    Raises:
        ValueError: it has not.
    """
    check(num_values <= MAX_NUM_VALUES, f"{name} rows", num_values, f"at most {MAX_NUM_VALUES}")
    rule = f"at least 1, as indices, {indices.shape}, select some"
    check(num_values > 0 or indices.size == 0, f"{name} rows", num_values, rule)


def _checked_options(
    arrays: dict[str, Any], activation: Activation | None, num_slots: Any, chunk_size: Any
) -> tuple[Activation | None, int, int | None]:
    pre_values, slots = arrays["pre_values"], arrays["slots"]
    check_activation(activation)
    unused = activation is not None and pre_values is None
    check(not unused, "activation", repr(activation), "None without pre_values")
    num_slots = arguments.whole_number("num_slots", num_slots)
    check(num_slots >= 1, "num_slots", num_slots, "at least 1")
    check(slots is not None or num_slots == 1, "num_slots", num_slots, "1 without slots")
    if slots is not None:
        arguments.check_ids("slots", slots, num_slots)
    return activation, num_slots, arguments.chunk_tokens(chunk_size)


def _presence(array: Array | None) -> str:
    return "absent" if array is None else "given"
