"""Rules that map the logical axes of stored parameters to mesh axes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from umv2.config import ResolvedMesh
from umv2.sharding.mesh import FSDP, MEMORY, TENSOR

Rules = Mapping[str, tuple[str, ...]]


def rules(config: ResolvedMesh) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes over which each logical axis of stored parameters is sharded."""
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
    """Returns the PartitionSpec of an array with these logical axes.

    Args:
      axes: logical axis of each dimension; None: not sharded.
      rules: sharding rules, as returned by `rules`.
      sizes: size of each mesh axis; axes of size 1 are left out.
      name: name of the array, for error messages.

    Raises:
      ValueError: there is no rule for an axis, or two dimensions map to the same mesh axis.
    """
    if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
        raise ValueError(f"{name}: there is no sharding rule for axis {unknown[0]!r}")
    sharded = [
        () if axis is None else tuple(a for a in rules[axis] if sizes[a] > 1) for axis in axes
    ]
    used = [a for over in sharded for a in over]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: two dimensions are sharded over the same mesh axis: {sharded}")
    return PartitionSpec(*map(entry_of, sharded))


def entry_of(axes: tuple[str, ...]) -> Any:
    """Returns the PartitionSpec entry for mesh axes."""
    return axes if len(axes) > 1 else axes[0] if axes else None
