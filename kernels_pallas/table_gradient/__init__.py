"""Gradients of tables: the sum of weight x factor over the selections of each row."""

from kernels_pallas.table_gradient.api import table_gradient, table_gradient_rows
from kernels_pallas.table_gradient.call import TableRows

__all__ = ["TableRows", "table_gradient", "table_gradient_rows"]
