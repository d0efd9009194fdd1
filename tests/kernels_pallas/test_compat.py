"""What the kernels need from Pallas, in its own words and, as on jax 0.11, in others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import compat
from tests.kernels_pallas.aot import declared_costs


@pytest.fixture(params=["as_installed", "as_of_0.11"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tests what the installed jax offers, and without what 0.11 lacks."""
    if request.param == "as_of_0.11":
        for name in ("store", "barrier_arrive_and_wait"):
            monkeypatch.delattr(plgpu, name, raising=False)
        monkeypatch.setattr(compat, "has_parameter", lambda function, name: False)
    return request.param


def test_parameters_are_found_by_name() -> None:
    assert compat.has_parameter(plgpu.kernel, "out_type")
    assert not compat.has_parameter(plgpu.kernel, "no_such_parameter")


def test_two_warpgroups_exchange_what_they_store(api: str) -> None:
    def kernel(source: Any, target: Any, shared: Any, barrier: Any) -> None:
        group = lax.axis_index("group")
        compat.gpu_store(shared.at[group], source[group] + 1, optimized=False)
        compat.barrier_arrive_and_wait(barrier)
        compat.gpu_store(target.at[group], shared[1 - group] * 2, optimized=False)

    launch = compat.gpu_kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((2, 128), jnp.float32), plgpu.Barrier(num_arrivals=2)],
        num_threads=2,
        thread_name="group",
        cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1),
    )
    x = np.arange(256.0, dtype=np.float32).reshape(2, 128)
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        np.testing.assert_array_equal(launch(jnp.asarray(x)), (x[::-1] + 1) * 2)


def test_a_lowered_gpu_kernel_has_its_cost(api: str) -> None:
    def kernel(source: Any, target: Any) -> None:
        target[...] = source[...]

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    cost = pl.CostEstimate(flops=3, transcendentals=4, bytes_accessed=5)
    launch = functools.partial(compat.gpu_kernel, kernel, out_type=x, cost_estimate=cost)
    lowered = jax.jit(launch()).trace(x).lower(lowering_platforms=("cuda",))
    assert declared_costs(lowered.as_text()) == [(3, 4, 5)]
