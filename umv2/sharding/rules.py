"""Which mesh axes shard which parameter."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umv2.config import MeshConfig
from umv2.sharding.mesh import FSDP, MEMORY, TENSOR

# The logical axes of each parameter's last dimensions; those before them are stacks of layers.
# Optimizer moments have the same names under other prefixes.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(params|model|mu|nu)/(embedding|head)", ("vocabulary", "hidden")),
    (r"attention/(query|key|value)", ("hidden", "heads")),
    (r"attention/output", ("heads", "hidden")),
    (r"ffn/(gate|up)", ("hidden", "ffn")),
    (r"ffn/down", ("ffn", "hidden")),
    (r"sparse/(query|pre|output_gate)", ("hidden", None)),
    (r"sparse/output", (None, "hidden")),
    (r"sparse/keys", (None, "key")),
    (r"sparse/router", ("expert_hidden", None)),
    (r"sparse/(gate|up)", (None, "expert_hidden", "expert")),
    (r"sparse/down", (None, "expert", "expert_hidden")),
    (r"store/(.*/)?(values|pre_values)", ("table", "row", "column")),
)


def rules(config: MeshConfig) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes that divide each logical axis of stored parameters."""
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
    name: str,
    shape: tuple[int, ...],
    rules: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """Returns how a named array of the train state is sharded.

    Args:
      name: "params/blocks/ffn/gate", or an optimizer moment's that ends in the same.
      shape: all dimensions.
      rules: of the function `rules`.
      sizes: devices along each mesh axis; axes of size 1 divide nothing.

    Raises:
      ValueError: rules by which one mesh axis divides two dimensions, or two patterns that match.
    """
    found = [axes for pattern, axes in PARAMETER_AXES if re.search(f"(^|/){pattern}$", name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} matches several patterns of PARAMETER_AXES: {found}")
    logical = (
        (None,) * len(shape) if not found else (None,) * (len(shape) - len(found[0])) + found[0]
    )
    sharded: list[tuple[str, ...]] = []
    for axis in logical:
        over = tuple(a for a in rules.get(axis or "", ()) if sizes[a] > 1)
        sharded.append(over)
    used = [a for over in sharded for a in over]
    if len(used) != len(set(used)):
        raise ValueError(f"rules divide two dimensions of {name} by one mesh axis: {sharded}")
    return PartitionSpec(*map(entry_of, sharded))


def state_shardings(mesh: Mesh, config: MeshConfig, state: Any) -> Any:
    """Returns the sharding of every leaf of a train state, or of a part of it.

    Raises:
      ValueError: tables to divide, and mesh.table_sharding is still "auto".
    """
    axes = rules(config)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("store/") and config.table_sharding == "auto" and config.memory > 1:
            raise ValueError("mesh.table_sharding='auto': choose before arrays are sharded")
        return NamedSharding(mesh, partition(name, leaf.shape, axes, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def entry_of(axes: tuple[str, ...]) -> Any:
    """The entry of a PartitionSpec that names mesh axes."""
    return axes if len(axes) > 1 else axes[0] if axes else None
