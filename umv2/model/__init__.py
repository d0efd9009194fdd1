"""The decoder: dense layers, attention, memory layers, mixture of experts, transformer."""
