"""What the compiler says of a program: the memory of one device, and an estimate of its work."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while it runs a program.

    Attributes:
      arguments: parameters, state and batch, as they are sharded.
      outputs: of which `aliased` lie in donated arguments and take no memory of their own.
      temporaries: in the memory that also holds arguments (HBM), not in that of the core.
      code: the program itself; CPU and GPU compilers do not say.
      peak: the compiler's own figure for the worst moment, or None. The TPU compilers count what
        lies in the core's own memory (VMEM) too, so it can be above `total`.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """Arguments, outputs that lie in none of them, temporaries and code, all at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def as_dict(self) -> dict[str, int | None]:
        """Returns the parts and their total, for JSON."""
        return dataclasses.asdict(self) | {"total": self.total}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of one execution on one device; None where it gives none.

    The body of a loop counts once however often it runs: true of CPU and TPU compilers, measured on
    scans. Compilers for GPUs that are not attached give nothing. `seconds` is the time of an ideal
    machine for the same single rounds, and no measurement.
    """

    flops: float | None
    bytes_accessed: float | None
    seconds: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Returns the figures, for JSON."""
        return dataclasses.asdict(self)


def memory(compiled: jax.stages.Compiled) -> Memory | None:
    """Returns what one device holds while it runs the program; None: the backend does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=getattr(stats, "peak_memory_in_bytes", 0) or None,
    )


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """Returns the compiler's estimate of the work of one device."""
    figures = compiled.cost_analysis() or {}
    # A part that has no estimate adds -1 (seconds), which the sum of the others does not outweigh.
    known = {name: value for name, value in figures.items() if value >= 0}
    return Estimate(
        flops=known.get("flops"),
        bytes_accessed=known.get("bytes accessed"),
        seconds=known.get("optimal_seconds"),
    )
