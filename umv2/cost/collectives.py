"""The collectives of a compiled program, read from its HLO text: kind, mesh axes, bytes, count."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from jax.sharding import Mesh

Kind = Literal[
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    Attributes:
      kind: what it does.
      axes: mesh axes along which the devices that it connects differ, in the order of the mesh.
      dtype: of what is sent, by its NumPy name; several are joined by "+".
      bytes: that one device receives in one execution of the instruction.
      count: executions in one execution of the program; of a dynamic one: in one round of each
        loop whose number of rounds depends on data.
      dynamic: whether it stands in such a loop.
      source: the operation of the JAX program that it comes from, as the compiler recorded it.
    """

    kind: Kind
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    dynamic: bool = False
    source: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes that one device receives through it in one execution of the program."""
        return self.bytes * self.count


def read(text: str, mesh: Mesh | Mapping[str, int]) -> tuple[Collective, ...]:
    """Reads the collectives that connect more than one device, in the order of the program.

    Args:
      text: of a compiled program for CPU, TPU or GPU, `jax.stages.Compiled.as_text()`.
      mesh: that it was compiled for, or sizes by the names of its axes, in its order.

    Raises:
      ValueError: the text is not that of a compiled program, or not of this mesh.
    """
    raise NotImplementedError


def totals(collectives: Iterable[Collective]) -> dict[tuple[Kind, tuple[str, ...]], int]:
    """Adds up bytes that one device receives in one execution, without dynamic collectives."""
    raise NotImplementedError


def as_text(collectives: Iterable[Collective]) -> str:
    """Returns a table, a row for each kind, axes and dtype; dynamic ones by themselves."""
    raise NotImplementedError
