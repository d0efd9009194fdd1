"""Memory layers: product-key retrieval, value tables, and lookups in sharded tables."""
