"""On the TensorCores of a TPU."""
