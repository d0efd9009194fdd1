"""Causal self-attention: the layer, its key-value cache, and its implementations."""

from umv2.model.attention.cache import KeyValueCache
from umv2.model.attention.layer import Attention

__all__ = ["Attention", "KeyValueCache"]
