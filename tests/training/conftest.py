"""Fixtures shared by the tests of training."""

import io
import logging as std_logging
from collections.abc import Iterator

import pytest
from absl import logging


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log output."""
    stream = io.StringIO()
    handler = std_logging.StreamHandler(stream)
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    logger.addHandler(handler)
    logging.set_verbosity(logging.INFO)
    yield stream
    logging.set_verbosity(verbosity)
    logger.removeHandler(handler)
