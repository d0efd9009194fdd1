"""What operators share: chunks of tokens, manual axes of `shard_map`, and checks of arguments."""

import functools
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def scan_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, per_token: Any, chunk_size: int
) -> tuple[Any, Any]:
    """Folds `body(carry, chunk) -> (carry, outputs)` over chunks of the leading axis.

    Tokens beyond the last whole chunk get a call of their own: padding them would send weights of
    zero through table rows that nobody selected, and zero times infinity is not zero.
    """
    num_tokens = jax.tree.leaves(per_token)[0].shape[0]
    if num_tokens <= chunk_size:
        return body(carry, per_token)

    num_chunks = num_tokens // chunk_size
    split = num_chunks * chunk_size
    whole = jax.tree.map(
        lambda x: x[:split].reshape(num_chunks, chunk_size, *x.shape[1:]), per_token
    )
    carry, outputs = lax.scan(body, carry, whole)
    outputs = jax.tree.map(lambda x: x.reshape(split, *x.shape[2:]), outputs)
    if split == num_tokens:
        return carry, outputs
    carry, last = body(carry, jax.tree.map(lambda x: x[split:], per_token))
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, last)


def chunk_tokens(bytes_per_token: int, chunk_bytes: int) -> int:
    """Returns how many tokens a chunk of that many bytes holds, as a power of two."""
    num_tokens = max(1, chunk_bytes // max(1, bytes_per_token))
    # A power of two divides the usual batch, which spares the smaller last chunk.
    return 1 << (num_tokens.bit_length() - 1)


def accumulation_dtype(*arrays: Array | jax.ShapeDtypeStruct | None) -> jnp.dtype:
    """Returns the dtype of sums: float32, or float64 where an array already is."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays if array is not None))


def padded(size: int, multiple: int) -> int:
    """Returns the least multiple that is not below a size."""
    return -(-size // multiple) * multiple


def add_up(terms: Iterable[Array]) -> Array:
    """Returns the sum of terms, from left to right."""
    return functools.reduce(operator.add, terms)


def vary_alike(arrays: Any, others: Any = (), axes: Collection[str] = ()) -> Any:
    """Makes `arrays` vary over `axes` and every manual axis that any of the arguments varies over.

    JAX then sums the gradient of, say, a table that is the same on all devices over the devices
    that hold different tokens; a custom derivative must leave that to its caller.
    """

    def varying(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    wanted = frozenset(axes).union(*map(varying, jax.tree.leaves((arrays, others))))

    def vary(array: Array) -> Array:
        state = jax.typeof(array).manual_axis_type
        missing = wanted - state.varying
        # `pcast` takes axes of one state at a time; over "reduced" ones the gradient is summed
        # outside of `shard_map`.
        for group in (missing & state.reduced, missing - state.reduced):
            if group:
                array = lax.pcast(array, tuple(sorted(group)), to="varying")
        return array

    return jax.tree.map(vary, arrays)


def check(holds: bool, name: str, got: object, rule: str) -> None:
    """Raises ValueError with the name of an argument, what it got and the rule, if it is broken."""
    if not holds:
        raise ValueError(f"{name}: got {got}, must be {rule}")
