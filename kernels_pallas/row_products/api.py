"""Products of tokens with their selected rows: the derivative of value aggregation by its scores.

Value aggregation and its derivatives are three operations, on a table [N, D], ids [T, K], numbers
[T, K] and vectors [T, D]. Each makes one of table, numbers and vectors from the other two:

    numbers     vectors[t] . table[ids[t, k]]                       this operator
    vectors     sum over k of numbers[t, k] * table[ids[t, k]]      value aggregation
    table       row n: the sum of numbers[t, k] * vectors[t]        table gradient
                over all ids[t, k] = n

So the derivatives of this operator are the other two.
"""

import dataclasses
import functools
from typing import Any

import jax

from kernels_pallas import arguments, dispatch, tables, tuned
from kernels_pallas.array_types import AnyArray, Array, Float, Integer
from kernels_pallas.common import check, vary_alike
from kernels_pallas.protocol import cotangents
from kernels_pallas.row_products.call import RowProductsBackend, RowProductsCall
from kernels_pallas.table_gradient import api as table_gradient
from kernels_pallas.tables import Implementation
from kernels_pallas.value_aggregation import api as value_aggregation

BACKENDS = dispatch.Backends[RowProductsBackend](
    "kernels_pallas.row_products",
    {
        "xla": "xla",
        "pallas_tpu": "tpu.backend",
        "pallas_sparsecore": "sparsecore.backend",
        "pallas_gpu": "gpu.backend",
    },
)


def row_products(
    table: Float[AnyArray, "num_values dim"],
    indices: Integer[AnyArray, "num_tokens num_selected"],
    inputs: Float[AnyArray, "num_tokens dim"],
    *,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "num_tokens num_selected"]:
    """Computes the inner product of each token's input with each of its selected rows.

        output[t, k] = <inputs[t], table[indices[t, k]]>

    These are the pre-scores of `value_aggregation`, on their own for tables that are sharded
    by columns: each device multiplies its columns, and an all-reduce sums the products.
    Neither pass holds the [T, K, D] rows of all tokens. `reference.py` says the same in unblocked
    JAX.

    Everything is accumulated in, and the output has, the accumulation dtype: float32, or float64
    if an argument is. Gradients are accumulated likewise and returned in the dtype of their
    argument; that of the table is dense, with repeated ids summed in a fixed order except by "xla"
    on GPU. Reverse-mode differentiable only. Inside `jax.shard_map` it works on the local arrays,
    which may vary over different manual axes; outside, and with NumPy's arrays, as
    `value_aggregation` does.

    Args:
        table: rows of any width; the Pallas backends want those that value aggregation has there.
        indices: ids of the selected rows, in [0, num_values); see `value_aggregation`.
        inputs: what each token brings.
        chunk_size: see `value_aggregation`, as for the arguments that follow.
        implementation: of the forward and the backward pass, one of those of `value_aggregation`.
        platform: what the call will be compiled for.

    Raises:
        ValueError: an argument's rank, shape, dtype or value breaks a rule above; the message names
            the argument, what it got and the rule.
        UnsupportedError: the named implementation cannot take the call; the message says why, and
            calls the table "values", as value aggregation does.
    """
    call = _checked({"table": table, "indices": indices, "inputs": inputs})
    target = dispatch.lowering_platform(platform)
    num_selected, dim = call.indices.shape[1], call.table.shape[1]
    default = tables.default_chunk(num_selected, dim, call.dtype, target)
    asked = arguments.chunk_tokens(chunk_size)
    call = dataclasses.replace(call, chunk_size=asked or default)
    reasons = BACKENDS.unsupported_reasons(call, target)
    chosen = dispatch.choose("row_products", implementation, target, tables.AUTOMATIC, reasons)
    if chosen == "xla" and asked is None:
        # The same rows are fetched as by value aggregation, for which chunks are measured.
        sizes = call.aggregation().sizes
        key = tuned.Key.of("value_aggregation", "xla", "both", sizes, call.table.dtype)
        chunks = tuned.lookup(tuned.Chunks(default), key, platform=target)
        call = dataclasses.replace(call, chunk_size=chunks.chunk_size if chunks else default)
    return arguments.per_device("row_products", _local_products, call, chosen)


def _local_products(call: RowProductsCall, implementation: str) -> Array:
    return _multiply(vary_alike(call), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _multiply(call: RowProductsCall, implementation: str) -> Array:
    return BACKENDS[implementation].forward(call)


def _multiply_fwd(call: RowProductsCall, implementation: str) -> tuple[Array, RowProductsCall]:
    return _multiply(call, implementation), call


def _multiply_bwd(
    implementation: str, call: RowProductsCall, output_grad: Array
) -> tuple[RowProductsCall]:
    # Two operations that share nothing: the one whose result is not used is not compiled.
    table_grad = table_gradient.BACKENDS[implementation].forward(call.table_gradient(output_grad))
    aggregation = call.aggregation(output_grad)
    inputs_grad = value_aggregation.BACKENDS[implementation].forward(aggregation)
    gradients = {"table": table_grad, "inputs": inputs_grad.astype(call.inputs.dtype)}
    return (cotangents(call, gradients),)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def _checked(given: dict[str, Any]) -> RowProductsCall:
    """Returns the arguments as arrays of JAX that fit together."""
    arrays = arguments.as_arrays(RowProductsCall, given)
    table, indices, inputs = arrays["table"], arrays["indices"], arrays["inputs"]
    num_values, dim = table.shape
    tables.check_num_values("table", num_values, indices)
    expected = (indices.shape[0], dim)
    rule = f"[num_tokens, dim] = {expected}"
    check(inputs.shape == expected, "inputs.shape", inputs.shape, rule)
    arguments.check_ids("indices", indices, num_values)
    return RowProductsCall(**arrays)
