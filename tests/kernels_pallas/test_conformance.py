"""Every backend against the reference; see `conformance.py`, which holds the cases."""

import pytest

from kernels_pallas.benchmark.workloads import OPERATORS
from tests.kernels_pallas.conformance import Case, cases, run

# Of each backend the first shape in float32 and the second in bfloat16 are run every time.
QUICK = ((0, "float32"), (1, "bfloat16"))


def marked(case: Case) -> object:
    number = OPERATORS[case.operator].shapes.index(case.shape)
    quick = (number, case.dtype) in QUICK
    return pytest.param(case, id=str(case), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in cases()])
def test_results_and_gradients_are_those_of_the_float32_reference(case: Case) -> None:
    errors = run(case)
    if isinstance(errors, str):
        pytest.skip(errors)
    for pass_name, error in errors.items():
        assert error.share <= 1, (pass_name, error)
