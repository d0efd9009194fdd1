"""FLOPs of a compiled program's instructions: of matrix products, two per multiply-add."""

import math
import re

from umv2.planning import hlo
from umv2.planning.hlo import custom_calls

_INTEGERS = re.compile(r"\d+")


def flops(
    program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> float:
    """Returns the FLOPs of one execution; those of a custom kernel are what it declares."""
    match instruction.opcode:
        case opcode if opcode in hlo.FUSIONS:
            (called,) = program.called(instruction)
            return sum(flops(program, called, inner) for inner in called.instructions.values())
        case "dot":
            axes = instruction.attribute("lhs_contracting_dims", r"\{[\d,]*\}")
        case "custom-call" if "__cublas$" in instruction.attributes:
            match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            axes = match[1] if match else ""
        case "custom-call":
            if work := custom_calls.declared(instruction):
                return float(work.flops)
            operands = program.operand_types(computation, instruction.operands)
            return custom_calls.attention_flops(instruction, operands)
        case "convolution":
            left, right = program.operand_types(computation, instruction.operands[:2])
            return _convolution_flops(instruction, left, right)
        case _:
            return 0.0
    (left,) = program.operand_types(computation, instruction.operands[:1])
    result = hlo.array_types(instruction.type)[0]  # a custom call also returns a workspace
    contracted = math.prod(left.shape[int(axis)] for axis in _INTEGERS.findall(axes))
    return 2.0 * math.prod(result.shape) * contracted


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
