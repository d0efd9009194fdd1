"""The arguments of a row-products backend."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Array, Float, Int32, UInt32
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.protocol import Backend, Call, array
from kernels_pallas.table_gradient.call import TableGradientCall
from kernels_pallas.value_aggregation.call import AggregationCall


@protocol.call
class RowProductsCall(Call):
    """The arguments of `row_products`.

    Attributes:
        chunk_size: tokens that "xla" processes at once.
    """

    table: Float[AbstractArray, "num_values dim"] = array("[num_values, dim]")
    indices: Int32[AbstractArray, "num_tokens num_selected"] = array(
        "[num_tokens, num_selected]", kind="ids", token_axis=0
    )
    inputs: Float[AbstractArray, "num_tokens dim"] = array("[num_tokens, dim]", token_axis=0)
    master: Float[AbstractArray, "num_masters dim"] | None = array(
        "[num_masters, dim]", default=None
    )
    first_master: Int32[AbstractArray, "1"] | None = array("[1]", kind="ids", default=None)
    packed: UInt32[AbstractArray, "num_values words"] | None = array(
        "[num_values, words]", kind="words", default=None
    )
    chunk_size: int = 1

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of accumulation and output: float32, or float64 if an array is."""
        return accumulation_dtype(self.table, self.inputs, self.master)

    def aggregation(
        self, numbers: Float[AbstractArray, "num_tokens num_selected"] | None = None
    ) -> AggregationCall:
        """Returns the value aggregation of the same rows, weighted by `numbers`.

        This operator is its derivative with respect to `numbers` and does not depend on their
        values: by default they are only a shape and a dtype.
        """
        shape = (*self.indices.shape, 1)
        scores: Any = jax.ShapeDtypeStruct(shape, self.dtype)
        if numbers is not None:
            scores = numbers.reshape(shape)
        return AggregationCall(
            values=self.table,
            indices=self.indices,
            scores=scores,
            packed_values=self.packed,
            chunk_size=self.chunk_size,
        )

    def table_gradient(self, numbers: Float[Array, "num_tokens num_selected"]) -> TableGradientCall:
        """Returns the table-gradient call for `numbers`, the gradient of the output."""
        first, trained = self.first_master, self.table if self.master is None else self.master
        return TableGradientCall(
            indices=self.indices if first is None else self.indices - first[0],
            weights=numbers[:, :, None],
            factors=self.inputs,
            num_values=trained.shape[0],
            dtype=trained.dtype,
            chunk_size=self.chunk_size,
        )


type RowProductsBackend = Backend[RowProductsCall, Array]
