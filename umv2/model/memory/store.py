"""Value tables, and the part of them that one memory layer sees."""

import math

from jaxtyping import Array, Float, Int, Key

from umv2.config import ModelConfig
from umv2.model import initialization, layers
from umv2.types import struct


@struct
class ValueStore:
    """All value tables of a model, or one of them; the only owner of these arrays.

    Rows are numbered through all tables. A row is a Pre-value, which gates a selected value by its
    product with the projected input, and a Value, which is added up (Eq. 13-15). `pre_values` is
    None where pre_value_dim is 0.
    """

    values: Float[Array, "*l n v"]
    pre_values: Float[Array, "*l n p"] | None

    @property
    def num_rows(self) -> int:
        """Rows that an index may name."""
        return math.prod(self.values.shape[:-1])


@struct
class StoreWindow:
    """The store as one memory layer sees it: rows from `start` on, wrapping round its end."""

    store: ValueStore
    start: Int[Array, ""] | int


def create_store(config: ModelConfig, *, key: Key[Array, ""]) -> ValueStore:
    """Draws the value tables of all memory layers: [L_mem, N, D_v] and [L_mem, N, D_p]."""
    memory = config.memory
    std = initialization.memory_initialization(config).values_std
    rows = (len(config.placements), memory.num_values)
    pre_values = None
    if memory.pre_value_dim:
        pre_values = layers.normal(key, "pre_values", (*rows, memory.pre_value_dim), std)
    values = layers.normal(key, "values", (*rows, memory.value_dim), std)
    return ValueStore(values=values, pre_values=pre_values)
