"""Memory layers: retrieval by product keys, the value tables, their exchange between devices."""
