"""Weighted sums of a few rows of a large table, and their gradients."""

from kernels_pallas.value_aggregation.api import value_aggregation

__all__ = ["value_aggregation"]
