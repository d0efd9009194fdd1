"""Interleaved timing of programs on one device, with a memory copy as the yardstick."""

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from kernels_pallas.benchmark.workloads import Pass, Workload, differentiated
from kernels_pallas.dispatch import UnsupportedError

COPY_BYTES = 256 * 2**20  # bytes that the copy reads; it writes as many
_MIN_SECONDS = 5e-3  # of one measurement, if calls can queue up on the device


@dataclasses.dataclass
class Program:
    """A compiled function with its arguments."""

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int
    needed_bytes: int  # arguments, results and temporaries
    calls: int = 1  # per measurement


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, one entry for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile over the rounds."""
        return quartiles(self.seconds)

    def speedup_over(self, other: "Times") -> tuple[float, tuple[float, float]]:
        """Median and quartiles of the per-round speedups over `other`."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), quartiles(ratios)


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    low, high = np.quantile(numbers, [0.25, 0.75])
    return float(low), float(high)


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a function for its arguments.

    On TPU, arguments and results have the layouts that the compiler chooses, as tables of a model
    would, so that relayout copies are not measured.
    """
    formats: dict[str, Any] = {}
    if layouts_are_chosen():
        free = Format(Layout.AUTO, SingleDeviceSharding(jax.local_devices()[0]))
        formats = {"in_shardings": free, "out_shardings": free}
    shapes = jax.eval_shape(lambda *arrays: arrays, *arguments)
    start = time.perf_counter()
    program = jax.jit(function, **formats).lower(*shapes).compile()
    seconds = time.perf_counter() - start
    if formats:
        arguments = jax.device_put(arguments, program.input_formats[0])
    memory = program.memory_analysis()
    assert memory is not None
    temporary = memory.temp_size_in_bytes
    needed = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Program(functools.partial(program, *arguments), seconds, temporary, needed)


def layouts_are_chosen() -> bool:
    """Whether the compiler chooses layouts, because kernels may not read the default ones."""
    return jax.default_backend() == "tpu"


def program_of(
    workload: Workload, implementation: str, pass_name: Pass, arrays: dict[str, Any]
) -> Program | str:
    """Compiles the program of a pass, or returns why that is not possible.

    "backward" starts from the residuals of the forward pass of the same implementation; "both" is
    one program with both passes. The backward pass differentiates with respect to all
    differentiable arguments, with random cotangents.
    """
    chosen, others = workload.split(arrays)
    function = differentiated(workload.call(implementation), others)
    try:
        result, _ = jax.eval_shape(function, chosen)  # the cheapest way to get the refusal
    except UnsupportedError as error:
        return reason_of(error, implementation)
    if pass_name == "forward":
        # Pass all arrays as arguments; a closure would make them constants of the program.
        call = workload.call(implementation)
        return _within_memory(compiled(call, arrays))

    cotangent = jax.random.normal(jax.random.key(1), result.shape, result.dtype)

    def run_forward(chosen: dict[str, Array], others: dict[str, Any]) -> Any:
        call = differentiated(workload.call(implementation), others)
        return jax.vjp(call, chosen, has_aux=True)

    def run_both(chosen: dict[str, Array], others: dict[str, Any], cotangent: Array) -> Any:
        result, vjp, selection = run_forward(chosen, others)
        return result, selection, vjp(cotangent)

    if pass_name == "both":
        return _within_memory(compiled(run_both, chosen, others, cotangent))
    forward = _within_memory(compiled(run_forward, chosen, others))
    if isinstance(forward, str):
        return forward
    _, vjp, _ = forward.run()
    return _within_memory(compiled(lambda vjp, cotangent: vjp(cotangent), vjp, cotangent))


def reason_of(error: UnsupportedError, implementation: str) -> str:
    """Returns the reason in an `UnsupportedError`, without the name of the implementation."""
    return str(error).rpartition(f"{implementation!r}: ")[2]


def _within_memory(program: Program) -> Program | str:
    available = available_bytes()
    if program.needed_bytes > available:
        sizes = (f"{x / 2**30:.1f} GiB" for x in (program.needed_bytes, available))
        return "needs {}, only {} are available".format(*sizes)
    return program


def available_bytes() -> int:
    """Memory available to a program on the default device."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(device.memory_stats()["bytes_limit"])


def copy_program() -> Program:
    """A copy in the memory of the default device, which moves 2 * `COPY_BYTES` in total."""
    return compiled(jnp.copy, jnp.ones(COPY_BYTES // 4, jnp.float32))


def matrix_flops_per_second(size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product at highest precision, best of 5."""
    matrix = jnp.ones((size, size), jnp.float32)
    product = compiled(functools.partial(jnp.matmul, precision="highest"), matrix, matrix)
    times = interleaved_times({"product": product}, 5)["product"]
    return 2 * size**3 / min(times.seconds)


def interleaved_times(programs: Mapping[str, Program], rounds: int) -> dict[str, Times]:
    """Measures programs interleaved, round by round, so that noise affects all of them equally.

    Each program runs twice for warm-up. If the device queues calls, a measurement consists of
    enough calls to take a few milliseconds, which hides the launch overhead of the host.
    """
    for program in programs.values():
        jax.block_until_ready(program.run())
        seconds = _seconds(program)
        if jax.default_backend() != "cpu":  # on CPU, independent calls would run concurrently
            program.calls = max(1, min(100, math.ceil(_MIN_SECONDS / seconds)))
    names = list(programs)
    seconds_of: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds_of[name].append(_seconds(programs[name]))
    return {name: Times(tuple(seconds)) for name, seconds in seconds_of.items()}


def _seconds(program: Program) -> float:
    start = time.perf_counter()
    for _ in range(program.calls):
        result = program.run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / program.calls


def difference(got: Any, want: Any) -> float:
    """The largest relative difference, in norm, between floating-point arrays of two results."""
    floats = [
        (a, b)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        if jnp.issubdtype(b.dtype, jnp.floating)
    ]
    return max(float(_relative(a, b)) for a, b in floats)


@jax.jit
def _relative(got: Array, want: Array) -> Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(got - want)) / jnp.sum(jnp.square(want)))
