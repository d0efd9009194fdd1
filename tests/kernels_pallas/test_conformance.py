"""Every backend against the reference, on a subset of the cases of `conformance.py`.

Here each shape runs in one of the dtypes, there in all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from kernels_pallas import tuned
from kernels_pallas.benchmark.workloads import OPERATORS
from tests.kernels_pallas.conformance import (
    DTYPES,
    PLATFORMS,
    Case,
    cases,
    check,
    interpreter,
)


def some() -> Iterator[Any]:
    """Always runs one case of each interpreted kernel and two of plain XLA; others are slow."""
    for case in cases():
        number = OPERATORS[case.operator].shapes.index(case.shape)
        if case.dtype == DTYPES[number % len(DTYPES)]:
            quick = number == 1 or (number == 0 and case.backend == "xla")
            yield pytest.param(case, id=str(case), marks=() if quick else pytest.mark.slow)


@pytest.mark.slow(fast=["xla"])
@pytest.mark.parametrize("case", list(some()))
def test_results_and_gradients_match_the_float32_reference(
    case: Case, record_property: Callable[[str, str], None]
) -> None:
    check(case, record_property)


@pytest.mark.parametrize(
    ("operator", "backend"),
    [(operator, backend) for operator in OPERATORS for backend in OPERATORS[operator].backends],
)
def test_every_backend_looks_up_tuned_blocks(operator: str, backend: str) -> None:
    (case,) = (
        case
        for case in cases()
        if (case.operator, case.backend, case.dtype) == (operator, backend, "float32")
        and case.shape == OPERATORS[operator].shapes[1]
    )
    platform = PLATFORMS[backend]
    options = case.shape.options | {"implementation": backend, "platform": platform}
    function = OPERATORS[operator].function
    with interpreter(backend), tuned.recording() as requests:
        jax.eval_shape(lambda: function(**case.inputs(), **options))
    (request,) = requests
    assert request.key.implementation.partition("/")[0] == backend
    assert request.key.pass_name == ("both" if backend == "xla" else "forward")
    assert request.platform == platform
