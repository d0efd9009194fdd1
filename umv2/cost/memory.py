"""What the compiler says of one program: memory of a device, and its estimate of the work."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while it runs a program; None: the compiler does not say.

    `aliased` bytes of the outputs lie in donated arguments. `peak` counts arguments, outputs and
    temporaries at their worst moment; `code` is the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """Arguments, outputs that lie in no argument, temporaries and code, as if all at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def as_dict(self) -> dict[str, int | None]:
        """Returns the parts and their total, for JSON."""
        return dataclasses.asdict(self) | {"total": self.total}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's own estimate of one execution on one device; None: it gives none.

    `flops` and `bytes_accessed` count the body of a loop once on some backends: see `estimate`.
    `seconds` is the model of an ideal machine and no measurement.
    """

    flops: float | None
    bytes_accessed: float | None
    seconds: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Returns the figures, for JSON."""
        return dataclasses.asdict(self)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Returns what one device holds while it runs the program."""
    raise NotImplementedError


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """Returns the compiler's estimate of the work of one device."""
    raise NotImplementedError
