"""Value tables, and the part of them that one memory layer sees."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umv2 import sharding
from umv2.config import MemoryConfig
from umv2.model.memory import retrieval
from umv2.model.parameter import Declaration
from umv2.types import struct

# An abstract store has shapes and dtypes in place of arrays; to type checkers they are the same.
if TYPE_CHECKING:
    Table = Array
else:
    Table = Array | jax.ShapeDtypeStruct

# Of both arrays of a store.
TABLE = Declaration(axes=("table", "row", "column"), group="values", served="compute")


@struct
class ValueStore:
    """All value tables of a model, or one of them; the only owner of these arrays.

    Rows are numbered through all tables. A row is a Pre-value, which gates a selected value by its
    product with the projected input, and a Value, which is added up (Eq. 13-15). `pre_values` is
    None where pre_value_dim is 0.
    """

    values: Float[Table, "*l n v"]
    pre_values: Float[Table, "*l n p"] | None

    @property
    def num_rows(self) -> int:
        """Rows that an index may name."""
        return math.prod(self.values.shape[:-1])


@struct
class StoreWindow:
    """The store as one memory layer sees it: rows from `start` on, wrapping round its end."""

    store: ValueStore
    start: Int[Array, ""] | int


# Where nothing is shared, memory layers may have a store each (inference).
Stores = ValueStore | Sequence[ValueStore] | None


class Windows(NamedTuple):
    """The windows of all memory layers.

    Attributes:
      shared: the store that all see, or None.
      own: what each layer has for itself, along the first axis or as a list: the first row of its
        window and, where nothing is shared, its table. It is a slice of a scanned input then, so
        that its gradient is a slice too, and not a sum of gradients of all tables.
    """

    shared: ValueStore | None
    own: dict[str, Any]

    def at(self, own: dict[str, Any]) -> StoreWindow | None:
        """Returns the window of the layer that has this for itself."""
        if not own:
            return None
        return StoreWindow(store=self.shared or own["table"], start=own["start"])


def windows(store: Stores, memory: MemoryConfig, count: int) -> Windows:
    """Returns the windows of `count` memory layers."""
    if store is None:
        return Windows(None, {})
    if not isinstance(store, ValueStore) or memory.sharing == "none":
        return Windows(None, {"table": store, "start": jnp.zeros(count, jnp.int32)})
    starts = retrieval.window_starts(count, memory.sharing, memory.share_group)
    first_rows = jnp.asarray(starts * memory.num_values, jnp.int32)
    return Windows(sharding.defer_gradient_reduction(store), {"start": first_rows})
