"""The decoder: layers, attention, retrieval, memory, initialisation, transformer."""
