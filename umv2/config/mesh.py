"""The configuration of the device mesh (`mesh`)."""

import dataclasses
from typing import Literal

from umv2.config.schema import Positive, require


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh axes, and how parameters and tables are sharded (`mesh`)."""

    replica: int
    fsdp: Positive
    memory: Positive
    tensor: Positive
    parameters: Literal["fsdp", "fsdp_and_memory"]
    table_sharding: Literal["auto", "columns", "rows"]

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        require(
            self.replica == -1 or self.replica >= 1,
            "mesh.replica",
            self.replica,
            "must be >= 1, or -1 for all devices that the other axes leave",
        )


@dataclasses.dataclass(frozen=True)
class ResolvedMesh(MeshConfig):
    """A mesh section whose `table_sharding` is resolved.

    Only `umv2.cost.exchange.resolve_mesh` creates it, and creating shardings requires it, so that
    no caller can skip the resolution.
    """
