"""PEER whose heads have experts of their own (arXiv 2407.04153; separate embeddings per head).

Head i reads rows [i n^2, (i + 1) n^2) of its layer's table, which has that many times as many.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from umv2.config import ModelConfig
from umv2.config.schema import require
from umv2.model.memory.layer import MemoryLayer
from umv2.model.slots import LayerCost


class OwnExperts(MemoryLayer):
    """A memory layer each of whose heads selects from rows of its own."""

    @classmethod
    def validate(cls, config: ModelConfig) -> None:
        """Raises ConfigError where layers share tables, or blocks share rows."""
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
            f"gives a store of {rows} rows; ids are int32, so fewer than 2**31",
        )
        require(
            memory.key_expansion == 1,
            "model.memory.key_expansion",
            memory.key_expansion,
            rule.format("1"),
        )

    @classmethod
    def table_rows(cls, config: ModelConfig) -> int:
        """Returns H n^2, the rows of one table."""
        return config.memory.num_heads * config.memory.num_values

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns what one layer costs: of the choices of a head, one draw is made."""
        counters = cls.table_rows(config)
        return dataclasses.replace(super().cost(config), num_draws=1, counters=counters)

    def locate(
        self, virtual: Int[Array, "t hk"], start: Int[Array, ""], num_rows: int
    ) -> tuple[Int[Array, "t hk"], Int[Array, "t hk"], Int[Array, "t hk"]]:
        """Returns block, row as counted and row as stored of each address."""
        block, visible, rows = super().locate(virtual, start, num_rows)
        heads = jnp.arange(virtual.shape[1], dtype=jnp.int32) // self.config.top_m
        first = (heads * self.config.num_values)[None, :]
        return block, visible + first, rows + first
