"""The arguments, results and interface of a product-key top-k backend."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from kernels_pallas import protocol
from kernels_pallas.array_types import AbstractArray, Array, Float, Int32
from kernels_pallas.common import accumulation_dtype
from kernels_pallas.protocol import Backend, Call, array


@protocol.call
class TopKCall(Call):
    """The arguments of `product_key_top_k`.

    Attributes:
        top_m: number of pairs to choose for each token and head.
        shortlist: number of candidates per side.
        chunk_size: tokens that "xla" processes at once.
    """

    query: Float[AbstractArray, "query_heads 2 query_ranks num_tokens key_dim"] = array(
        "[num_heads or 1, 2, rank or 1, num_tokens, key_dim]", token_axis=3
    )
    keys: Float[AbstractArray, "num_heads 2 rank num_keys key_dim"] = array(
        "[num_heads, 2, rank, num_keys, key_dim]"
    )
    u: Float[AbstractArray, "num_heads rank"] | None = array("[num_heads, rank]", default=None)
    v: Float[AbstractArray, "num_heads rank"] | None = array("[num_heads, rank]", default=None)
    cores: Float[AbstractArray, "num_cores num_heads rank rank"] | None = array(
        "[num_cores, num_heads, rank, rank]", default=None
    )
    top_m: int
    shortlist: int
    chunk_size: int = 1

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the scores: float32, or float64 if query or keys are."""
        return accumulation_dtype(self.query, self.keys)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name, for the key of tuned blocks."""
        num_heads, _, rank, num_keys, key_dim = self.keys.shape
        return {
            "num_tokens": self.query.shape[3],
            "num_keys": num_keys,
            "shortlist": self.shortlist,
            "top_m": self.top_m,
            "key_dim": key_dim,
            "num_heads": num_heads,
            "rank": rank,
            "num_cores": 0 if self.cores is None else self.cores.shape[0],
            "query_heads": self.query.shape[0],
            "query_ranks": self.query.shape[2],
        }


class TopK(NamedTuple):
    """The results of `product_key_top_k`, and the residuals of its backward pass.

    Attributes:
        scores: of each chosen pair, by core.
        addresses: of the pairs, row * num_keys + column.
        chosen: S of the keys of the chosen pairs, or None if not requested.
    """

    scores: Float[Array, "num_tokens pairs cores"]
    addresses: Int32[Array, "num_tokens pairs"]
    chosen: Float[Array, "num_tokens 2 num_heads rank top_m"] | None


@runtime_checkable
class TopKBackend(Backend[TopKCall, TopK], Protocol):
    """A module that implements product-key top-k."""

    def forward(self, call: TopKCall, with_chosen: bool = False) -> TopK:
        """Computes the results; `chosen`, which a backward pass needs, only on request."""

    def backward(
        self,
        call: TopKCall,
        addresses: Int32[Array, "num_tokens pairs"],
        chosen: Float[Array, "num_tokens 2 num_heads rank top_m"],
        scores_grad: Float[Array, "num_tokens pairs cores"],
    ) -> dict[str, Array]:
        """Computes the gradients of query, keys and cores, each in its own dtype, by name.

        Args:
            call: the arguments of `forward`.
            addresses: as returned by `forward`.
            chosen: as returned by `forward`.
            scores_grad: the gradient of the scores returned by `forward`.
        """
