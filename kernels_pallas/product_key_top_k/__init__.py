"""The best pairs of row and column keys for each token, and the gradients of their scores."""

from kernels_pallas.product_key_top_k.api import product_key_top_k
from kernels_pallas.product_key_top_k.signs import fix_signs

__all__ = ["fix_signs", "product_key_top_k"]
