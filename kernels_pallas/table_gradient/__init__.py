"""Gradients of tables: what the selections of each row add to it."""

from kernels_pallas.table_gradient.api import table_gradient, table_gradient_rows
from kernels_pallas.table_gradient.call import TableRows

__all__ = ["TableRows", "table_gradient", "table_gradient_rows"]
