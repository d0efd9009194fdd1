"""The compiler's figures for a program: memory of one device, and an estimate of its work."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while it runs a program.

    Attributes:
      arguments: parameters, state and batch, as sharded.
      outputs: including `aliased`.
      aliased: outputs that reuse donated arguments.
      temporaries: in main memory (HBM), not in the core's memory.
      code: the program itself; CPU and GPU compilers do not report it.
      peak: the compiler's own figure of the peak, or None. TPU compilers include the core's memory
        (VMEM), so it can exceed `total`.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """Sum of arguments, outputs that do not alias them, temporaries and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def as_dict(self) -> dict[str, int | None]:
        """Returns the parts and their total as plain values for JSON."""
        return dataclasses.asdict(self) | {"total": self.total}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of one execution on one device; None if it gives none.

    CPU and TPU compilers count the body of a loop once however often it runs (measured on scans).
    GPU compilers give no estimate if the GPU is not attached. `seconds` is the time of an ideal
    machine, also with one iteration per loop, and not a measurement.
    """

    flops: float | None
    bytes_accessed: float | None
    seconds: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self)


def memory(compiled: jax.stages.Compiled) -> Memory | None:
    """Returns the memory of one device while it runs the program; None if it is not reported."""
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
    # XLA reports negative figures, such as -1 for the seconds, where it has no estimate.
    known = {name: value for name, value in figures.items() if value >= 0}
    return Estimate(
        flops=known.get("flops"),
        bytes_accessed=known.get("bytes accessed"),
        seconds=known.get("optimal_seconds"),
    )
