"""The matrix products of a compiled program, counted with the rounds of its loops.

`jax.stages.Compiled.cost_analysis()` counts the body of a loop once, and a model scans its layers.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from umv2.cost import hlo

_INTEGER = re.compile(r"-?\d+")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_GEMM_CONTRACTION = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one execution; of loops that depend on data, nothing is counted.

    Attributes:
      matmul_flops: two for each product of elements in matrix products and convolutions. Compute
        that a kernel (a custom call) does by itself is not among them.
      cycles: of the core, as the TPU compiler estimates them for each of its fusions; without
        collectives and kernels, and not a measurement. None: other compilers do not say.
    """

    matmul_flops: int
    cycles: int | None


def read(text: str | None) -> Work:
    """Reads the work of a compiled program, `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    program = hlo.parse(text or "")
    cycles = _Sum(program, _cycles, enters_fusions=False).of(program.entry, ())
    flops = _Sum(program, _flops, enters_fusions=True).of(program.entry, ())
    return Work(matmul_flops=flops, cycles=cycles or None)


class _Sum:
    """Adds up a measure over a program's instructions, as often as each runs."""

    def __init__(
        self,
        program: hlo.Program,
        measure: Callable[[hlo.Program, hlo.Computation, hlo.Instruction], int],
        *,
        enters_fusions: bool,
    ):
        self._program = program
        self._measure = measure
        self._enters_fusions = enters_fusions
        self._leads_anywhere: dict[str, bool] = {}

    def of(self, computation: hlo.Computation, arguments: Sequence[hlo.Value]) -> int:
        """Returns the sum over one run of a computation."""
        values = hlo.Evaluation(self._program, computation, arguments)
        total = 0
        for instruction in computation.instructions.values():
            total += self._measure(self._program, computation, instruction)
            called = self._called(instruction)
            if not any(map(self._matters, called)):
                continue
            operands = values.operands(instruction)
            if instruction.opcode == "while":
                rounds = self._program.trip_count(instruction, operands[0]) or 0
                known = self._program.unchanged(instruction, operands[0])
                (body,) = self._program.called(instruction, "body")
                total += rounds * self.of(body, [known])
            elif instruction.opcode == "conditional":
                branches = zip(called, operands[1:], strict=True)
                total += max(self.of(branch, [operand]) for branch, operand in branches)
            else:
                total += sum(self.of(computation, operands) for computation in called)
        return total

    def _called(self, instruction: hlo.Instruction) -> list[hlo.Computation]:
        if instruction.opcode.endswith(("-done", "-update")):
            return []  # counted where it started
        if instruction.opcode == "fusion" and not self._enters_fusions:
            return []
        return self._program.called(instruction)

    def _matters(self, computation: hlo.Computation) -> bool:
        if computation.name not in self._leads_anywhere:
            self._leads_anywhere[computation.name] = any(
                self._measure(self._program, computation, instruction)
                or any(map(self._matters, self._called(instruction)))
                for instruction in computation.instructions.values()
            )
        return self._leads_anywhere[computation.name]


def _cycles(_: hlo.Program, __: hlo.Computation, instruction: hlo.Instruction) -> int:
    found = _CYCLES.search(instruction.rest)
    return int(found.group(1)) if found else 0


def _flops(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    match instruction.opcode:
        case "dot":
            contracted = instruction.attribute("lhs_contracting_dims", r"\{[\d,]*\}")
        case "custom-call" if found := _GEMM_CONTRACTION.search(instruction.attributes):
            contracted = found.group(1)
        case "convolution":
            return _convolution_flops(program, computation, instruction)
        case _:
            return 0
    (result, *_) = hlo.array_types(instruction.type)  # a library's workspace follows
    (left,) = program.operand_types(computation, instruction.operands[:1])
    sizes = (left.shape[axis] for axis in _integers(contracted))
    return 2 * math.prod(result.shape) * math.prod(sizes)


def _convolution_flops(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> int:
    """TPU compilers write every product as one, and a batch as a window that slides over it."""
    labels = instruction.attribute("dim_labels", r"\w+->\w+")
    left_labels, right_labels, result_labels = re.split("_|->", labels)
    operands = program.operand_types(computation, instruction.operands)
    left = dict(zip(left_labels, operands[0].shape, strict=True))
    right = dict(zip(right_labels, operands[1].shape, strict=True))
    result = dict(zip(result_labels, hlo.array_types(instruction.type)[0].shape, strict=True))
    groups = int(instruction.attribute("batch_group_count", r"\d+") or 1)
    window = instruction.attribute("window", r"\{[^}]*\}")
    products = left["b"] // groups * right["i"] * right["o"]
    for dimension in filter(str.isdigit, result_labels):
        sizes = [sizes[dimension] for sizes in (left, right, result)]
        products *= _meetings(*sizes, **_window(window, int(dimension)))
    return 2 * products


def _window(text: str, dimension: int) -> dict[str, int]:
    """One dimension of `{size=8x16 stride=7x15 pad=0_0x3_3 lhs_dilate=8x16}`."""

    def part(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([-\d_x]+)", text)
        return found.group(1).split("x")[dimension] if found else default

    return {
        "stride": int(part("stride", "1")),
        "before": int(part("pad", "0_0").split("_")[0]),
        "left_dilation": int(part("lhs_dilate", "1")),
        "right_dilation": int(part("rhs_dilate", "1")),
    }


def _meetings(
    left: int,
    right: int,
    result: int,
    *,
    stride: int,
    before: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """How often an element of a sliding window meets one of the input, and not padding."""
    places = np.arange(result) * stride - before
    count = 0
    for element in range(right):
        positions = places + element * right_dilation
        inside = (0 <= positions) & (positions < left * left_dilation)
        count += int(np.count_nonzero(inside & (positions % left_dilation == 0)))
    return count


def _integers(text: str) -> Iterator[int]:
    return (int(number) for number in _INTEGER.findall(text))
