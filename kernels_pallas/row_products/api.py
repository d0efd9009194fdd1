"""Inner products of tokens with their selected rows.

This is the derivative of value aggregation with respect to its scores. Value aggregation and its
derivatives are three operations on a table [N, D], ids [T, K], numbers [T, K] and vectors [T, D].
Each computes one of table, numbers and vectors from the other two:

    numbers     vectors[t] . table[ids[t, k]]                       this operator
    vectors     sum over k of numbers[t, k] * table[ids[t, k]]      value aggregation
    table       row n: sum of numbers[t, k] * vectors[t]            table gradient
                over all t, k with ids[t, k] = n

The derivatives of each are the other two.
"""

import dataclasses
import functools
from typing import Any

import jax

from kernels_pallas import arguments, dispatch, tables, tuned
from kernels_pallas.array_types import AnyArray, Array, Float, Integer, UInt32
from kernels_pallas.common import check, match_vma
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
    master: Float[AnyArray, "num_masters dim"] | None = None,
    first_master: Integer[AnyArray, "1"] | None = None,
    packed: UInt32[AnyArray, "num_values words"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "num_tokens num_selected"]:
    """Computes the inner product of each token's input with each of its selected rows.

        output[t, k] = <inputs[t], table[indices[t, k]]>

    These are the pre-scores of `value_aggregation`, as a separate operator for tables that are
    sharded by columns: each device multiplies its columns, and an all-reduce sums the products.
    Neither pass materializes the [T, K, D] rows of all tokens. `reference.py` is the equivalent
    unblocked JAX code.

    Accumulation and output are in float32, or in float64 if an argument is. Gradients are
    accumulated in the same dtype and returned in the dtype of their argument; that of the table is
    dense. Repeated ids are summed in a fixed order, except by "xla" on GPU. Only reverse-mode
    differentiation is supported. Inside `jax.shard_map` the operator works on the local arrays,
    which may vary over different manual axes. Meshes with explicit axes and NumPy arrays are
    handled as in `value_aggregation`.

    Args:
        table: rows of any width; the Pallas backends need the widths that value aggregation needs.
        indices: ids of the selected rows, in [0, num_values); see `value_aggregation`.
        inputs: the input vector of each token.
        master: the trained rows, which get the gradient; see `master_values` there.
        first_master: the row of `table` that is row 0 of the masters.
        packed: `pack_rows(table)`; see `packed_values` there.
        chunk_size: see `value_aggregation`, as for the remaining arguments.
        implementation: for the forward and the backward pass, one of those of `value_aggregation`.
        platform: what the call will be compiled for.

    Raises:
        ValueError: the rank, shape, dtype or value of an argument is invalid; the message names the
            argument, its value and the rule.
        UnsupportedError: the named implementation does not support the call; the message says why.
            It calls the table "values", as value aggregation does.
    """
    arrays = {"table": table, "indices": indices, "inputs": inputs}
    trained = {"master": master, "first_master": first_master}
    call = _checked(arrays | trained | {"packed": packed})
    target = dispatch.lowering_platform(platform)
    num_selected, dim = call.indices.shape[1], call.table.shape[1]
    default = tables.default_chunk(num_selected, dim, call.dtype, target)
    asked = arguments.chunk_tokens(chunk_size)
    call = dataclasses.replace(call, chunk_size=asked or default)
    reasons = BACKENDS.unsupported_reasons(call, target)
    chosen = dispatch.choose("row_products", implementation, target, tables.AUTOMATIC, reasons)
    if chosen == "xla" and asked is None:
        # Value aggregation fetches the same rows, and its chunk size is the one that is tuned.
        sizes = call.aggregation().sizes
        key = tuned.Key.of("value_aggregation", "xla", "both", sizes, call.table.dtype)
        chunks = tuned.lookup(tuned.Chunks(default), key, platform=target)
        call = dataclasses.replace(call, chunk_size=chunks.chunk_size if chunks else default)
    return arguments.per_device("row_products", _local_products, call, chosen)


def _local_products(call: RowProductsCall, implementation: str) -> Array:
    return _multiply(match_vma(call), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _multiply(call: RowProductsCall, implementation: str) -> Array:
    return BACKENDS[implementation].forward(call)


def _multiply_fwd(call: RowProductsCall, implementation: str) -> tuple[Array, RowProductsCall]:
    return _multiply(call, implementation), call


def _multiply_bwd(
    implementation: str, call: RowProductsCall, output_grad: Array
) -> tuple[RowProductsCall]:
    # The two are independent, so XLA removes one whose result is unused.
    with jax.named_scope("table_gradient"):
        sums = table_gradient.BACKENDS[implementation]
        table_grad = sums.forward(call.table_gradient(output_grad))
    aggregation = call.aggregation(output_grad)
    inputs_grad = value_aggregation.BACKENDS[implementation].forward(aggregation)
    trained = "table" if call.master is None else "master"
    gradients = {trained: table_grad, "inputs": inputs_grad.astype(call.inputs.dtype)}
    return (cotangents(call, gradients),)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def _checked(given: dict[str, Any]) -> RowProductsCall:
    """Converts the arguments to JAX arrays and checks that their shapes are consistent."""
    arrays = arguments.as_arrays(RowProductsCall, given)
    table, indices, inputs = arrays["table"], arrays["indices"], arrays["inputs"]
    num_values, dim = table.shape
    tables.check_num_values("table", num_values, indices)
    expected = (indices.shape[0], dim)
    rule = f"[num_tokens, dim] = {expected}"
    check(inputs.shape == expected, "inputs.shape", inputs.shape, rule)
    master, first = arrays["master"], arrays["first_master"]
    check((master is None) == (first is None), "master", "one of two", "given with first_master")
    if master is not None and first is not None:
        check(master.shape[1] == dim, "master.shape", master.shape, f"[num_masters, {dim}]")
        check(first.shape == (1,), "first_master.shape", first.shape, "[1]")
    tables.check_packed("packed", arrays["packed"], table)
    arguments.check_ids("indices", indices, num_values)
    return RowProductsCall(**arrays)
