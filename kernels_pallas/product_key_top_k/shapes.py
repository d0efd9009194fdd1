"""Named workloads of product-key top-k, shared by tests and benchmarks."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call; "ci" shapes are tiny, "model" shapes are those of models and benchmarks."""

    name: str
    tag: Literal["ci", "model"]
    num_tokens: int
    num_keys: int
    shortlist: int
    top_m: int
    key_dim: int
    num_heads: int = 1
    rank: int = 2
    num_cores: int = 2  # 0: additive scores
    query_heads: int = 0  # 0: one per head
    query_ranks: int = 0  # 0: one per rank
    # The first singular value of the summed cores is 2. The paper reports a ratio above 4 to 1; the
    # closer the second value is, the more often the staircase of candidates is not enough.
    second_value: float = 0.15

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operator that are not arrays."""
        return {"top_m": self.top_m, "shortlist": self.shortlist}

    def arguments(self, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
        """Shapes and dtypes of the arrays, by argument name; None where absent.

        `dtype` is that of query and keys; u, v and cores are float32.
        """
        query_heads, query_ranks = self.query_heads or self.num_heads, self.query_ranks or self.rank
        query = (query_heads, 2, query_ranks, self.num_tokens, self.key_dim)
        keys = (self.num_heads, 2, self.rank, self.num_keys, self.key_dim)
        arrays: dict[str, Any] = {
            "query": jax.ShapeDtypeStruct(query, dtype),
            "keys": jax.ShapeDtypeStruct(keys, dtype),
            "u": None,
            "v": None,
            "cores": None,
        }
        if self.num_cores:
            vector = jax.ShapeDtypeStruct((self.num_heads, self.rank), jnp.float32)
            cores = (self.num_cores, self.num_heads, self.rank, self.rank)
            arrays |= {"u": vector, "v": vector, "cores": jax.ShapeDtypeStruct(cores, jnp.float32)}
        return arrays

    def inputs(
        self,
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
        numbers: Literal["normal", "integer"] = "normal",
    ) -> dict[str, Any]:
        """Random arrays by argument name; None where absent.

        "integer" draws small integers. They make every sum exact in float32, so the selection does
        not depend on how scores are computed, and they produce many ties.
        """
        rng = np.random.default_rng(seed)
        integers = numbers == "integer"
        specs = self.arguments(dtype)
        arrays: dict[str, Any] = dict.fromkeys(specs)
        for name in ("query", "keys"):
            shape = specs[name].shape
            drawn = (
                rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape, np.float32)
            )
            scale = self.key_dim**-0.5 if name == "keys" and not integers else 1.0
            arrays[name] = scale * drawn
        if self.num_cores:
            square = (self.num_heads, self.rank, self.rank)
            left, right = (np.linalg.qr(rng.normal(size=square))[0] for _ in range(2))
            singular_values = [2.0] + [self.second_value] * (self.rank - 1)
            core = left * singular_values @ right.swapaxes(1, 2)
            parts = rng.normal(size=(self.num_cores, *square))
            tucker = {
                "u": left[..., 0],
                "v": right[..., 0],
                "cores": parts + (core - parts.sum(axis=0)) / self.num_cores,
            }
            arrays |= {name: np.round(2 * x) if integers else x for name, x in tucker.items()}
        return {
            name: None if x is None else jnp.asarray(x, specs[name].dtype)
            for name, x in arrays.items()
        }


SHAPES = (
    # No size is a multiple of a block size.
    Shape("tucker", "ci", 11, 21, 9, 13, 8, num_heads=2),
    Shape("additive", "ci", 9, 20, 8, 11, 8, rank=1, num_cores=0),
    Shape("one_token", "ci", 1, 10, 3, 9, 8),  # all pairs of the shortlists are chosen
    Shape("shared_query", "ci", 5, 18, 7, 6, 16, num_heads=3, query_heads=1, query_ranks=1),
    # Cores far from rank 1: the selection has to search outside the staircase.
    Shape("doubtful", "ci", 6, 40, 17, 9, 8, num_cores=1, second_value=1.5),
    # UltraMemV2 (arXiv 2508.18756): one head, rank 2, two cores.
    Shape("227M", "model", 8192, 360, 32, 32, 192),
    Shape("1B", "model", 8192, 528, 128, 128, 1024),
    Shape("500M", "model", 8192, 964, 94, 94, 512),
    Shape("120B", "model", 8192, 1696, 128, 256, 1280),
    # A fraction of a second on CPU. Keys are narrow, so that the selection dominates the time, not
    # the products with the keys.
    Shape("cpu_964", "model", 1024, 964, 94, 94, 32),
    Shape("cpu_1696", "model", 512, 1696, 128, 256, 32),
)
PAPER = ("227M", "1B", "500M", "120B")
CPU = ("cpu_964", "cpu_1696")
