"""The configuration of the device mesh (`mesh`)."""

import dataclasses
from typing import Literal

from umv2.config.schema import Positive, require


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The axes of the device mesh, and what they shard (`mesh`)."""

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
    """A mesh section for which it is decided how value tables are sharded.

    Shardings are made from it alone, and `umv2.cost.exchange.resolve_mesh` alone makes it, so that
    no caller can forget the decision.
    """
