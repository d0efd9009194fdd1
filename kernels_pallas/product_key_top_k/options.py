"""What the backends of product-key top-k are told besides the arrays."""

from typing import NamedTuple


class Options(NamedTuple):
    """Arguments of `product_key_top_k` that are known while tracing, checked and complete."""

    top_m: int
    shortlist: int
    chunk_size: int
