"""Sparse-memory operators on JAX arrays, usable on their own: this package imports jax alone."""

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.product_key_top_k.api import product_key_top_k
from kernels_pallas.value_aggregation.activation import activate
from kernels_pallas.value_aggregation.api import (
    value_aggregation,
    value_aggregation_row_gradients,
)
from kernels_pallas.value_aggregation.row_products import row_products
from kernels_pallas.value_aggregation.table_gradient import RowGradients

__all__ = [
    "RowGradients",
    "UnsupportedError",
    "activate",
    "product_key_top_k",
    "row_products",
    "value_aggregation",
    "value_aggregation_row_gradients",
]
