"""The arguments, results and interface of a table-gradient backend."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Array, Float, Int32
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.protocol import Backend, Call, array


class Term(NamedTuple):
    """The terms of the gradient of a table: each selection adds weight x factor to its row."""

    weights: Float[Array, "num_tokens num_selected num_cores"]
    factors: Float[Array, "num_tokens dim"]


class TableRows(NamedTuple):
    """The row-sparse gradient of a table.

    Row r < num_rows of `rows` is the gradient of row ids[r] of the table; all other rows of the
    table have a gradient of zero. The remaining `ids` are num_values, out of bounds, and the
    remaining `rows` are zero, so that `table.at[ids].add(rows, mode="drop")` needs no mask. If
    num_rows > len(ids), max_rows was too small and the rows of the largest ids are missing.
    """

    ids: Int32[Array, "max_rows"]
    num_rows: Int32[Array, ""]
    rows: Float[Array, "max_rows dim"]


@protocol.call
class TableGradientCall(Call):
    """The arguments of `table_gradient`.

    Attributes:
        num_values: rows of the table.
        dtype: of the gradient.
        chunk_size: tokens that "xla" processes at once.
    """

    indices: Int32[AbstractArray, "num_tokens num_selected"] = array(
        "[num_tokens, num_selected]", kind="ids", token_axis=0
    )
    weights: Float[AbstractArray, "num_tokens num_selected num_cores"] = array(
        "[num_tokens, num_selected, num_cores]", token_axis=0
    )
    factors: Float[AbstractArray, "num_tokens dim"] = array("[num_tokens, dim]", token_axis=0)
    num_values: int
    dtype: jnp.dtype
    chunk_size: int = 1

    @property
    def term(self) -> Term:
        """The weights and factors."""
        return Term(self.weights, self.factors)

    @property
    def accumulation_dtype(self) -> jnp.dtype:
        """The dtype of the sums: float32, or float64 if an array or the gradient is."""
        return jnp.result_type(accumulation_dtype(self.weights, self.factors), self.dtype)


@runtime_checkable
class TableGradientBackend(Backend[TableGradientCall, Array], Protocol):
    """A module that implements table gradients.

    `forward` computes the dense gradient, [num_values, dim], in the dtype of the call.
    """

    def rows(self, call: TableGradientCall, max_rows: int) -> TableRows:
        """Computes the row-sparse gradient, in the accumulation dtype."""


@runtime_checkable
class SortedTableGradient(Protocol):
    """A table-gradient backend that sorts the selections once for the gradients of all tables."""

    def dense_gradients(
        self,
        tables: Sequence[Any],
        indices: Int32[Array, "num_tokens num_selected"],
        terms: list[Term],
    ) -> list[Array]:
        """Computes the dense gradient of each table, from its terms, in its dtype."""

    def row_sparse_gradients(
        self,
        indices: Int32[Array, "num_tokens num_selected"],
        num_values: int,
        max_rows: int,
        terms: list[Term],
    ) -> list[TableRows]:
        """Computes the row-sparse gradient of each table in float32."""
