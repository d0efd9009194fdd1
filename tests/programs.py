"""Walks traced programs, with all their nested programs."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of every jaxpr in it: loops, branches, derivatives."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation.params):
            yield from equations(inner)


def largest_array(jaxpr: Any) -> int:
    """Returns the number of elements of the largest array that any equation computes."""
    return max(
        math.prod(getattr(variable.aval, "shape", ()))
        for equation in equations(jaxpr)
        for variable in equation.outvars
    )


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in jax.tree.leaves(parameters, is_leaf=lambda x: hasattr(x, "eqns")):
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
