"""Products of tokens with their selected rows: the derivative of value aggregation by its scores.

Value aggregation and its derivatives are three operations, on a table [N, D], ids [T, K], numbers
[T, K] and vectors [T, D]. Each makes one of table, numbers and vectors from the other two:

    numbers     vectors[t] . table[ids[t, k]]                       this operator
    vectors     sum over k of numbers[t, k] * table[ids[t, k]]      value aggregation
    table       row n: the sum of numbers[t, k] * vectors[t] over all ids[t, k] = n

So every backend of value aggregation has what is needed, forward and backward.
"""

import functools
from typing import Any

import jax

from kernels_pallas import arguments, dispatch
from kernels_pallas.arguments import Argument
from kernels_pallas.array_types import AnyArray, Array, Float, Integer
from kernels_pallas.common import check, vary_alike
from kernels_pallas.value_aggregation.api import (
    BACKENDS,
    Implementation,
    check_num_values,
    choose,
)
from kernels_pallas.value_aggregation.options import Options
from kernels_pallas.value_aggregation.reference import accumulation_dtype


def row_products(
    table: Float[AnyArray, "num_values dim"],
    indices: Integer[AnyArray, "num_tokens top_m"],
    inputs: Float[AnyArray, "num_tokens dim"],
    *,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    platform: dispatch.Platform | None = None,
) -> Float[Array, "num_tokens top_m"]:
    """Computes the inner product of each token's input with each of its selected rows.

        output[t, k] = <inputs[t], table[indices[t, k]]>

    These are the pre-scores of `value_aggregation`, on their own for tables whose columns are
    divided over devices: each device multiplies its columns, and the products are then summed.
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
    arrays = _checked_arrays(table, indices, inputs)
    table, indices, inputs = arrays.values()
    scores = jax.ShapeDtypeStruct((*indices.shape, 1), accumulation_dtype(table, inputs))
    chosen, options = choose(
        "row_products",
        (table, indices, scores, None, None, None),
        (None, 1, arguments.chunk_tokens(chunk_size)),
        (implementation, platform),
    )
    return arguments.per_device(
        "row_products",
        _local_products,
        arrays,
        (options, chosen),
        token_axes={"indices": 0, "inputs": 0},
    )


def _local_products(
    table: Array, indices: Array, inputs: Array, options: Options, implementation: str
) -> Array:
    return _multiply(*vary_alike((table, indices, inputs)), options, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _multiply(
    table: Array, indices: Array, inputs: Array, options: Options, implementation: str
) -> Array:
    return BACKENDS[implementation].row_products(table, indices, inputs, options)


def _multiply_fwd(*args: Any) -> tuple[Array, Any]:
    return _multiply(*args), args[:3]


def _multiply_bwd(
    options: Options, implementation: str, residuals: Any, output_grad: Array
) -> tuple[Array, None, Array]:
    table, indices, inputs = residuals
    backend, scores = BACKENDS[implementation], output_grad[:, :, None]
    # Two operations that share nothing: the one whose result is not used is not compiled.
    table_grad = backend.table_gradient(table, indices, scores, inputs, options)
    inputs_grad = backend.forward(table, indices, scores, None, None, None, options)
    return table_grad, None, inputs_grad.astype(inputs.dtype)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def _checked_arrays(table: Any, indices: Any, inputs: Any) -> dict[str, Any]:
    """Returns the arguments as arrays of JAX that fit together, by name."""
    arrays = arguments.as_arrays(
        {
            "table": Argument(table, "[num_values, dim]"),
            "indices": Argument(indices, "[num_tokens, top_m]", "ids"),
            "inputs": Argument(inputs, "[num_tokens, dim]"),
        }
    )
    table, indices, inputs = arrays.values()
    num_values, dim = table.shape
    check_num_values("table", num_values, indices)
    expected = (indices.shape[0], dim)
    rule = f"[num_tokens, dim] = {expected}"
    check(inputs.shape == expected, "inputs.shape", inputs.shape, rule)
    arguments.check_ids("indices", indices, num_values)
    return arrays
