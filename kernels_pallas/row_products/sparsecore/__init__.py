"""On the SparseCores of a TPU."""
