"""UltraMemV2 memory-layer language models in JAX."""

__version__ = "0.1.0"
