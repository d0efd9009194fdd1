"""Pallas Mosaic GPU backend, for Hopper GPUs."""
