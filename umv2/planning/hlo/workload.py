"""The work of a compiled program on one device, read from its HLO text, with trip counts of loops.

XLA's `cost_analysis` counts a loop body once, but most of a training step is loops over layers.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from umv2.kernels import RARE
from umv2.planning import hlo
from umv2.planning.hlo.flops import flops
from umv2.planning.hlo.sources import Source, Sources
from umv2.planning.hlo.traffic import Bytes, is_free, traffic

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Components of an operation's path that describe its context and not the operation.
_CONTEXT = {"while", "body", "eval_jaxpr", "closed_call", "checkpoint", "rematted_computation"}
_NUM_HEAVIEST = 5


@dataclasses.dataclass(frozen=True)
class SourceWork:
    """The work that comes from one part of a training step.

    Attributes:
      source: name of the part.
      bytes: moved, by phase: "forward", "remat" (forward again, in the backward pass), "backward"
        and "" outside of differentiation.
      flops: of matrix products.
    """

    source: str
    bytes: dict[str, int]
    flops: float

    @property
    def total_bytes(self) -> int:
        """Bytes moved in all phases."""
        return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one execution of a program.

    Attributes:
      flops: of matrix products, two per multiply-add, and as declared by custom kernels.
      bytes: read from and written to main memory by all instructions, including the padding of
        arrays to tiles.
      cycles: the compiler's estimate, summed over instructions and without collectives; None if it
        gives none.
      heaviest: JAX operations that move the most bytes, in descending order.
      unpadded_bytes: `bytes` without padding; None in stored results from before it was counted.
      sources: the work by its part of the step, most bytes first; likewise empty.
    """

    flops: float
    bytes: float
    cycles: float | None
    heaviest: tuple[tuple[str, int], ...]
    unpadded_bytes: float | None = None
    sources: tuple[SourceWork, ...] = ()


def read(text: str) -> Work:
    """Reads the work of one device from `jax.stages.Compiled.as_text()`, for CPU, TPU or GPU.

    What is marked as `RARE` counts as never executed. Other loops whose trip count depends on data
    count once, and other conditionals as their largest branch.

    Raises:
      ValueError: the text is not a compiled program.
    """
    program = hlo.parse(text)
    parts = list(executed(program))
    by_operation: collections.Counter[str] = collections.Counter()
    by_source: dict[str, list[Part]] = collections.defaultdict(list)
    for part in parts:
        by_operation[_operation(part.instruction)] += part.bytes.padded
        by_source[part.source.name].append(part)
    works = [_source_work(name, group) for name, group in by_source.items()]
    return Work(
        flops=sum((part.flops for part in parts), 0.0),
        bytes=float(sum(part.bytes.padded for part in parts)),
        cycles=sum((part.cycles for part in parts), 0.0) if _CYCLES.search(text) else None,
        heaviest=tuple(by_operation.most_common(_NUM_HEAVIEST)),
        unpadded_bytes=float(sum(part.bytes.unpadded for part in parts)),
        sources=tuple(sorted(works, key=lambda work: -work.total_bytes)),
    )


class Part(NamedTuple):
    """The work of all executions of one instruction.

    `times` is their number, and `context` the path of the loop, branch or call around it.
    """

    computation: hlo.Computation
    instruction: hlo.Instruction
    source: Source
    context: str
    times: int
    flops: float
    bytes: Bytes
    cycles: float


def executed(program: hlo.Program) -> Iterator[Part]:
    """Yields the instructions that a program executes, without those that call others."""
    yield from _executed(program, Sources(program), program.entry, (), 1, "")


def _executed(
    program: hlo.Program,
    sources: Sources,
    computation: hlo.Computation,
    arguments: Sequence[hlo.Value],
    times: int,
    context: str,
) -> Iterator[Part]:
    """Yields the instructions of `times` executions of a computation."""
    values = hlo.Evaluation(program, computation, arguments)
    for instruction in computation.instructions.values():
        inside = instruction.op_name or context
        match instruction.opcode:
            case "while":
                if RARE in instruction.op_name:
                    continue
                (state,) = values.operands(instruction)
                trip_count = program.trip_count(instruction, state)
                trip_count = 1 if trip_count is None else trip_count
                (body,) = program.called(instruction, "body")
                invariant = program.loop_invariant(instruction, state)
                yield from _executed(
                    program, sources, body, (invariant,), times * trip_count, inside
                )
            case "conditional":
                branches = program.called(instruction)
                normal = [branch for branch in branches if not _is_rare(branch)] or branches
                parts = [
                    list(_executed(program, sources, branch, (), times, inside))
                    for branch in normal
                ]
                yield from max(parts, key=lambda part: sum(one.bytes.padded for one in part))
            case "call" | "call-start" | "async-start":
                for called in program.called(instruction):
                    yield from _executed(program, sources, called, (), times, inside)
            case _ if not is_free(instruction):
                yield Part(
                    computation,
                    instruction,
                    sources.of(computation, instruction, context),
                    context,
                    times,
                    times * flops(program, computation, instruction),
                    traffic(program, computation, instruction) * times,
                    times * sum(map(float, _CYCLES.findall(instruction.attributes))),
                )


def _is_rare(branch: hlo.Computation) -> bool:
    """Returns whether most operations of a branch are marked as rare."""
    names = [i.op_name for i in branch.instructions.values() if i.op_name]
    return 2 * sum(RARE in name for name in names) > len(names)


def _operation(instruction: hlo.Instruction) -> str:
    """Returns the JAX operation, without the loops and calls around it."""
    path = instruction.op_name.split("/")
    named = [name for name in path if name not in _CONTEXT and not name.startswith("jit(")]
    return "/".join(named[-4:]) or instruction.opcode


def _source_work(name: str, parts: Sequence[Part]) -> SourceWork:
    by_phase: dict[str, int] = collections.defaultdict(int)
    for part in parts:
        by_phase[part.source.phase] += part.bytes.padded
    return SourceWork(name, dict(by_phase), sum((part.flops for part in parts), 0.0))
