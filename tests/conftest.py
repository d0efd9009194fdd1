"""What every test runs under: eight CPU devices, float32, no silent rank promotion."""

import os

# Before jax is imported. What the caller has set stays: the tests marked gpu or tpu are run with
# JAX_PLATFORMS=cuda or tpu. Processes that a test starts inherit both.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if _DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES_FLAG}=8".strip()

import time
from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples every time, so that a failure is due to the change at hand; no deadline, because
# the first example of each shape compiles.
hypothesis.settings.register_profile("umv2", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("umv2")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run, and slow tests that .ci/run has no time left for."""
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform) and jax.default_backend() != platform:
            pytest.skip(f"needs JAX on a {platform.upper()}, found {jax.default_backend()}")
    until = os.environ.get("SLOW_TESTS_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("the time for slow tests is over (SLOW_TESTS_UNTIL)")


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets a test use float64 and int64."""
    with jax.enable_x64(True):
        yield
