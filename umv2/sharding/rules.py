"""Which axes of the mesh shard which axes of stored parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from umv2.config import ResolvedMesh
from umv2.sharding.mesh import FSDP, MEMORY, TENSOR

Rules = Mapping[str, tuple[str, ...]]


def rules(config: ResolvedMesh) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes that shard each logical axis of stored parameters."""
    dense = (FSDP, MEMORY) if config.parameters == "fsdp_and_memory" else (FSDP,)
    return {
        "hidden": dense,
        "key": dense,
        "heads": (TENSOR,),
        "ffn": (TENSOR,),
        "vocabulary": (TENSOR,),
        "expert_hidden": (FSDP,),
        "expert": (MEMORY, TENSOR),
        "table": (),
        "row": (MEMORY,) if config.table_sharding == "rows" else (),
        "column": (MEMORY,) if config.table_sharding == "columns" else (),
    }


def partition(
    axes: Sequence[str | None], rules: Rules, sizes: Mapping[str, int], *, name: str
) -> PartitionSpec:
    """Returns how an array with these logical axes is sharded.

    Args:
      axes: of each dimension; None: not sharded.
      rules: of the function `rules`.
      sizes: devices along each mesh axis; axes of size 1 shard nothing.
      name: of the array, for messages.

    Raises:
      ValueError: an axis that the rules do not know, or rules by which one mesh axis shards two
        dimensions.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"{name}: no rule shards axis {unknown[0]!r}")
    sharded = [
        () if axis is None else tuple(a for a in rules[axis] if sizes[a] > 1) for axis in axes
    ]
    used = [a for over in sharded for a in over]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: one mesh axis shards two dimensions: {sharded}")
    return PartitionSpec(*map(entry_of, sharded))


def entry_of(axes: tuple[str, ...]) -> Any:
    """Returns the entry of a PartitionSpec that names mesh axes."""
    return axes if len(axes) > 1 else axes[0] if axes else None
