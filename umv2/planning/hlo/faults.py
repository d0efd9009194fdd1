"""Instructions that a training step should do without: what tests forbid and plans count.

Inside the layer loop, whole tables should neither be copied out of the stack nor be reduced over
devices, no array should have an entry for every pair of positions, and what is rematerialised
should neither sort nor call a kernel again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from umv2.planning import hlo
from umv2.planning.hlo import custom_calls, workload
from umv2.planning.hlo.sources import SCOPES, scopes

_REDUCTIONS = {"all-reduce", "reduce-scatter"}
_MIN_ENTRY_BYTES = 2  # of a table


@dataclasses.dataclass(frozen=True)
class Faults:
    """Executed instructions, each as its name and type.

    Attributes:
      scores: with a result [.., t, t] of more than t^2 entries.
      table_slices: that move a whole table out of, or a whole gradient into, the layer stack,
        inside the layer loop.
      table_reductions: that reduce a table's gradient over devices, inside the layer loop.
      rematerialised_sorts: sorts, or calls of a top-k, in rematerialised code.
      rematerialised_kernels: calls of kernels there.
    """

    scores: tuple[str, ...]
    table_slices: tuple[str, ...]
    table_reductions: tuple[str, ...]
    rematerialised_sorts: tuple[str, ...]
    rematerialised_kernels: tuple[str, ...]


def find(text: str, *, sequence_length: int, table: tuple[int, int] | None) -> Faults:
    """Finds the faults of a compiled program (`jax.stages.Compiled.as_text()`).

    Args:
      text: of the program.
      sequence_length: t; other axes of more than one activation must not have this length.
      table: rows and columns of the part of one value table that a device holds, if it has any.

    Raises:
      ValueError: the text is not a compiled program.
    """
    program = hlo.parse(text)
    parts = list(workload.executed(program))
    rows, size = (table[0], math.prod(table)) if table else (0, math.inf)

    def matching(condition: Callable[[workload.Part], bool]) -> tuple[str, ...]:
        found = [part.instruction for part in parts if condition(part)]
        return tuple(f"{instruction.name}: {instruction.type}" for instruction in found)

    def in_layers(part: workload.Part) -> bool:
        return "layers" in scopes(part.context)

    def has_scores(part: workload.Part) -> bool:
        return any(
            array.shape.count(sequence_length) >= 2 and math.prod(array.shape) > sequence_length**2
            for array in hlo.array_types(part.instruction.type)
        )

    def slices_tables(part: workload.Part) -> bool:
        arrays = hlo.array_types(part.instruction.type)
        moves_table = part.bytes.unpadded >= part.times * size * _MIN_ENTRY_BYTES
        of_table = any(rows in array.shape for array in arrays)
        of_stack = part.source.name == SCOPES["layers"] and in_layers(part)
        return of_stack and moves_table and of_table

    def reduces_tables(part: workload.Part) -> bool:
        inside = _with_fused(program, part.computation, part.instruction)
        return in_layers(part) and any(
            rows in array.shape and math.prod(array.shape) >= size
            for computation, one in inside
            if one.opcode.removesuffix("-start") in _REDUCTIONS
            for array in program.operand_types(computation, one.operands)
        )

    def repeats(part: workload.Part, condition: Callable[[hlo.Instruction], bool]) -> bool:
        inside = _with_fused(program, part.computation, part.instruction)
        return part.source.phase == "remat" and any(condition(one) for _, one in inside)

    return Faults(
        scores=matching(has_scores),
        table_slices=matching(slices_tables),
        table_reductions=matching(reduces_tables),
        rematerialised_sorts=matching(lambda part: repeats(part, _is_sort)),
        rematerialised_kernels=matching(lambda part: repeats(part, custom_calls.is_kernel)),
    )


def _with_fused(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
    """Yields an instruction and all that it fuses."""
    yield computation, instruction
    if instruction.opcode in hlo.FUSIONS:
        (called,) = program.called(instruction)
        for inner in called.instructions.values():
            yield from _with_fused(program, called, inner)


def _is_sort(instruction: hlo.Instruction) -> bool:
    return instruction.opcode == "sort" or "TopK" in custom_calls.target(instruction)
