"""Counts the FLOPs of matrix products in a traced program, a multiply-add as two."""

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> int:
    """Sums over all matrix products of a jaxpr, with those in loops once per trip.

    A ragged product [m, k] x [g, k, n] counts each row once, in its group.

    Raises:
      ValueError: a product is in a loop without a static trip count, or in one of several branches.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "ragged_dot_general":
            rows, inner = equation.invars[0].aval.shape
            total += 2 * rows * inner * equation.outvars[0].aval.shape[-1]
        else:
            inside = sum(matmul_flops(inner) for inner in _inner_jaxprs(parameters))
            if inside and name == "while":
                raise ValueError("a matrix product in a loop of unknown length")
            if inside and name == "cond":
                raise ValueError("a matrix product in one branch of several")
            total += inside * parameters.get("length", 1)
    return total


def _inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    jaxprs = []
    for value in parameters.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            closed = getattr(candidate, "jaxpr", candidate)
            if hasattr(closed, "eqns"):
                jaxprs.append(closed)
    return jaxprs
