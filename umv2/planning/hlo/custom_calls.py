"""The work of custom calls, which a compiler cannot see into.

A Pallas kernel declares it (`pl.CostEstimate`), and the compiled program repeats the declaration:
on TPUs as `cost_estimate` in the call's configuration, on GPUs as `cost_estimate_json`, there or in
an attribute. The FLOPs of attention kernels follow from their shapes.
"""

import math
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

_CUDNN_ATTENTION = "__cudnn$fmha"
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
_SPLASH = re.compile(r"/splash_mha_(fwd|dkv)")
_BLOCK_KEYS = re.compile(r"block_kv(?:_dkv)?\W+(\d+)")
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
    """Returns the FLOPs of attention by cuDNN or by JAX's splash kernels; 0 for other calls.

    Without those that the causal mask makes unnecessary: of single positions by cuDNN, and of
    blocks of positions by splash attention.
    """
    name = target(instruction)
    if name.startswith(_CUDNN_ATTENTION):
        products = _BACKWARD_PRODUCTS if name.endswith("Backward") else _FORWARD_PRODUCTS
        return 2.0 * products * _cudnn_products(instruction, operands[0])
    if match := _SPLASH.search(instruction.op_name):
        products = _BACKWARD_PRODUCTS if match[1] == "dkv" else _FORWARD_PRODUCTS
        return 2.0 * products * _splash_products(instruction, *operands[1:3])
    return 0.0


def _cudnn_products(instruction: hlo.Instruction, query: hlo.ArrayType) -> int:
    """Returns the multiply-adds of one matrix product.

    The configuration of the call has the shape of the scores, [b, h, t, s], and the mask.
    """
    scores = _SCORES.search(instruction.attributes)
    if not scores:
        return 0
    batch, heads, length, keys = (int(size) for size in re.findall(r"\d+", scores[1]))
    pairs = length * keys
    if "CAUSAL" in instruction.attributes:
        window = _WINDOW.search(instruction.attributes)
        visible = (int(window[1]) if window else 0) or keys
        pairs = sum(min(position + 1, visible) for position in range(length))
    return batch * heads * pairs * query.shape[-1]


def _splash_products(
    instruction: hlo.Instruction, mask: hlo.ArrayType, query: hlo.ArrayType
) -> int:
    """Returns the multiply-adds of one matrix product.

    `mask` has an entry for each block of queries and each block of keys that some of them see, and
    `query` is [h, q, t] or [h, t, q].
    """
    block_keys = _BLOCK_KEYS.search(instruction.attributes)
    if not block_keys:
        return 0
    length, (num_blocks, most_visible) = max(query.shape[1:]), mask.shape[1:]
    keys = int(block_keys[1])
    queries = length // num_blocks
    visible = (min(-(-(i + 1) * queries // keys), most_visible) for i in range(num_blocks))
    return math.prod(query.shape) // length * queries * keys * sum(visible)
