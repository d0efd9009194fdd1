"""Pallas backend for the SparseCores of a TPU."""
