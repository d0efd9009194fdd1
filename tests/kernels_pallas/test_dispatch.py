"""The choice of an implementation, and what is logged about it."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import dispatch, value_aggregation
from kernels_pallas.dispatch import UnsupportedError, choose, lowering_platform

AUTOMATIC = {"cpu": ("plain",), "tpu": ("fast", "plain")}
REASONS = {"plain": lambda: None, "fast": lambda: "rows are too long"}
EAGER = REASONS | {"fast": lambda: None}


@pytest.fixture(autouse=True)
def clear_log_cache() -> Iterator[None]:
    dispatch._log_choice.cache_clear()
    yield
    dispatch._log_choice.cache_clear()


def test_the_first_supported_implementation_of_the_platform_is_chosen() -> None:
    assert choose("op", None, "tpu", AUTOMATIC, EAGER) == "fast"
    assert choose("op", None, "tpu", AUTOMATIC, REASONS) == "plain"
    assert choose("op", None, "cpu", AUTOMATIC, EAGER) == "plain"
    assert choose("op", None, "metal", AUTOMATIC, EAGER) == "plain"


def test_a_name_overrides_the_table() -> None:
    assert choose("op", "plain", "tpu", AUTOMATIC, EAGER) == "plain"
    assert choose("op", "fast", "cpu", AUTOMATIC, EAGER) == "fast"


def test_an_unsupported_named_implementation_raises_its_reason() -> None:
    with pytest.raises(UnsupportedError, match="op, implementation 'fast': rows are too long"):
        choose("op", "fast", "tpu", AUTOMATIC, REASONS)
    with pytest.raises(ValueError, match="got 'faster', must be None or one of plain, fast"):
        choose("op", "faster", "tpu", AUTOMATIC, REASONS)


def test_all_reasons_are_given_if_no_implementation_is_supported() -> None:
    reasons = REASONS | {"plain": lambda: "rows are too many"}
    with pytest.raises(UnsupportedError, match="not fast: rows are too long; not plain: rows are"):
        choose("op", None, "tpu", AUTOMATIC, reasons)


def test_each_choice_is_logged_once_with_reasons_against_earlier_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="kernels_pallas.dispatch"):
        for _ in range(3):
            choose("op", None, "tpu", AUTOMATIC, REASONS)
            choose("op", None, "cpu", AUTOMATIC, REASONS)
    assert caplog.messages == [
        "op on tpu: implementation plain (not fast: rows are too long)",
        "op on cpu: implementation plain",
    ]


def test_the_platform_is_the_named_one_else_the_mesh_else_the_default() -> None:
    assert lowering_platform() == jax.default_backend()
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert lowering_platform() == "tpu"
        assert lowering_platform("gpu") == "gpu"
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        assert lowering_platform() == jax.default_backend()


def test_value_aggregation_uses_the_kernel_of_the_platform_unless_another_is_named() -> None:
    arrays = (jnp.ones((4, 8)), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3, 1)))
    default = str(jax.make_jaxpr(lambda: value_aggregation(*arrays, platform="cpu"))())
    named = str(jax.make_jaxpr(lambda: value_aggregation(*arrays, implementation="xla"))())
    on_tpu = [
        str(jax.make_jaxpr(lambda name=name: value_aggregation(*arrays, **name, platform="tpu"))())
        for name in ({}, {"implementation": "xla"})
    ]
    assert "pallas_call" not in default
    assert default == named
    assert ["pallas_call" in jaxpr for jaxpr in on_tpu] == [True, False]
    with pytest.raises(UnsupportedError, match="'pallas_tpu': it compiles for TPU, not for cpu"):
        value_aggregation(*arrays, implementation="pallas_tpu", platform="cpu")


def test_a_backend_is_imported_on_first_use() -> None:
    script = """
import sys
from kernels_pallas.value_aggregation.api import BACKENDS
print("jax.experimental.pallas" in sys.modules)
BACKENDS["pallas_tpu"]
print("jax.experimental.pallas" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def test_backends_only_have_the_names_of_their_operator() -> None:
    backends = dispatch.Backends[Any]("kernels_pallas.value_aggregation", {"xla": "xla"})
    assert list(backends) == ["xla"]
    assert backends["xla"].__name__ == "kernels_pallas.value_aggregation.xla"
    with pytest.raises(KeyError):
        backends["reference"]
