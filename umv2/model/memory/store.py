"""Value tables, and the windows of them that memory layers read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from umv2 import kernels, sharding
from umv2.config import MemoryConfig, ModelConfig
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


# Packed values and pre-values; see `TableCopy`.
Packed = tuple[UInt32[Array, "1 ln w"] | None, UInt32[Array, "1 ln x"] | None]


@struct
class TrainedStore:
    """The value tables during training.

    Layers read `copy` (see `read_copy`), which is the same for all microbatches of a step and may
    be in a narrower dtype; `masters` get the gradients.
    """

    masters: ValueStore
    copy: "TableCopy"


@struct
class TableCopy:
    """What layers read of the trained tables: each device's rows of all tables, as one.

    A store of a single table, [1, l n, v] in all. `packed` are its values and pre-values in the
    words that kernels read (`kernels.pack_rows`), each None where none needs it.
    """

    tables: ValueStore
    packed: Packed


def read_copy(store: ValueStore | None, config: ModelConfig) -> TableCopy | None:
    """Returns what layers read of the trained tables, in the dtype of `memory.read_dtype`.

    TPUs pad the rows of each table to whole tiles. There, joining the tables is a copy, which would
    be made again in every layer. The copy is sharded like the tables, so a device has its rows of
    all tables, whatever their global order.
    """
    if store is None:
        return None

    def joined(table: Array) -> Array:
        if config.memory.read_dtype == "compute":
            table = table.astype(config.compute_dtype)
        return table.reshape(1, -1, table.shape[-1])

    def per_device(function: Any, table: Array) -> Any:
        specs = (None, *sharding.spec(table)[-2:]) if sharding.on_mesh() else ()
        return sharding.shard_map(function, table, out_specs=PartitionSpec(*specs))

    def packed(table: Array | None) -> Array | None:
        if table is None or not kernels.reads_packed_rows(table):
            return None
        return per_device(lambda rows: kernels.pack_rows(rows[0])[None], table)

    tables: ValueStore = jax.tree.map(lambda table: per_device(joined, table), store)
    return TableCopy(tables, (packed(tables.values), packed(tables.pre_values)))


@struct
class StoreWindow:
    """The rows of the store that one memory layer reads: from `start`, wrapping around the end.

    In training, `masters` are the trained tables that the layer's gradients belong to, of which
    `store` is a copy; their first table is table `first_master` of the store. `packed` is the copy
    in words.
    """

    store: ValueStore
    start: Int[Array, ""] | int
    masters: ValueStore | None = None
    first_master: Int[Array, ""] | int = 0
    packed: Packed = (None, None)


# One store for all memory layers or, at inference without sharing, one per layer.
Stores = ValueStore | TrainedStore | Sequence[ValueStore] | None


class Windows(NamedTuple):
    """The windows of all memory layers, as fields of `StoreWindow`.

    Attributes:
      shared: fields that are the same for all layers.
      own: fields of each layer, stacked along the leading axis or as a list. Without sharing, they
        include its table (inference) or its master (training): the gradient of a scanned input is
        stacked, not a sum over gradients of all tables.
    """

    shared: dict[str, Any]
    own: dict[str, Any]

    def at(self, own: dict[str, Any]) -> StoreWindow | None:
        """Returns the window of the layer with these fields of its own."""
        return StoreWindow(**self.shared, **own) if own else None


def windows(store: Stores, memory: MemoryConfig, count: int) -> Windows:
    """Returns the windows of `count` memory layers."""
    if store is None:
        return Windows({}, {})
    if not isinstance(store, TrainedStore):
        if not isinstance(store, ValueStore) or memory.sharing == "none":
            return Windows({}, {"store": store, "start": jnp.zeros(count, jnp.int32)})
        reduced = {"store": sharding.defer_gradient_reduction(store)}
        return Windows(reduced, {"start": _shared_starts(memory, count)})
    shared: dict[str, Any] = {"store": store.copy.tables, "packed": store.copy.packed}
    if memory.sharing != "none":
        return Windows(
            shared | {"masters": store.masters}, {"start": _shared_starts(memory, count)}
        )
    tables = jnp.arange(count, dtype=jnp.int32)
    rows = store.masters.num_rows // count
    own = {"start": rows * tables, "masters": store.masters, "first_master": tables}
    return Windows(shared, own)


def _shared_starts(memory: MemoryConfig, count: int) -> Int[Array, " l"]:
    """Returns the first row of each layer's window of shared tables."""
    starts = retrieval.window_starts(count, memory.sharing, memory.share_group)
    return jnp.asarray(starts * memory.num_values, jnp.int32)
