"""The work of a compiled program on one device, read from its HLO text, with trip counts of loops.

XLA's `cost_analysis` counts a loop body once, but most of a training step is loops over layers.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from umv2.planning import hlo

_ARRAY = re.compile(r"\b([a-z]\w*\[[\d,<=]*\])(?:\{[^}]*?(S\(\d+\))?\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_INTEGERS = re.compile(r"\d+")

# Instructions without work: they name, regroup or wait for results of others.
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
# Components of an operation's path that describe its context and not the operation.
_CONTEXT = {"while", "body", "eval_jaxpr", "closed_call", "checkpoint", "rematted_computation"}
_NUM_HEAVIEST = 5
_MAIN = ("", "S(0)")  # memory spaces in layouts that mean the main memory of a device
_FUSIONS = {"fusion", "fusion-start"}
# Read as many bytes of their first operand as they return.
_READERS = {"dynamic-slice", "slice", "gather"}
# Update their first operand in place, with as many bytes as the operand of this index.
_WRITERS = {"dynamic-update-slice": 1, "scatter": 2}
# Pass on their operand inside a fusion: only their users or producers access memory.
_VIEWS = {"bitcast", "reshape", "copy", "transpose", "convert"}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one execution of a program.

    Attributes:
      flops: of matrix products, two per multiply-add; custom kernels count 0.
      bytes: read from and written to main memory by all instructions; of custom kernels, only the
        bytes written.
      cycles: the compiler's estimate, summed over instructions and without collectives; None if it
        gives none.
      heaviest: JAX operations that move the most bytes, in descending order.
    """

    flops: float
    bytes: float
    cycles: float | None
    heaviest: tuple[tuple[str, int], ...]


def read(text: str) -> Work:
    """Reads the work of one device from `jax.stages.Compiled.as_text()`, for CPU, TPU or GPU.

    A loop whose trip count depends on data counts once, and a conditional as its largest branch.

    Raises:
      ValueError: the text is not a compiled program.
    """
    program = hlo.parse(text)
    parts = list(_parts(program, program.entry, (), 1))
    by_source: collections.Counter[str] = collections.Counter()
    for part in parts:
        by_source[part.source] += round(part.bytes)
    return Work(
        flops=sum(part.flops for part in parts),
        bytes=sum(part.bytes for part in parts),
        cycles=sum(part.cycles for part in parts) if _CYCLES.search(text) else None,
        heaviest=tuple(by_source.most_common(_NUM_HEAVIEST)),
    )


class _Part(NamedTuple):
    """The work of all executions of one instruction."""

    source: str
    flops: float
    bytes: float
    cycles: float


def _parts(
    program: hlo.Program,
    computation: hlo.Computation,
    arguments: Sequence[hlo.Value],
    times: int,
) -> Iterator[_Part]:
    """Yields the work of `times` executions of a computation."""
    values = hlo.Evaluation(program, computation, arguments)
    for instruction in computation.instructions.values():
        match instruction.opcode:
            case "while":
                (state,) = values.operands(instruction)
                trip_count = program.trip_count(instruction, state) or 1
                (body,) = program.called(instruction, "body")
                invariant = program.loop_invariant(instruction, state)
                yield from _parts(program, body, (invariant,), times * trip_count)
            case "conditional":
                branches = program.called(instruction)
                alternatives = [list(_parts(program, branch, (), times)) for branch in branches]
                yield from max(alternatives, key=lambda parts: sum(part.bytes for part in parts))
            case "call" | "async-start":
                for called in program.called(instruction):
                    yield from _parts(program, called, (), times)
            case opcode if opcode in _FREE or opcode.endswith(("-done", "-update")):
                pass
            case _:
                yield _Part(
                    _source(instruction),
                    times * _flops(program, computation, instruction),
                    times * _bytes(program, computation, instruction),
                    times * sum(map(float, _CYCLES.findall(instruction.attributes))),
                )


def _source(instruction: hlo.Instruction) -> str:
    """Returns the JAX operation, without the loops and calls around it."""
    path = instruction.attribute("op_name", '"[^"]*"').strip('"').split("/")
    named = [name for name in path if name not in _CONTEXT and not name.startswith("jit(")]
    return "/".join(named[-4:]) or instruction.opcode


def _flops(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> float:
    match instruction.opcode:
        case opcode if opcode in _FUSIONS:
            (called,) = program.called(instruction)
            return sum(_flops(program, called, inner) for inner in called.instructions.values())
        case "dot":
            axes = instruction.attribute("lhs_contracting_dims", r"\{[\d,]*\}")
        case "custom-call" if "__cublas$" in instruction.attributes:
            match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            axes = match[1] if match else ""
        case "convolution":
            left, right = program.operand_types(computation, instruction.operands[:2])
            return _convolution_flops(instruction, left, right)
        case _:
            return 0.0
    (left,) = program.operand_types(computation, instruction.operands[:1])
    result = hlo.array_types(instruction.type)[0]  # a custom call also returns a workspace
    contracted = math.prod(left.shape[int(axis)] for axis in _INTEGERS.findall(axes))
    return 2.0 * math.prod(result.shape) * contracted


def _bytes(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> float:
    operands = [computation.instructions[name].type for name in instruction.operands]
    match instruction.opcode:
        case opcode if opcode in _FUSIONS:
            (called,) = program.called(instruction)
            read = _read_by_fusion(program, called, [_size(operand) for operand in operands])
            return read + _written_by_fusion(called)
        case opcode if opcode in _READERS:
            return 2.0 * _size(instruction.type)
        case opcode if opcode in _WRITERS:
            return 2.0 * _size(operands[_WRITERS[opcode]])
        case "custom-call" if "__cublas$" not in instruction.attributes:
            return _size(instruction.type)
        case opcode if opcode.endswith("-start"):  # its type lists operands, results and flags
            return _size(instruction.type)
    return _size(instruction.type) + sum(map(_size, operands))


def _read_by_fusion(program: hlo.Program, called: hlo.Computation, sizes: Sequence[float]) -> float:
    """Returns the bytes that a fusion reads from operands of these sizes; only slices if sliced."""
    parameters = [i for i in called.instructions.values() if i.opcode == "parameter"]
    return sum(
        min(sizes[int(p.literal)], _read_of(program, called, p, sizes[int(p.literal)]))
        for p in parameters
    )


def _read_of(
    program: hlo.Program, called: hlo.Computation, source: hlo.Instruction, size: float
) -> float:
    total = 0.0
    for user in called.users.get(source.name, ()):
        first = user.operands[0] == source.name
        if user.opcode in _READERS and first:
            total += _size(user.type, everywhere=True)
        elif user.opcode in _VIEWS:
            total += _read_of(program, called, user, size)
        elif user.opcode == "fusion":
            (inner,) = program.called(user)
            sizes = [size if name == source.name else 0.0 for name in user.operands]
            total += _read_by_fusion(program, inner, sizes)
        elif not (user.opcode in _WRITERS and first):  # an in-place update reads nothing
            return size
    return total


def _written_by_fusion(called: hlo.Computation) -> float:
    """Returns the bytes that a fusion writes; only the updates if it updates in place."""
    root, total = called.root, 0.0
    if root.opcode != "tuple" and root.type.startswith("("):  # e.g. a variadic reduction
        return _size(root.type)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    for name, (array, space) in zip(names, _ARRAY.findall(root.type), strict=True):
        result = called.instructions[name]
        while result.opcode in _VIEWS:
            result = called.instructions[result.operands[0]]
        size = _size(array) if space in _MAIN else 0.0
        if result.opcode in _WRITERS:
            update = called.instructions[result.operands[_WRITERS[result.opcode]]]
            size = min(size, _size(update.type, everywhere=True))
        total += size
    return total


def _size(types: str, *, everywhere: bool = False) -> float:
    """Returns the bytes of the arrays of a type in main memory, or in any memory space."""
    return float(
        sum(
            hlo.array_types(array)[0].num_bytes
            for array, space in _ARRAY.findall(types)
            if everywhere or space in _MAIN
        )
    )


def _convolution_flops(
    instruction: hlo.Instruction, left: hlo.ArrayType, right: hlo.ArrayType
) -> float:
    """Returns FLOPs as XLA counts them, without products with padding or dilation gaps.

    TPU compilers express matrix products as convolutions, and batch dimensions as dilated spatial
    dimensions.
    """
    labels = re.split("_|->", instruction.attribute("dim_labels", r"\w+->\w+"))
    (result,) = hlo.array_types(instruction.type)
    inputs, kernel, outputs = (
        dict(zip(names, array.shape, strict=True))
        for names, array in zip(labels, (left, right, result), strict=True)
    )
    window = (instruction.attribute("window", r"\{[^}]*\}") or "{}")[1:-1]
    fields = dict(field.split("=") for field in window.split())
    products = 2.0 * outputs["b"] * outputs["f"] * kernel["i"]
    for axis in (name for name in outputs if name.isdigit()):
        products *= _valid_pairs(fields, int(axis), inputs[axis], kernel[axis], outputs[axis])
    return products


def _valid_pairs(fields: dict[str, str], axis: int, size: int, window: int, outputs: int) -> int:
    def field(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
    left, right = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    pairs = 0
    for tap in range(window):
        for output in range(outputs):
            position = output * stride + tap * right - low
            pairs += position % left == 0 and 0 <= position // left < size
    return pairs
