"""PEER with separate experts for each head (arXiv 2407.04153; separate embeddings per head).

A layer's table has H n^2 rows for H heads, of which head i reads rows [i n^2, (i + 1) n^2).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from umv2.config import ModelConfig
from umv2.config.schema import require
from umv2.model.memory.layer import MemoryLayer
from umv2.model.slots import LayerCost


class OwnExperts(MemoryLayer):
    """A memory layer in which each head selects from its own rows."""

    @classmethod
    def validate(cls, config: ModelConfig) -> None:
        """Raises ConfigError if layers share tables or virtual blocks share rows."""
        memory = config.memory
        rule = f"must be {{}} with model.memory.layer={memory.layer!r}: each head has its own rows"
        require(
            memory.sharing == "none",
            "model.memory.sharing",
            memory.sharing,
            rule.format("'none'"),
        )
        rows = len(config.placements) * cls.table_rows(config)
        require(
            rows < 2**31,
            "model.memory.num_keys",
            memory.num_keys,
            f"gives a store of {rows} rows; int32 ids allow fewer than 2**31",
        )
        require(
            memory.key_expansion == 1,
            "model.memory.key_expansion",
            memory.key_expansion,
            rule.format("1"),
        )

    @classmethod
    def table_rows(cls, config: ModelConfig) -> int:
        """Returns H n^2, the number of rows of one table."""
        return config.memory.num_heads * config.memory.num_values

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns the cost of one layer, in which no two heads select from the same choices."""
        counters = cls.table_rows(config)
        return dataclasses.replace(super().cost(config), num_draws=1, counters=counters)

    def locate(
        self, virtual: Int[Array, "t hk"], start: Int[Array, ""], num_rows: int
    ) -> tuple[Int[Array, "t hk"], Int[Array, "t hk"], Int[Array, "t hk"]]:
        """Maps virtual addresses to (block, row within the window, row of the store)."""
        block, visible, rows = super().locate(virtual, start, num_rows)
        heads = jnp.arange(virtual.shape[1], dtype=jnp.int32) // self.config.top_m
        first = (heads * self.config.num_values)[None, :]
        return block, visible + first, rows + first
