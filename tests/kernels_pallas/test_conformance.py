"""Every backend against the reference; see `conformance.py`, which holds the cases.

Here each shape is run in one of the dtypes; `python -m tests.kernels_pallas.conformance` runs all.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from kernels_pallas.benchmark.workloads import OPERATORS
from tests.kernels_pallas.conformance import DTYPES, Case, cases, run


def some() -> Iterator[Any]:
    """Of interpreted kernels one case is run every time, of plain XLA two."""
    for case in cases():
        number = OPERATORS[case.operator].shapes.index(case.shape)
        if case.dtype == DTYPES[number % len(DTYPES)]:
            quick = number == 1 or (number == 0 and case.backend == "xla")
            yield pytest.param(case, id=str(case), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("case", list(some()))
def test_results_and_gradients_are_those_of_the_float32_reference(case: Case) -> None:
    errors = run(case)
    if isinstance(errors, str):
        pytest.skip(errors)
    for pass_name, error in errors.items():
        assert error.share <= 1, (pass_name, error)
