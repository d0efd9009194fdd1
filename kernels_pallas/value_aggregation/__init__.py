"""Weighted sums of a few rows of a large table, and their gradients."""

from kernels_pallas.value_aggregation.activation import activate
from kernels_pallas.value_aggregation.api import (
    value_aggregation,
    value_aggregation_row_gradients,
)
from kernels_pallas.value_aggregation.call import RowGradients

__all__ = [
    "RowGradients",
    "activate",
    "value_aggregation",
    "value_aggregation_row_gradients",
]
