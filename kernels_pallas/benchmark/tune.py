"""Searches for the fastest blocks of a backend for a workload, on the attached device."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kernels_pallas import tuned
from kernels_pallas.benchmark.measure import Program, difference, interleaved_times, program_of
from kernels_pallas.benchmark.workloads import Workload, differentiated

_FACTORS = (0.25, 0.5, 2, 4)
_MAX_DIFFERENCE = 0.02  # in norm: reordered sums, rounded to bfloat16, differ by less
_MIN_SPEEDUP = 1.03  # less is noise and not worth storing


def requests(workload: Workload, implementation: str) -> list[tuned.Request]:
    """Traces the passes of a workload and returns the choices of blocks that they make."""
    arrays = workload.shape.arguments(workload.dtype)

    def gradients(arrays: dict[str, Any]) -> Any:
        chosen, others = workload.split(arrays)
        call = differentiated(workload.call(implementation), others)
        result, vjp, _ = jax.vjp(call, chosen, has_aux=True)
        return vjp(result)

    with tuned.recording() as made:
        jax.eval_shape(gradients, arrays)
    return list({request.key: request for request in made}.values())


def variations(blocks: Any, field: str) -> Iterator[Any]:
    """Yields the blocks with other values of one field."""
    value = getattr(blocks, field)
    if isinstance(value, bool):
        yield dataclasses.replace(blocks, **{field: not value})
        return
    for factor in _FACTORS:
        if factor * value == int(factor * value):
            yield dataclasses.replace(blocks, **{field: int(factor * value)})


def fastest(
    workload: Workload,
    implementation: str,
    request: tuned.Request,
    rounds: int,
    log: Callable[[str], None],
) -> tuple[Any, dict[str, Any]]:
    """Improves the heuristic's blocks, one field at a time, until no variation is faster.

    A candidate must be 3 % faster than the best so far, by the median over the rounds.

    Returns:
        The best blocks and their measurements.
    """
    arrays = workload.inputs()
    best = request.default
    fields = [field.name for field in dataclasses.fields(best)]
    tried: dict[Any, str] = {}
    gain, seconds, improved = 1.0, float("nan"), True
    while improved:
        improved = False
        for field in fields:
            programs: dict[Any, Program] = {}
            candidates = [best, *(b for b in variations(best, field) if b not in tried)]
            for blocks in candidates:
                program = _program(workload, implementation, request, blocks, arrays)
                if isinstance(program, str):
                    tried[blocks] = program
                    log(f"    {blocks}: no: {program}")
                else:
                    programs[blocks] = program
            if best not in programs:
                return best, {"reason": tried[best]}
            for blocks, reason in _drop_mismatches(programs, best).items():
                tried[blocks] = reason
                log(f"    {blocks}: no: {reason}")
            times = interleaved_times(programs, rounds)
            start = times[best]
            for blocks, seconds_of_blocks in times.items():
                speedup, _ = seconds_of_blocks.speedup_over(start)
                tried[blocks] = f"{speedup:.2f}"
                milliseconds = 1e3 * seconds_of_blocks.median
                log(f"    {blocks}: {milliseconds:.3g} ms, {speedup:.2f} times as fast")
            winner = max(times, key=lambda blocks: times[blocks].speedup_over(start)[0])
            speedup, _ = times[winner].speedup_over(start)
            if winner != best and speedup >= _MIN_SPEEDUP:
                best, gain, improved = winner, gain * speedup, True
            seconds = times[best].median
    return best, {
        "seconds": seconds,
        "speedup_over_heuristic": gain,
        "heuristic": dataclasses.asdict(request.default),
    }


def _drop_mismatches(programs: dict[Any, Program], best: Any) -> dict[Any, str]:
    """Removes programs whose results differ from those of the best blocks; returns the reasons."""
    want = programs[best].run()
    reasons: dict[Any, str] = {}
    for blocks in list(programs):
        off = difference(programs[blocks].run(), want)
        if not off <= _MAX_DIFFERENCE:  # also catches NaN
            reasons[blocks] = f"its result differs by {off:.0e}"
            del programs[blocks]
    return reasons


def _program(
    workload: Workload,
    implementation: str,
    request: tuned.Request,
    blocks: Any,
    arrays: dict[str, Any],
) -> Program | str:
    """Compiles the pass of the request with the given blocks, or returns why it fails."""
    jax.clear_caches()  # else JAX would reuse a trace with other blocks
    with tuned.forcing({request.key: blocks}):
        try:
            return program_of(workload, implementation, request.key.pass_name, arrays)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return str(error).partition("\n")[0]
