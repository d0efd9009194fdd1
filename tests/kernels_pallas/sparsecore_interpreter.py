"""Runs the SparseCore kernels of value aggregation on CPU.

JAX's interpreter lacks six things that the kernels use, which are replaced here: indirect streams
(by the copies of single rows that the kernels use for padded rows), streams without a semaphore at
their destination, parallel loops, SparseCore meshes, the chip and, on jax 0.11, bitcasts.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from kernels_pallas import compat, tuned
from kernels_pallas.value_aggregation.sparsecore import arithmetic as sparsecore_arithmetic
from kernels_pallas.value_aggregation.sparsecore import pipeline as sparsecore_pipeline

NUM_SUBCORES = 2

_has_parameter = compat.has_parameter


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Makes `compat.Push` use the semaphore at its destination, as on jax 0.11."""
    return name != "src_sem" and _has_parameter(function, name)


def bitcast(x: Array, dtype: Any) -> Array:
    """`plsc.bitcast` of pairs of columns, which jax 0.11 uses."""
    return lax.bitcast_convert_type(x.reshape(-1, 2), dtype)


def in_order(count: Any, body: Callable[[Any], None]) -> None:
    lax.fori_loop(0, count, lambda k, _: body(k), None)


@contextlib.contextmanager
def interpreted_sparsecore(
    lanes: int = 8,
    local_bytes: int = 2**18,
    block_registers: int = 16,
    copies: Literal["on_wait", "eager"] = "on_wait",
) -> Iterator[None]:
    """Emulates a chip with two subcores; detects races, uninitialized and out-of-bounds reads.

    Copies execute as late as possible, when awaited, or as early as possible, when started.
    """
    chip = sparsecore_pipeline.Chip(1, NUM_SUBCORES, lanes, local_bytes)
    mesh = pltpu.TensorCoreMesh(axis_name="subcore", num_cores=NUM_SUBCORES)
    doubles: dict[str, Any] = {
        "target_chip": lambda: chip,
        "subcores": lambda chip: mesh,
        "this_subcore": lambda: lax.axis_index("subcore"),
        "IndirectStream": sparsecore_pipeline.RowCopies,
    }
    params = pltpu.InterpretParams(
        dma_execution_mode=copies, detect_races=True, uninitialized_memory="nan"
    )
    arithmetic: dict[str, Any] = {"for_rows": in_order, "_BLOCK_REGISTERS": block_registers}
    with (
        mock.patch.multiple(sparsecore_pipeline, **doubles),
        mock.patch.multiple(sparsecore_arithmetic, **arithmetic),
        mock.patch.object(compat, "has_parameter", has_parameter),
        mock.patch.object(plsc, "bitcast", bitcast),
        mock.patch.object(tuned, "device_kind", lambda platform: "an emulated chip"),
        pltpu.force_tpu_interpret_mode(params),
    ):
        yield
    pltpu.reset_tpu_interpret_mode_state()
