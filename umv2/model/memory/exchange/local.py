"""Value aggregation on one device's shard, and helpers shared by both layouts."""

import math
from typing import Any, Literal, NamedTuple, overload

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped, UInt32

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


class Masters(NamedTuple):
    """The trained tables that the tables of a call are a copy of, which may join them to one.

    They are not read, and get the gradients; the copies get none.

    Attributes:
      tables: this device's shard of the trained values and pre-values, if there are any.
      first_table: [1], the table of the copy that table 0 of the masters is.
      packed: the copy of both, packed for kernels (`kernels.pack_rows`); None where none needs it.
    """

    tables: tuple[Float[Array, "m n v"], Float[Array, "m n p"] | None]
    first_table: Int32[Array, "1"]
    packed: tuple[UInt32[Array, "l n w"] | None, UInt32[Array, "l n x"] | None] = (None, None)

    @property
    def first_row(self) -> Int32[Array, "1"]:
        """The row of the copy that row 0 of the masters is."""
        return self.first_table * self.tables[0].shape[1]


def fault(size: int, sizes: list[int], rule: str) -> str | None:
    """Returns why `size` is not one of the valid `sizes`, naming the nearest, or None if it is."""
    if size in sizes:
        return None
    return f"must divide {rule}; {min(sizes, key=lambda other: abs(other - size))} would do"


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    small = [m for m in range(1, math.isqrt(number) + 1) if number % m == 0]
    return sorted({*small, *(number // m for m in small)})


@jax.named_scope("value_aggregation")
def pool(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p"] | None,
    slots: Int32[Array, "t k"] | None,
    masters: Masters | None,
    options: Options,
) -> Float[Array, "t e"]:
    """Calls `value_aggregation` on this device's rows."""
    trained: dict[str, Any] = {}
    if masters is not None:
        trained = {
            "master_values": flat(masters.tables[0]),
            "first_master": masters.first_row,
            "packed_values": flat(masters.packed[0]),
        }
        if pre_values is not None:
            trained["master_pre_values"] = flat(masters.tables[1])
            trained["packed_pre_values"] = flat(masters.packed[1])
    return kernels.value_aggregation(
        flat(values),
        rows,
        weights,
        pre_values=flat(pre_values),
        pre_inputs=pre_inputs,
        activation=None if pre_values is None else options.activation,
        slots=slots,
        num_slots=options.num_slots,
        chunk_size=options.chunk_size,
        implementation=options.implementation,
        **trained,
    )


@overload
def flat(table: Array) -> Array: ...


@overload
def flat(table: None) -> None: ...


def flat(table: Shaped[Array, "l n d"] | None) -> Shaped[Array, "ln d"] | None:
    """Merges the table axis into the row axis; returns None for None."""
    return None if table is None else table.reshape(-1, table.shape[-1])


def smallest_dtype(num_values: int) -> np.dtype:
    """Returns the smallest integer type that holds 0, ..., num_values - 1."""
    return np.min_scalar_type(num_values - 1)
