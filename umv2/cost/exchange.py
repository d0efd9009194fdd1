"""Cost of sharded value tables: bytes communicated, and bytes of memory per device.

Mirrors the collectives of `umv2.model.memory.exchange`. Counts the bytes that one device receives
over the mesh axis `memory` if every collective moves the minimum; tests compare them with compiled
programs. For the layout "rows", selections beyond the capacity of the first round are not counted:
a balanced load needs no second round.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from absl import logging

from umv2 import sharding
from umv2.config import Config, ConfigError, MemoryConfig, ModelConfig, ResolvedMesh
from umv2.cost import accounting
from umv2.model.memory import exchange
from umv2.model.slots import memory_layer

Layout = Literal["columns", "rows"]

# A TPU pads a float32 table to tiles of this many rows and columns.
_TILE_ROWS, _TILE_COLUMNS = 8, 128
_MOMENTS = 2  # of AdamW, in float32 like the tables


@dataclasses.dataclass(frozen=True)
class ExchangedBytes:
    """Bytes that one device receives in one memory layer, by collective."""

    forward: Mapping[str, int]
    backward: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes of a training step."""
        return sum(self.forward.values()) + sum(self.backward.values())


def exchanged_bytes(
    memory: MemoryConfig,
    layout: Layout,
    *,
    size: int,
    num_tokens: int,
    itemsize: int,
    remat: bool,
) -> ExchangedBytes:
    """Counts the bytes that one device receives in one memory layer.

    Args:
      memory: sizes of the layer.
      layout: of the tables.
      size: M, devices along the axis that shards the tables.
      num_tokens: tokens per device in one pass.
      itemsize: bytes of an element of the compute dtype.
      remat: whether the backward pass recomputes the forward pass, collectives included.
    """
    forward: collections.Counter[str] = collections.Counter()
    backward: collections.Counter[str] = collections.Counter()

    def count(name: str, operand: int, gradient: str = "") -> None:
        """Counts a collective on `operand` bytes per device, and the collective of its gradient."""
        forward[name] += _received(name, operand, size)
        if gradient == "reduce-scatter":  # of what was gathered
            operand *= size
        elif gradient == "all-gather":  # of the part that was kept
            operand //= size
        if gradient:
            backward[gradient] += _received(gradient, operand, size)

    selections, int32 = num_tokens * memory.num_selected, accounting.INT32_BYTES
    if layout == "columns":
        count("all-gather", selections * int32)  # ids
        if memory.num_slots > 1:
            count("all-gather", selections * exchange.smallest_dtype(memory.num_slots).itemsize)
        if memory.pre_value_dim:
            count("all-to-all", num_tokens * memory.pre_value_dim * itemsize, "all-to-all")
            count("reduce-scatter", size * selections * itemsize, "all-gather")  # pre-scores
        weights = selections * itemsize
        if memory.num_cores == 1:
            count("all-gather", weights, "reduce-scatter")
        else:
            weights *= size * exchange.own_cores(memory.num_cores, size)
            count("all-to-all", weights, "all-to-all")
        pooled = num_tokens * memory.num_slots * memory.value_dim * itemsize
        count("all-to-all", pooled, "all-to-all")
    else:
        groups = exchange.groups(num_tokens, memory.num_selected, memory.num_slots, size)
        sent = size * groups.capacity  # groups
        count("all-reduce", int32)  # the number of rounds
        count("all-to-all", sent * groups.size * int32)  # ids
        weights = sent * groups.size * memory.num_cores * itemsize
        pre_inputs = sent * memory.pre_value_dim * itemsize
        pooled = sent * memory.value_dim * itemsize
        for floats in (weights, pre_inputs, pooled):
            count("all-to-all", floats, "all-to-all")
    return ExchangedBytes(dict(forward), dict(backward + forward if remat else backward))


def _received(name: str, operand: int, size: int) -> int:
    """Returns the bytes that one of `size` devices receives in a collective on `operand` bytes."""
    match name:
        case "all-gather":
            return operand * (size - 1)
        case "all-reduce":
            return -(-2 * operand * (size - 1) // size)
        case _:
            return -(-operand * (size - 1) // size)


def table_bytes(config: ModelConfig, layout: Layout, size: int) -> int:
    """Returns the bytes of one device's shard of all value tables and their moments, on a TPU.

    Tables are float32. Rows are padded to 128 columns, which is expensive for narrow column shards.
    """
    memory = config.memory
    columns, rows = (size, 1) if layout == "columns" else (1, size)
    padded_rows = _padded(memory_layer(config).table_rows(config) // rows, _TILE_ROWS)
    row = sum(
        _padded(dim // columns, _TILE_COLUMNS) for dim in (memory.value_dim, memory.pre_value_dim)
    )
    copies = (1 + _MOMENTS) * len(config.placements)
    return copies * padded_rows * row * accounting.FLOAT32_BYTES


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def choose_layout(
    config: ModelConfig, size: int, num_tokens: int, *, capacity: int | None = None
) -> tuple[Layout, str]:
    """Chooses the layout of the value tables that communicates fewer bytes, of those possible.

    Args:
      config: of a model with memory layers.
      size: mesh.memory, the number of devices that the tables are sharded over.
      num_tokens: tokens per device in one pass.
      capacity: bytes per device for tables and moments; None: unlimited.

    Returns:
      The layout, and one line that explains the choice, with the figures.

    Raises:
      ConfigError: neither layout is possible; the message says why, and names possible sizes.
    """
    faults = {layout: _fault(config, layout, size, capacity) for layout in _sizes(config)}
    possible = [layout for layout, fault in faults.items() if fault is None]
    if not possible:
        reasons = "; by ".join(f"{layout}: {fault}" for layout, fault in faults.items())
        raise ConfigError(f"mesh.memory={size}: cannot shard the value tables. By {reasons}")
    received = {
        layout: exchanged_bytes(
            config.memory,
            layout,
            size=size,
            num_tokens=num_tokens,
            itemsize=jnp.dtype(config.compute_dtype).itemsize,
            remat=config.remat != "none",
        ).total
        for layout in possible
    }
    chosen = min(possible, key=received.__getitem__)

    def figures(layout: Layout) -> str:
        if faults[layout]:
            return f"mesh.memory={size} {faults[layout]}"
        tables = table_bytes(config, layout, size)
        return f"{received[layout] / 1e6:,.1f} MB a layer, tables of {tables / 1e9:,.2f} GB"

    (other,) = (layout for layout in faults if layout != chosen)
    return chosen, (
        f"mesh.table_sharding: {chosen} over mesh.memory={size} ({figures(chosen)};"
        f" {other}: {figures(other)}). Received by a device with {num_tokens:,} tokens, forward and"
        " backward; tables with moments, as padded on a TPU"
    )


def resolve_mesh(
    config: Config,
    mesh_sizes: Mapping[str, int],
    num_tokens: int,
    *,
    capacity: int | None = None,
) -> Config:
    """Returns the configuration with a `ResolvedMesh`, in which the layout of tables is resolved.

    Args:
      config: if its mesh.table_sharding is "auto", the choice is logged.
      mesh_sizes: devices along each axis.
      num_tokens: tokens of a pass, on all devices.
      capacity: bytes of memory of a TPU, for "auto"; None: unlimited, or not a TPU.

    Raises:
      ConfigError: the configured layout, or for "auto" each layout, is impossible; the message
        names possible sizes.
    """
    size, named = mesh_sizes[sharding.MEMORY], config.mesh.table_sharding
    layout = named
    if config.model.placements and size > 1:
        if named == "auto":
            local_tokens = -(-num_tokens // math.prod(mesh_sizes.values()))
            layout, explanation = choose_layout(config.model, size, local_tokens, capacity=capacity)
            logging.info("%s", explanation)
        elif fault := _fault(config.model, named, size, None):
            raise ConfigError(f"mesh.memory={size}, mesh.table_sharding={named!r}: {fault}")
    fields = dataclasses.asdict(config.mesh) | {"table_sharding": layout}
    return dataclasses.replace(config, mesh=ResolvedMesh(**fields))


def _sizes(config: ModelConfig) -> dict[Layout, list[int]]:
    """Returns the numbers of devices that can shard the tables, by layout."""
    memory = config.memory
    return {
        "columns": exchange.column_sizes(memory.value_dim, memory.pre_value_dim, memory.num_cores),
        "rows": exchange.row_sizes(memory_layer(config).table_rows(config)),
    }


def _fault(config: ModelConfig, layout: Layout, size: int, capacity: int | None) -> str | None:
    """Returns why a layout is impossible, and a possible size if there is one; else None."""
    memory = config.memory
    if layout == "columns":
        dims = (memory.value_dim, memory.pre_value_dim, memory.num_cores)
        fault = exchange.column_fault(*dims, size)
    else:
        fault = exchange.row_fault(memory_layer(config).table_rows(config), size)
    if fault or capacity is None or table_bytes(config, layout, size) <= capacity:
        return fault
    fitting = [m for m in _sizes(config)[layout] if table_bytes(config, layout, m) <= capacity]
    advice = f"{min(fitting)} devices would do" if fitting else "no number of devices would do"
    tables = table_bytes(config, layout, size)
    return (
        f"requires {tables / 1e9:,.2f} GB per device for tables and moments, but a device has"
        f" {capacity / 1e9:,.2f} GB; {advice}"
    )
