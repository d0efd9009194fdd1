"""What the tests of both operators share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def no_runtime_shape_checks() -> Iterator[None]:
    """Lets a wrong argument reach the operator's own checks, as outside of the tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
