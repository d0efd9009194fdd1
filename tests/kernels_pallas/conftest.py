"""Fixtures for the tests of all operators."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def no_runtime_shape_checks() -> Iterator[None]:
    """Disables jaxtyping, so that wrong arguments reach the operator's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
