"""Bytes that an instruction reads from and writes to main memory.

A fusion that only slices an operand, or gathers from it, reads only that, and one that updates an
operand in place writes only the update. A scatter also reads the rows that it adds to.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from umv2.planning import hlo
from umv2.planning.hlo import custom_calls
from umv2.planning.hlo.collectives import is_continuation

# Instructions without traffic: they name, regroup or wait for results of others.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
}
# Read as many bytes of their first operand as they return.
_READERS = {"dynamic-slice", "slice", "gather"}
# Update their first operands in place.
_WRITERS = {"dynamic-update-slice", "scatter"}
# Pass on their operand inside a fusion: only their users or producers access memory.
_VIEWS = {"bitcast", "reshape", "copy", "transpose", "convert"}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A number of bytes: in memory, where TPUs pad arrays to whole tiles, and without padding."""

    padded: int = 0
    unpadded: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.padded + other.padded, self.unpadded + other.unpadded)

    def __mul__(self, factor: int) -> "Bytes":
        return Bytes(self.padded * factor, self.unpadded * factor)


def traffic(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> Bytes:
    """Returns the bytes that one execution of an instruction moves; of what it calls, if fused."""
    if is_free(instruction):
        return Bytes()
    opcode = instruction.opcode.removesuffix("-start")
    if work := custom_calls.declared(instruction):
        return Bytes(work.bytes, work.bytes)
    operands = [hlo.array_types(computation.instructions[n].type) for n in instruction.operands]
    sizes = [_in_main(operand) for operand in operands]
    if opcode == "fusion":
        (called,) = program.called(instruction)
        if kernels := list(filter(None, map(custom_calls.declared, called.instructions.values()))):
            return _total(Bytes(work.bytes, work.bytes) for work in kernels)  # with views of slices
        return _read_by_fusion(program, called, sizes) + _written_by_fusion(program, called)
    if opcode in _WRITERS:
        count = len(_targets(instruction))
        in_place = _update(computation, instruction)
        in_place += _read_by_update(program, computation, instruction)
        return _smaller(in_place, _total(sizes[:count]) * 2) + _total(sizes[count:])
    results = _results(instruction, operands)
    if opcode in _READERS:
        sizes[0] = _smaller(_anywhere(results), sizes[0])
    return _total(sizes) + _in_main(results)


def is_free(instruction: hlo.Instruction) -> bool:
    """Returns whether an instruction moves nothing."""
    opcode = instruction.opcode
    ends = opcode.endswith(("-done", "-update"))
    return opcode in _FREE or ends or custom_calls.is_free(instruction)


def _results(
    instruction: hlo.Instruction, operands: Sequence[Sequence[hlo.ArrayType]]
) -> list[hlo.ArrayType]:
    """Returns the arrays that an instruction writes; a start may also list operands and flags."""
    arrays = list(hlo.array_types(instruction.type))
    listed = [array for operand in operands for array in operand]
    if not instruction.opcode.endswith("-start") or len(arrays) <= len(listed):
        return arrays
    for array in listed:
        if array in arrays:
            arrays.remove(array)
    return [array for array in arrays if array.shape]


def _read_by_fusion(program: hlo.Program, called: hlo.Computation, sizes: Sequence[Bytes]) -> Bytes:
    """Returns the bytes that a fusion reads from operands of these sizes."""
    parameters = [i for i in called.instructions.values() if i.opcode == "parameter"]
    return _total(
        _read_of(program, _Place(called, parameter, None), sizes[int(parameter.literal)])
        for parameter in parameters
    )


def _read_of(program: hlo.Program, place: "_Place", size: Bytes) -> Bytes:
    """Returns the bytes that a fusion reads of an operand of this size, at most all of them.

    Args:
      place: the operand in the fusion, or a view of it.
    """
    source, total = place.instruction, Bytes()
    for user in place.users():
        instruction = user.instruction
        if instruction.opcode in _READERS and instruction.operands[0] == source.name:
            total += _anywhere(hlo.array_types(instruction.type))
        elif instruction.opcode in _WRITERS and source.name in _targets(instruction):
            total += _read_by_update(program, place.computation, instruction)
        elif instruction.opcode in _VIEWS:
            total += _read_of(program, user, size)
        elif instruction.opcode == "fusion":
            for parameter in user.parameters(program, source.name):
                total += _read_of(program, parameter, size)
        elif instruction.opcode == "tuple" and user.outer is not None:
            for element in user.elements(source.name):
                total += _read_of(program, element, size)
        elif not (
            (instruction.opcode == "tuple" and source.opcode == "parameter")  # an alias
            or is_continuation(place.computation, instruction)
        ):
            return size
    if source is place.computation.root:  # a view
        total += size if place.outer is None else _read_of(program, place.outer, size)
    return _smaller(total, size)


def _written_by_fusion(program: hlo.Program, called: hlo.Computation) -> Bytes:
    """Returns the bytes that a fusion writes to its results."""
    outputs = _outputs(program, _Place(called, called.root, None))
    return _total(_written(program, place, array) for place, array in outputs)


def _written(program: hlo.Program, output: "_Place", array: hlo.ArrayType) -> Bytes:
    """Returns the bytes that a fusion writes to one of its results."""
    if output.instruction.opcode == "parameter":  # an alias, as in a spread collective
        return Bytes()
    if is_continuation(output.computation, output.instruction):
        return Bytes()
    whole, updates = _in_main([array]), Bytes()
    place = _origin(program, output)
    while place.instruction.opcode in _WRITERS:
        updates += _update(place.computation, place.instruction)
        place = _origin(program, place.operand(0))
        if place.instruction.opcode == "parameter":
            (target,) = hlo.array_types(place.instruction.type)
            return _smaller(updates, whole) if target.dtype == array.dtype else whole
    return whole


class _Place(NamedTuple):
    """An instruction in a fusion; `outer` is the place of the nested fusion around it, if any."""

    computation: hlo.Computation
    instruction: hlo.Instruction
    outer: "_Place | None"

    def at(self, name: str) -> "_Place":
        """Returns the place of another instruction of the same computation."""
        return self._replace(instruction=self.computation.instructions[name])

    def operand(self, number: int) -> "_Place":
        """Returns the place of an operand."""
        return self.at(self.instruction.operands[number])

    def users(self) -> list["_Place"]:
        """Returns the places of the users."""
        users = self.computation.users.get(self.instruction.name, ())
        return [self._replace(instruction=user) for user in users]

    def parameters(self, program: hlo.Program, operand: str) -> list["_Place"]:
        """Returns the places of the parameters of a nested fusion that are this operand."""
        (called,) = program.called(self.instruction)
        return [
            _Place(called, inner, self)
            for inner in called.instructions.values()
            if inner.opcode == "parameter"
            and self.instruction.operands[int(inner.literal)] == operand
        ]

    def elements(self, operand: str) -> list["_Place"]:
        """Returns the places of the elements of a nested fusion's results that are this operand."""
        assert self.outer is not None
        return [
            user
            for user in self.outer.users()
            if user.instruction.opcode == "get-tuple-element"
            and self.instruction.operands[int(user.instruction.attribute("index", r"\d+"))]
            == operand
        ]


def _outputs(program: hlo.Program, root: _Place) -> Iterator[tuple[_Place, hlo.ArrayType]]:
    """Yields the place and the type of each result of a fusion, entering nested fusions."""
    instruction = root.instruction
    if instruction.opcode == "tuple":
        for number in range(len(instruction.operands)):
            yield from _outputs(program, root.operand(number))
    elif instruction.opcode == "fusion":
        (called,) = program.called(instruction)
        yield from _outputs(program, _Place(called, called.root, root))
    else:
        for array in hlo.array_types(instruction.type):
            yield root, array


def _origin(program: hlo.Program, place: _Place) -> _Place:
    """Returns where a value is computed: follows views, into and out of nested fusions."""
    while True:
        instruction = place.instruction
        if instruction.opcode in _VIEWS:
            place = place.operand(0)
        elif instruction.opcode == "parameter" and place.outer is not None:
            place = place.outer.operand(int(instruction.literal))
        elif instruction.opcode == "fusion" and not instruction.type.startswith("("):
            ((place, _),) = _outputs(program, place)
        elif instruction.opcode == "get-tuple-element":
            producer, number = place.operand(0), int(instruction.attribute("index", r"\d+"))
            if producer.instruction.opcode != "fusion":
                return place
            place = list(_outputs(program, producer))[number][0]
        else:
            return place


def _targets(instruction: hlo.Instruction) -> Sequence[str]:
    """Returns the names of the operands that a writer updates: of a scatter possibly several."""
    if instruction.opcode == "scatter":  # targets, ids, and as many updates as targets
        return instruction.operands[: len(instruction.operands) // 2]
    return instruction.operands[:1]


def _update(computation: hlo.Computation, instruction: hlo.Instruction) -> Bytes:
    """Returns the bytes of the updates of a writer."""
    count = len(_targets(instruction))
    first = count + 1 if instruction.opcode == "scatter" else 1
    names = instruction.operands[first : first + count]
    return _total(_anywhere(hlo.array_types(computation.instructions[n].type)) for n in names)


def _read_by_update(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> Bytes:
    """Returns the bytes of its targets that a writer reads: the rows that a scatter adds to."""
    if instruction.opcode != "scatter":
        return Bytes()
    (combine,) = program.called(instruction, "to_apply")
    adds = combine.root.opcode != "parameter"
    return _update(computation, instruction) if adds else Bytes()


def _anywhere(arrays: Iterable[hlo.ArrayType]) -> Bytes:
    """Returns the bytes of arrays in any memory."""
    return _total(Bytes(array.padded_bytes, array.num_bytes) for array in arrays)


def _in_main(arrays: Iterable[hlo.ArrayType]) -> Bytes:
    """Returns the bytes of those arrays that are in main memory."""
    return _anywhere(array for array in arrays if array.memory_space == 0)


def _total(parts: Iterable[Bytes]) -> Bytes:
    return sum(parts, start=Bytes())


def _smaller(left: Bytes, right: Bytes) -> Bytes:
    return min(left, right, key=lambda size: size.padded)
