"""Settings of all tests: eight CPU devices, float32, no silent rank promotion."""

import os

# Set before jax is imported. The caller's values take precedence: tests marked gpu or tpu run with
# JAX_PLATFORMS=cuda or tpu. Processes started by a test inherit both variables.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if _DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES_FLAG}=8".strip()

import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import jax
import pytest

if TYPE_CHECKING:
    from tests.tiny_run import Run

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples every time, so that a failure comes from the change at hand; no deadline,
# because the first example of each shape compiles.
hypothesis.settings.register_profile("umv2", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("umv2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one third of the slow tests if SLOW_TESTS_THIRD (0, 1 or 2) is set.

    .ci/run starts with another third each time, so that three runs cover all slow tests.
    """
    if not (third := os.environ.get("SLOW_TESTS_THIRD")):
        return

    def left_out(item: pytest.Item) -> bool:
        slow = item.get_closest_marker("slow") is not None
        return slow and zlib.crc32(item.nodeid.encode()) % 3 != int(third)

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that this machine cannot run, and slow tests if .ci/run is out of time."""
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform) and jax.default_backend() != platform:
            pytest.skip(f"needs JAX on a {platform.upper()}, found {jax.default_backend()}")
    until, slow = os.environ.get("SLOW_TESTS_UNTIL"), item.get_closest_marker("slow")
    if until and slow and time.time() + 60 * slow.kwargs.get("minutes", 0) > float(until):
        pytest.skip("not enough time left (SLOW_TESTS_UNTIL)")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Beartype checks one random item of a long list: makes it the same in every run."""
    random.seed(0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets a test use float64 and int64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Run]":
    """The uninterrupted tiny run of 12 steps, with a checkpoint every third step.

    Its tests share a compilation cache across processes. Copy the folder before changing it.
    """
    # Imported here, so that tests of kernels run where only jax is installed.
    from tests import tiny_run
    from umv2.training.train import train

    workdir = tmp_path_factory.mktemp("finished")
    paths = tiny_run.write_text(tmp_path_factory.mktemp("text"))
    config = tiny_run.tiny_config(paths)
    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    cache = Path(jax.config.jax_compilation_cache_dir or session / "compiled")
    with tiny_run.quick_compilation(cache):
        with tiny_run.compilations() as compiled:
            train(config, workdir)
        yield tiny_run.Run(workdir, paths, config, cache, tuple(compiled))
