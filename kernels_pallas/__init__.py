"""Sparse-memory operators on JAX arrays. The package is standalone: it depends only on jax."""

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.product_key_top_k.api import product_key_top_k
from kernels_pallas.product_key_top_k.signs import fix_signs
from kernels_pallas.row_products.api import row_products
from kernels_pallas.table_gradient.api import table_gradient, table_gradient_rows
from kernels_pallas.table_gradient.call import TableRows
from kernels_pallas.tables import pack_rows
from kernels_pallas.value_aggregation.activation import activate
from kernels_pallas.value_aggregation.api import (
    value_aggregation,
    value_aggregation_row_gradients,
)
from kernels_pallas.value_aggregation.call import RowGradients

__all__ = [
    "RowGradients",
    "TableRows",
    "UnsupportedError",
    "activate",
    "fix_signs",
    "pack_rows",
    "product_key_top_k",
    "row_products",
    "table_gradient",
    "table_gradient_rows",
    "value_aggregation",
    "value_aggregation_row_gradients",
]
