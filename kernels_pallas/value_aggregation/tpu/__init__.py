"""Pallas backend for the TensorCores of a TPU."""
