"""The best pairs of row and column keys of each token, and the gradients of their scores."""

from kernels_pallas.product_key_top_k.api import product_key_top_k

__all__ = ["product_key_top_k"]
