"""On Hopper GPUs, in Pallas Mosaic GPU."""
