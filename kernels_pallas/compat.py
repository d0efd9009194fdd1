"""What differs in Pallas between the releases of jax that `requirements.txt` admits.

The kernels are written for jax 0.12; on 0.11, the functions of this file do the same by other
means. They look for a name or a parameter, never at the version. Once the lower bound is 0.12, the
file can go, and its callers call Pallas.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jax.experimental.xla_metadata import set_xla_metadata

COST_NAME = "cost_estimate_json"  # the attribute of a Mosaic GPU kernel in a compiled program


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a parameter of this name."""
    return name in inspect.signature(function).parameters


def gpu_kernel(
    body: Callable[..., None], *, cost_estimate: pl.CostEstimate, **options: Any
) -> Callable[..., Any]:
    """`plgpu.kernel`, with a cost estimate for readers of the compiled program.

    jax 0.12 writes it to the `backend_config` of the kernel, as `cost_estimate_json`. 0.11 takes no
    estimate, so it is written to the `frontend_attributes`, under the same name.
    """
    if has_parameter(plgpu.kernel, "cost_estimate"):
        return plgpu.kernel(body, cost_estimate=cost_estimate, **options)
    launch = plgpu.kernel(body, **options)
    described = json.dumps(dataclasses.asdict(cost_estimate))

    def launch_described(*operands: Any) -> Any:
        with set_xla_metadata(**{COST_NAME: described}):
            return launch(*operands)

    return launch_described


def gpu_store(ref: Any, value: Array, *, optimized: bool = True) -> None:
    """`plgpu.store`; the assignment of 0.11 decides by the layout whether it is optimized."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)
    else:
        ref[...] = value


def barrier_arrive_and_wait(barrier: Any) -> None:
    """`plgpu.barrier_arrive_and_wait`; 0.11 has its two halves."""
    if hasattr(plgpu, "barrier_arrive_and_wait"):
        plgpu.barrier_arrive_and_wait(barrier)
    else:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def bitcast_columns(x: Array, dtype: Any) -> Array:
    """`pltpu.bitcast` of the last axis, on a SparseCore; 0.11 has a function of its own for it."""
    if has_parameter(pltpu.bitcast, "dim"):
        return pltpu.bitcast(x, dtype, dim=-1)
    return plsc.bitcast(x, dtype)


def sparsecore_params(**options: Any) -> pltpu.CompilerParams:
    """`pltpu.CompilerParams` for SparseCores; the layout passes of 0.11 reject bitcasts."""
    if has_parameter(pltpu.bitcast, "dim"):
        return pltpu.CompilerParams(**options)
    return pltpu.CompilerParams(needs_layout_passes=False, **options)


class Push:
    """A copy from the local memory of a SparseCore to HBM.

    Its semaphore signals that the source has been read, so that it may be overwritten. A copy of
    jax 0.11 has a single semaphore, for its end.
    """

    def __init__(self, source: Any, target: Any, sent: Any) -> None:
        has_source_semaphore = has_parameter(pltpu.make_async_copy, "src_sem")
        semaphore = {"src_sem" if has_source_semaphore else "sem": sent}
        copy = pltpu.make_async_copy(source, target, **semaphore)
        self.start, self.wait = copy.start, copy.wait
        self.wait_read = copy.wait_read if has_source_semaphore else copy.wait
