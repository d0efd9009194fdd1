"""Helpers of all operators: chunks of tokens, manual axes of `shard_map`, argument checks."""

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

L2_BYTES = 50 * 2**20  # of an H100 or H200

# Name of the scope around computations that normally do not run, for readers of compiled programs.
RARE = "rarely_runs"


def scan_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, per_token: Any, chunk_size: int
) -> tuple[Any, Any]:
    """Folds `body(carry, chunk) -> (carry, outputs)` over chunks of the leading axis.

    Tokens left over after the last full chunk get a separate call. Padding them instead would
    multiply unselected table rows by zero weights, and zero times infinity is NaN.
    """
    num_tokens = jax.tree.leaves(per_token)[0].shape[0]
    if num_tokens <= chunk_size:
        return body(carry, per_token)

    num_chunks = num_tokens // chunk_size
    split = num_chunks * chunk_size
    full_chunks = jax.tree.map(
        lambda x: x[:split].reshape(num_chunks, chunk_size, *x.shape[1:]), per_token
    )
    carry, outputs = lax.scan(body, carry, full_chunks)
    outputs = jax.tree.map(lambda x: x.reshape(split, *x.shape[2:]), outputs)
    if split == num_tokens:
        return carry, outputs
    carry, last = body(carry, jax.tree.map(lambda x: x[split:], per_token))
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, last)


def chunk_tokens(bytes_per_token: int, chunk_bytes: int) -> int:
    """Returns how many tokens fit in a chunk of `chunk_bytes`, rounded down to a power of two."""
    num_tokens = max(1, chunk_bytes // max(1, bytes_per_token))
    # A power of two divides the usual batch sizes, which avoids a smaller last chunk.
    return 1 << (num_tokens.bit_length() - 1)


def accumulation_dtype(*arrays: Array | jax.ShapeDtypeStruct | None) -> jnp.dtype:
    """Returns the dtype of sums: float64 if any array is float64, else float32."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def padded(size: int, multiple: int) -> int:
    """Rounds `size` up to a multiple."""
    return -(-size // multiple) * multiple


def tiled_bytes(*arrays: Any) -> int:
    """Bytes of row-major arrays in the HBM of a TPU, padded to XLA's tiles: 8 rows of 128 columns.

    Arrays with fewer rows have shorter tiles. A vector has tiles of 128 to 1024 elements.
    """

    def power_of_two(size: int, least: int, most: int) -> int:
        return min(most, max(least, 1 << (size - 1).bit_length()))

    total = 0
    for array in arrays:
        itemsize = jnp.dtype(array.dtype).itemsize
        shape = array.shape
        if len(shape) < 2:
            elements = padded(array.size, power_of_two(array.size, 128, 1024))
        else:
            # Rows of narrower dtypes are packed into 32-bit words.
            tile_rows = power_of_two(shape[-2], max(1, 4 // itemsize), 8)
            elements = padded(shape[-2], tile_rows) * padded(shape[-1], 128)
            elements *= math.prod(shape[:-2])
        total += elements * itemsize
    return total


def add_up(terms: Iterable[Array]) -> Array:
    """Returns the sum of terms, from left to right."""
    return functools.reduce(operator.add, terms)


def match_vma(arrays: Any, others: Any = (), axes: Collection[str] = ()) -> Any:
    """Makes `arrays` vary over `axes` and every manual axis that any argument varies over.

    As a result, JAX sums the gradient of, say, a replicated table over the devices that hold
    different tokens. A custom derivative cannot do this sum itself.
    """

    def varying(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    wanted = frozenset(axes).union(*map(varying, jax.tree.leaves((arrays, others))))

    def vary(array: Array) -> Array:
        state = jax.typeof(array).manual_axis_type
        missing = wanted - state.varying
        # `pcast` takes axes of one state at a time. Over "reduced" axes, the gradient is summed
        # outside `shard_map`.
        for group in (missing & state.reduced, missing - state.reduced):
            if group:
                array = lax.pcast(array, tuple(sorted(group)), to="varying")
        return array

    return jax.tree.map(vary, arrays)


def check(holds: bool, name: str, got: object, rule: str) -> None:
    """Raises ValueError naming an argument, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name}: got {got}, must be {rule}")
