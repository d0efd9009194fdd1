"""Inner products of tokens with their selected rows of a table."""

from kernels_pallas.row_products.api import row_products

__all__ = ["row_products"]
