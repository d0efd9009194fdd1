"""Which part of a training step an instruction comes from, by the scopes in its metadata.

The model names its parts by `jax.named_scope`; the innermost name in `SCOPES` counts. A fusion
belongs to the part of a kernel in it, else of its root or, if that has no metadata, to the most
frequent one inside. An instruction without metadata, such as a copy, belongs to the part of its
operands, else of its users, else of the loop around it.
"""

import collections
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from umv2.planning import hlo
from umv2.planning.hlo import custom_calls

# The part of the step that each scope marks.
SCOPES = {
    "embedding": "embedding",
    "attention_block": "QKV, output, norms, RoPE",
    "attention": "attention",
    "memory": "memory projections",
    "product_keys": "product keys",
    "exchange": "exchange",
    "value_aggregation": "value gather",
    "table_gradient": "table gradient",
    "feed_forward": "FFN",
    "experts": "experts",
    "head": "head and loss",
    "layers": "slices of the layer stack",
    "accumulation": "accumulation, copies of tables",
    "optimizer": "optimizer",
}
OTHER = "other"

# "forward", "remat" (forward again, in the backward pass), "backward", or outside of
# differentiation.
Phase = Literal["forward", "remat", "backward", ""]

_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(SCOPES)})(?=[/)]|$)")
_REMATERIALISED = "rematted_computation"
# One instruction of these may have users of many sources.
_SHARED = {"constant", "iota", "parameter"}
# Steps from an instruction without metadata to one with it.
_MAX_DISTANCE = 4


class Source(NamedTuple):
    """The part of a step, by a value of `SCOPES` or `OTHER`, and the phase."""

    name: str
    phase: Phase


def scopes(path: str) -> list[str]:
    """Returns the names in `SCOPES` in the path of an operation (`op_name`), outermost first."""
    return _SCOPE.findall(path)


def source(path: str) -> Source | None:
    """Returns the source of an operation with this path; None if no scope is in it."""
    names = scopes(path)
    return Source(SCOPES[names[-1]], phase(path)) if names else None


def phase(path: str) -> Phase:
    """Returns the phase of an operation with this path."""
    if _REMATERIALISED in path:
        return "remat"
    if "transpose(" in path:
        return "backward"
    return "forward" if "jvp(" in path else ""


class Sources:
    """The sources of the instructions of a program."""

    def __init__(self, program: hlo.Program):
        self._program = program
        self._own: dict[tuple[str, str], Source | None] = {}

    def of(
        self, computation: hlo.Computation, instruction: hlo.Instruction, context: str
    ) -> Source:
        """Returns the source of an instruction; `context` is the path of the loop around it."""
        found = self._of(computation, instruction) or source(context) or Source(OTHER, "")
        return found if found.phase else found._replace(phase=phase(context))

    def _of(self, computation: hlo.Computation, instruction: hlo.Instruction) -> Source | None:
        """Returns the source of an instruction or else, nearest first, of one that it touches."""
        if found := self._of_itself(computation, instruction):
            return found
        for direction in (_operands, _users):
            reached = [instruction]
            for _ in range(_MAX_DISTANCE):
                reached = [other for one in reached for other in direction(computation, one)]
                for other in reached:
                    if found := self._of_itself(computation, other):
                        return found
        return None

    def _of_itself(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> Source | None:
        """Returns the source by the metadata of an instruction, or of those that it fuses."""
        key = computation.name, instruction.name
        if key not in self._own:
            found = source(instruction.op_name)
            if instruction.opcode in hlo.FUSIONS:
                (called,) = self._program.called(instruction)
                inside = called.instructions.values()
                kernels = [one for one in inside if custom_calls.is_kernel(one)]
                if kernels or not found:
                    fused = (self._of_itself(called, one) for one in kernels or inside)
                    most = collections.Counter(filter(None, fused)).most_common(1)
                    found = most[0][0] if most else found
            self._own[key] = found
        return self._own[key]


def _operands(
    computation: hlo.Computation, instruction: hlo.Instruction
) -> Iterator[hlo.Instruction]:
    operands = (computation.instructions[name] for name in instruction.operands)
    return (operand for operand in operands if operand.opcode not in _SHARED)


def _users(computation: hlo.Computation, instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
    return iter(computation.users.get(instruction.name, ()))
