"""Settings of all tests: eight CPU devices, quick compilation, no silent rank promotion."""

import os
from pathlib import Path

# Set before jax is imported. The caller's values take precedence: tests marked gpu or tpu run with
# JAX_PLATFORMS=cuda or tpu. Processes started by a test inherit both variables.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
#
# Compiling takes most of the time of the tests, and a third less without optimization by LLVM.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in (_flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{_flags} {_flag}".strip()
# What has not changed since the last run is not compiled again.
_COMPILED = Path(__file__).resolve().parents[1] / ".cache" / "compiled"
for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(_COMPILED),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(_name, _value)

import gc
import random
import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import jax
import pytest

if TYPE_CHECKING:
    from tests.tiny_run import Run

from umv2.model import stack

# Models of tests are small, but scanned as large ones are: unrolled, they compile for longer.
stack.MAX_UNROLLED_ON_CPU = 0

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples every time, so that a failure comes from the change at hand; no deadline,
# because the first example of each shape compiles.
hypothesis.settings.register_profile("umv2", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("umv2")


# Tracing allocates many long-lived objects; at the default rate, collection takes 8 % of the time.
gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Removes the mark of slow tests from their fast cases, and keeps a third of the slow tests.

    The latter only if SLOW_TESTS_THIRD (0, 1 or 2) is set: .ci/run starts with another third each
    time, so that three runs cover all slow tests.
    """
    for item in items:
        slow, cases = item.get_closest_marker("slow"), getattr(item, "callspec", None)
        if slow and cases and any(part in cases.id for part in slow.kwargs.get("fast", ())):
            item.own_markers.remove(slow)
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
