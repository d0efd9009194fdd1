"""Sparse-memory operators on JAX arrays, usable on their own: this package imports jax alone."""

from kernels_pallas.value_aggregation.api import value_aggregation

__all__ = ["value_aggregation"]
