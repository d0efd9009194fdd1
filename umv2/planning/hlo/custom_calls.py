"""The work of custom calls, which a compiler cannot see into.

A Pallas kernel declares it (`pl.CostEstimate`), and the compiled program repeats the declaration:
on TPUs as `cost_estimate` in the call's configuration, on GPUs as `cost_estimate_json`, there or in
an attribute. The FLOPs of cuDNN's attention follow from its shapes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from umv2.planning import hlo

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_DECLARED = re.compile(r"\bcost_estimate(?:_json)?\W+?(\{[^}]*\})")
# JSON inside of a string has its quotation marks as \\22.
_FIELD = re.compile(r'(?:"|\\22)(\w+?)(?:"|\\22): ?"?(\d+)')
# They mark values or reserve memory.
_FREE = {
    "AllocateBuffer",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "Sharding",
}
# Pallas for TPUs and for GPUs, Triton, and cuDNN.
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton", "__cudnn$")

_ATTENTION = "__cudnn$fmha"
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length":\s*"?(\d+)')
# Matrix products with one multiply-add per score and column of a head. Forward: scores, pooled
# values. Backward: the scores again, and gradients of scores, queries, keys and values.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


class Declared(NamedTuple):
    """The work of one call of a kernel, as the kernel declares it."""

    flops: int
    bytes: int


def target(instruction: hlo.Instruction) -> str:
    """Returns the name of the function that a custom call calls; "" for other instructions."""
    match = _TARGET.search(instruction.attributes)
    return match[1] if match and instruction.opcode == "custom-call" else ""


def is_free(instruction: hlo.Instruction) -> bool:
    """Returns whether a custom call moves no data."""
    return target(instruction) in _FREE


def is_kernel(instruction: hlo.Instruction) -> bool:
    """Returns whether a custom call is one of a kernel, and not of the compiler's own routines."""
    return target(instruction).startswith(_KERNELS)


def declared(instruction: hlo.Instruction) -> Declared | None:
    """Returns the work that a kernel declares, or None if it declares none."""
    match = _DECLARED.search(instruction.attributes)
    if not match or instruction.opcode != "custom-call":
        return None
    fields = {name: int(number) for name, number in _FIELD.findall(match[1])}
    return Declared(fields.get("flops", 0), fields.get("bytes_accessed", 0))


def attention_flops(instruction: hlo.Instruction, operands: Sequence[hlo.ArrayType]) -> float:
    """Returns the FLOPs of cuDNN's attention, for visible positions only; 0 for other calls.

    The configuration of the call has the shape of the scores, [b, h, t, s]; the last axis of the
    first operand, the queries, is that of a head.
    """
    scores = _SCORES.search(instruction.attributes)
    if not target(instruction).startswith(_ATTENTION) or not scores:
        return 0.0
    batch, heads, length, keys = (int(size) for size in re.findall(r"\d+", scores[1]))
    pairs = length * keys
    if "CAUSAL" in instruction.attributes:
        window = _WINDOW.search(instruction.attributes)
        visible = (int(window[1]) if window else 0) or keys
        pairs = sum(min(position + 1, visible) for position in range(length))
    backward = target(instruction).endswith("Backward")
    products = _BACKWARD_PRODUCTS if backward else _FORWARD_PRODUCTS
    return 2.0 * products * batch * heads * pairs * operands[0].shape[-1]
