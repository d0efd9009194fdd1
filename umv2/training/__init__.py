"""Training: the loop, its state, optimizer, losses, checkpoints and metrics."""
