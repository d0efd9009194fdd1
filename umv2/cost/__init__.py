"""What a configuration costs: parameters and FLOPs."""
