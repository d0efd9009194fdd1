"""What a backend of value aggregation takes, returns and has."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Array, Float, Int32
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.protocol import Backend, Call, array
from kernels_pallas.table_gradient.call import TableRows, Term
from kernels_pallas.value_aggregation.reference import Activation


@protocol.call
class AggregationCall(Call):
    """The arguments of `value_aggregation`.

    Attributes:
        activation: applied to the pre-scores.
        num_slots: outputs a token; 1 without slots.
        chunk_size: tokens that "xla" processes at once.
    """

    values: Float[AbstractArray, "num_values value_dim"] = array("[num_values, value_dim]")
    indices: Int32[AbstractArray, "num_tokens num_selected"] = array(
        "[num_tokens, num_selected]", kind="ids", token_axis=0
    )
    scores: Float[AbstractArray, "num_tokens num_selected num_cores"] = array(
        "[num_tokens, num_selected, num_cores]", token_axis=0
    )
    pre_values: Float[AbstractArray, "num_values pre_value_dim"] | None = array(
        "[num_values, pre_value_dim]", default=None
    )
    pre_inputs: Float[AbstractArray, "num_tokens pre_value_dim"] | None = array(
        "[num_tokens, pre_value_dim]", token_axis=0, default=None
    )
    slots: Int32[AbstractArray, "num_tokens num_selected"] | None = array(
        "[num_tokens, num_selected]", kind="ids", token_axis=0, default=None
    )
    activation: Activation | None = None
    num_slots: int = 1
    chunk_size: int = 1

    @property
    def dtype(self) -> jnp.dtype:
        """That of accumulation and of the output: float32, or float64 where an array is."""
        return accumulation_dtype(self.values, self.scores, self.pre_values, self.pre_inputs)

    @property
    def tables(self) -> dict[str, Array]:
        """Values and, where there are any, pre-values."""
        return {n: x for n, x in self.arrays.items() if n in ("values", "pre_values")}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name, for the key under which blocks are measured."""
        num_tokens, num_selected, num_cores = self.scores.shape
        return {
            "num_tokens": num_tokens,
            "num_selected": num_selected,
            "num_values": self.values.shape[0],
            "value_dim": self.values.shape[1],
            "pre_value_dim": 0 if self.pre_values is None else self.pre_values.shape[1],
            "num_cores": num_cores,
            "num_slots": self.num_slots,
        }


class RowGradients(NamedTuple):
    """Gradients of the arguments of `value_aggregation`, those of the tables row by row.

    Rows r < num_rows are the gradients of row ids[r] of the tables; all other rows of the tables
    have none. The rest of `ids` is num_values, out of bounds, and of `values` and `pre_values` zero
    so that `table.at[ids].add(values, mode="drop")` needs no mask. num_rows > len(ids) means that
    max_rows was too small: then the rows of the largest ids are missing.
    """

    ids: Int32[Array, "max_rows"]
    num_rows: Int32[Array, ""]
    values: Float[Array, "max_rows value_dim"]
    pre_values: Float[Array, "max_rows pre_value_dim"] | None
    scores: Float[Array, "num_tokens num_selected num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None


class TokenGradients(NamedTuple):
    """What selected rows are needed for: a token's own gradients, and terms of the tables' ones.

    Attributes:
        scores: gradient of the scores, in the accumulation dtype.
        pre_inputs: that of the pre-inputs, if there are any.
        terms: what the gradients of values, and of pre-values, are sums of.
    """

    scores: Float[Array, "num_tokens num_selected num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None
    terms: list[Term]

    def with_tables(self, call: AggregationCall, gradients: list[Array]) -> dict[str, Array]:
        """Returns all gradients of a call by name, each in the dtype of its argument."""
        found = dict(zip(call.tables, gradients, strict=True)) | {"scores": self.scores}
        if self.pre_inputs is not None:
            found["pre_inputs"] = self.pre_inputs
        return {name: gradient.astype(call.arrays[name].dtype) for name, gradient in found.items()}

    def with_rows(self, tables: list[TableRows]) -> RowGradients:
        """Returns all gradients, those of the tables row by row."""
        values, *others = tables
        pre_values = others[0].rows if others else None
        return RowGradients(
            values.ids, values.num_rows, values.rows, pre_values, self.scores, self.pre_inputs
        )


@runtime_checkable
class AggregationBackend(Backend[AggregationCall, Array], Protocol):
    """A module that implements value aggregation."""

    def backward(
        self,
        call: AggregationCall,
        output_grad: Float[Array, "num_tokens output_dim"],
    ) -> dict[str, Array]:
        """Computes the gradients of the tables, scores and pre-inputs, each in its own dtype."""

    def row_gradients(
        self,
        call: AggregationCall,
        output_grad: Float[Array, "num_tokens output_dim"],
        max_rows: int,
    ) -> RowGradients:
        """Computes the same in the accumulation dtype, those of the tables row by row."""
