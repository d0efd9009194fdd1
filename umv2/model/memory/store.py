"""Value tables, and the windows of them that memory layers read."""

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

# An abstract store has ShapeDtypeStructs instead of arrays; type checkers see arrays in both.
if TYPE_CHECKING:
    Table = Array
else:
    Table = Array | jax.ShapeDtypeStruct

# The declaration of both arrays of a store.
TABLE = Declaration(axes=("table", "row", "column"), group="values", served="compute")


@struct
class ValueStore:
    """All value tables of a model, or one of them; the only owner of these arrays.

    Rows are numbered consecutively across tables. Each row has a value, which is summed into the
    output, and a pre-value, whose inner product with the projected input gates that value
    (Eq. 13-15). `pre_values` is None if pre_value_dim is 0.
    """

    values: Float[Table, "*l n v"]
    pre_values: Float[Table, "*l n p"] | None

    @property
    def num_rows(self) -> int:
        """Number of rows in all tables."""
        return math.prod(self.values.shape[:-1])


@struct
class StoreWindow:
    """The rows of the store that one memory layer reads: from `start`, wrapping around the end."""

    store: ValueStore
    start: Int[Array, ""] | int


# One store for all memory layers or, at inference without sharing, one per layer.
Stores = ValueStore | Sequence[ValueStore] | None


class Windows(NamedTuple):
    """The windows of all memory layers.

    Attributes:
      shared: the store that all layers read, or None if each layer has its own table.
      own: per-layer inputs, stacked along the leading axis or as a list: the first row of the
        layer's window and, without sharing, its table. The table is then a slice of a scanned
        input, so its gradient is a slice too, rather than a sum over gradients of all tables.
    """

    shared: ValueStore | None
    own: dict[str, Any]

    def at(self, own: dict[str, Any]) -> StoreWindow | None:
        """Returns the window of the layer with these per-layer inputs."""
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
