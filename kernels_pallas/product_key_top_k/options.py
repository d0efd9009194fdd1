"""What the backends of product-key top-k are told besides the arrays."""

from typing import NamedTuple


class Options(NamedTuple):
    """Arguments of `product_key_top_k` that are known while tracing, checked and complete.

    Attributes:
        with_chosen: whether a backward pass will need S of the chosen keys. It is not written else.
    """

    top_m: int
    shortlist: int
    chunk_size: int
    with_chosen: bool = True
