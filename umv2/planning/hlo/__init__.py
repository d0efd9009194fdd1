"""Compiled programs as HLO text: instructions, collectives, and work."""

from umv2.planning.hlo.text import (
    FUSIONS,
    ArrayType,
    Computation,
    Evaluation,
    Instruction,
    Program,
    Value,
    array_types,
    parse,
)

__all__ = [
    "FUSIONS",
    "ArrayType",
    "Computation",
    "Evaluation",
    "Instruction",
    "Program",
    "Value",
    "array_types",
    "parse",
]
