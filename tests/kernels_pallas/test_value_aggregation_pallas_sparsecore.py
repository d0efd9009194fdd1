"""The SparseCore kernels of value aggregation: interpreted, and compiled for chips elsewhere.

JAX's interpreter runs the kernels as they are but for four things that it does not have: indirect
streams (here a loop of row copies), streams without a semaphore at their destination, loops that
the compiler may reorder, and the indices of a mesh with two axes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import tuned
from kernels_pallas.value_aggregation import (
    pallas_sparsecore,
    sparsecore_arithmetic,
    sparsecore_pipeline,
    value_aggregation,
)
from kernels_pallas.value_aggregation.reference import Activation, value_aggregation_reference
from tests.kernels_pallas.test_value_aggregation import (
    assert_all_close,
    make_inputs,
    output_and_grads,
)

ON_TPU: dict[str, Any] = {"implementation": "pallas_sparsecore", "platform": "tpu"}
V6E = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("TPU v6 lite", 1, "tpu"))


class Push:
    """A stream whose only semaphore is that of its destination."""

    def __init__(self, result: Any, row: Any, sent: Any) -> None:
        self.copy = pltpu.make_async_copy(result, row, sent)
        self.start, self.wait, self.wait_read = self.copy.start, self.copy.wait, self.copy.wait


def in_order(count: Any, body: Callable[[Any], None]) -> None:
    lax.fori_loop(0, count, lambda k, _: body(k), None)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs the kernels on CPU, on two subcores; races and reads of unset memory show.

    The fixture sets lanes and local memory of the chip that is pretended.
    """

    def pretend(lanes: int = 8, local_bytes: int = 2**18) -> None:
        chip = sparsecore_pipeline.Chip(1, 2, lanes, local_bytes)
        monkeypatch.setattr(sparsecore_pipeline, "chip_at_hand", lambda: chip)

    pretend()
    monkeypatch.setattr(tuned, "device_kind", lambda platform: "a pretended chip")
    mesh = pltpu.TensorCoreMesh(axis_name="subcore", num_cores=2)
    monkeypatch.setattr(sparsecore_pipeline, "subcores", lambda chip: mesh)
    monkeypatch.setattr(sparsecore_pipeline, "this_subcore", lambda: lax.axis_index("subcore"))
    row_copies = sparsecore_pipeline.RowCopies
    monkeypatch.setattr(sparsecore_pipeline, "IndirectStream", row_copies)
    monkeypatch.setattr(sparsecore_pipeline, "push", Push)
    monkeypatch.setattr(sparsecore_arithmetic, "for_rows", in_order)
    params = pltpu.InterpretParams(
        num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield pretend
    pltpu.reset_tpu_interpret_mode_state()


def assert_matches_reference(
    inputs: dict[str, Any], activation: Activation | None = None, tolerance: float = 1e-5
) -> None:
    want = output_and_grads(value_aggregation_reference, inputs, activation=activation)
    got = output_and_grads(value_aggregation, inputs, activation=activation, **ON_TPU)
    assert_all_close(got, want, tolerance)


def test_a(interpreter: Any) -> None:
    assert_matches_reference(
        make_inputs(num_tokens=5, top_m=3, value_dim=24, pre_value_dim=16, num_cores=2)
    )
