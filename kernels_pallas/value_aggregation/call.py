"""The arguments, results and interface of a value-aggregation backend."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Array, Float, Int32, UInt32
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.protocol import Backend, Call, array
from kernels_pallas.table_gradient.call import SortedTableGradient, Term
from kernels_pallas.value_aggregation.reference import Activation


@protocol.call
class AggregationCall(Call):
    """The arguments of `value_aggregation`.

    Attributes:
        activation: applied to the pre-scores.
        num_slots: number of slots per token; 1 without `slots`.
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
    master_values: Float[AbstractArray, "num_masters value_dim"] | None = array(
        "[num_masters, value_dim]", default=None
    )
    master_pre_values: Float[AbstractArray, "num_masters pre_value_dim"] | None = array(
        "[num_masters, pre_value_dim]", default=None
    )
    first_master: Int32[AbstractArray, "1"] | None = array("[1]", kind="ids", default=None)
    packed_values: UInt32[AbstractArray, "num_values value_words"] | None = array(
        "[num_values, value_words]", kind="words", default=None
    )
    packed_pre_values: UInt32[AbstractArray, "num_values pre_value_words"] | None = array(
        "[num_values, pre_value_words]", kind="words", default=None
    )
    activation: Activation | None = None
    num_slots: int = 1
    chunk_size: int = 1

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of accumulation and output: float32, or float64 if an array is."""
        floats = (self.values, self.scores, self.pre_values, self.pre_inputs)
        return accumulation_dtype(*floats, self.master_values, self.master_pre_values)

    @property
    def tables(self) -> dict[str, AbstractArray]:
        """Values and, if present, pre-values."""
        return {n: x for n, x in self.arrays.items() if n in ("values", "pre_values")}

    @property
    def packed(self) -> dict[str, AbstractArray]:
        """The packed copies of values and pre-values, as far as they were given."""
        names = {"packed_values": "values", "packed_pre_values": "pre_values"}
        return {names[name]: array for name, array in self.arrays.items() if name in names}

    @property
    def trained(self) -> dict[str, AbstractArray]:
        """The arrays that get the gradients of values and pre-values: their masters, if present."""
        masters = self.master_values is not None
        return {
            name: self.arrays[name]
            for name in (f"master_{table}" if masters else table for table in self.tables)
        }

    @property
    def trained_indices(self) -> Int32[Array, "num_tokens num_selected"]:
        """The indices, as rows of the trained arrays."""
        if self.first_master is None:
            return self.indices
        return self.indices - self.first_master[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name, for the key of tuned blocks."""
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
    """Gradients of the arguments of `value_aggregation`; those of the tables are row-sparse.

    Row r < num_rows is the gradient of row ids[r] of the tables; all other rows of the tables have
    a gradient of zero. The remaining `ids` are num_values, out of bounds, and the remaining rows of
    `values` and `pre_values` are zero, so that `table.at[ids].add(values, mode="drop")` needs no
    mask. If num_rows > len(ids), max_rows was too small: the rows of the largest ids are missing.
    """

    ids: Int32[Array, "max_rows"]
    num_rows: Int32[Array, ""]
    values: Float[Array, "max_rows value_dim"]
    pre_values: Float[Array, "max_rows pre_value_dim"] | None
    scores: Float[Array, "num_tokens num_selected num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None


class TokenGradients(NamedTuple):
    """The per-token gradients, which need the selected rows, and the terms of the table gradients.

    Attributes:
        scores: gradient of the scores, in the accumulation dtype.
        pre_inputs: gradient of the pre-inputs, if there are any.
        terms: the terms of the gradients of values and, if present, of pre-values.
    """

    scores: Float[Array, "num_tokens num_selected num_cores"]
    pre_inputs: Float[Array, "num_tokens pre_value_dim"] | None
    terms: list[Term]

    def backward(
        self, call: AggregationCall, table_gradient: SortedTableGradient
    ) -> dict[str, Array]:
        """Sums the table gradients densely; returns all gradients as `AggregationBackend.backward`.

        Args:
            call: the call whose gradients these are.
            table_gradient: the backend that sums the terms.
        """
        tables = call.trained
        with jax.named_scope("table_gradient"):
            sums = table_gradient.dense_gradients(
                list(tables.values()), call.trained_indices, self.terms
            )
        gradients = dict(zip(tables, sums, strict=True)) | {"scores": self.scores}
        if self.pre_inputs is not None:
            gradients["pre_inputs"] = self.pre_inputs
        return {name: grad.astype(call.arrays[name].dtype) for name, grad in gradients.items()}

    def row_gradients(
        self, call: AggregationCall, max_rows: int, table_gradient: SortedTableGradient
    ) -> RowGradients:
        """Sums the table gradients row by row; returns all as `AggregationBackend.row_gradients`.

        Args:
            call: the call whose gradients these are.
            max_rows: capacity for gradient rows.
            table_gradient: the backend that sums the terms.
        """
        num_values = call.values.shape[0]
        values, *others = table_gradient.row_sparse_gradients(
            call.indices, num_values, max_rows, self.terms
        )
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
        """Computes the same in the accumulation dtype, with row-sparse table gradients."""
