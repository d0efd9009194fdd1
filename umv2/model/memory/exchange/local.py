"""Value aggregation on one device's shard, and helpers shared by both layouts."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from umv2 import kernels

Activation = Literal["gelu", "silu", "relu"] | None


class Options(NamedTuple):
    """The static arguments of `aggregate`; hashable."""

    axis: str
    activation: Activation
    num_slots: int
    chunk_size: int | None
    implementation: str
    dtype: DTypeLike


def fault(size: int, sizes: list[int], rule: str) -> str | None:
    """Returns why `size` is not one of the valid `sizes`, naming the nearest, or None if it is."""
    if size in sizes:
        return None
    return f"must divide {rule}; {min(sizes, key=lambda other: abs(other - size))} would do"


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    small = [m for m in range(1, math.isqrt(number) + 1) if number % m == 0]
    return sorted({*small, *(number // m for m in small)})


def pool(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p"] | None,
    slots: Int32[Array, "t k"] | None,
    options: Options,
) -> Float[Array, "t e"]:
    """Calls `value_aggregation` on this device's rows."""
    return kernels.value_aggregation(
        flat(values),
        rows,
        weights,
        pre_values=None if pre_values is None else flat(pre_values),
        pre_inputs=pre_inputs,
        activation=None if pre_values is None else options.activation,
        slots=slots,
        num_slots=options.num_slots,
        chunk_size=options.chunk_size,
        implementation=options.implementation,
    )


def flat(table: Float[Array, "l n d"]) -> Float[Array, "ln d"]:
    """Merges the table axis into the row axis."""
    return table.reshape(-1, table.shape[-1])


def smallest_dtype(num_values: int) -> np.dtype:
    """Returns the smallest integer type that holds 0, ..., num_values - 1."""
    return np.min_scalar_type(num_values - 1)
