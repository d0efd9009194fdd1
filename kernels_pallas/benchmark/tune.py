"""Looks for the fastest blocks of a backend at a workload, on the device that is attached."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kernels_pallas import tuned
from kernels_pallas.benchmark.measure import Program, difference, in_turns, program_of
from kernels_pallas.benchmark.workloads import Workload, differentiated

_FACTORS = (0.25, 0.5, 2, 4)
_MOST_DIFFERENCE = 0.02  # in norm: sums in another order, rounded to bfloat16, differ by less
_LEAST_GAIN = 1.03  # less is noise, and a number to keep for nothing


def requests(workload: Workload, implementation: str) -> list[tuned.Request]:
    """The choices of blocks that the passes of a workload make, as its trace tells."""
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
    """The same blocks with other values of one field."""
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
    tell: Callable[[str], None],
) -> tuple[Any, dict[str, Any]]:
    """Goes from the heuristic's blocks to better ones, field by field, until none is found.

    A candidate has to be 3 % faster than the best so far, by the median over the rounds.

    Returns:
        The blocks, and what was measured of them.
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
                    tell(f"    {blocks}: no: {program}")
                else:
                    programs[blocks] = program
            if best not in programs:
                return best, {"reason": tried[best]}
            for blocks, reason in _strays(programs, best).items():
                tried[blocks] = reason
                tell(f"    {blocks}: no: {reason}")
            times = in_turns(programs, rounds)
            start = times[best]
            for blocks, found in times.items():
                speedup, _ = found.speedup_over(start)
                tried[blocks] = f"{speedup:.2f}"
                tell(f"    {blocks}: {1e3 * found.median:.3g} ms, {speedup:.2f} times as fast")
            winner = max(times, key=lambda blocks: times[blocks].speedup_over(start)[0])
            speedup, _ = times[winner].speedup_over(start)
            if winner != best and speedup >= _LEAST_GAIN:
                best, gain, improved = winner, gain * speedup, True
            seconds = times[best].median
    return best, {
        "seconds": seconds,
        "speedup_over_heuristic": gain,
        "heuristic": dataclasses.asdict(request.default),
    }


def _strays(programs: dict[Any, Program], best: Any) -> dict[Any, str]:
    """Takes out the programs that do not compute what the best so far does; says by how much."""
    want = programs[best].run()
    found: dict[Any, str] = {}
    for blocks in list(programs):
        off = difference(programs[blocks].run(), want)
        if not off <= _MOST_DIFFERENCE:  # which NaN is not either
            found[blocks] = f"its result differs by {off:.0e}"
            del programs[blocks]
    return found


def _program(
    workload: Workload,
    implementation: str,
    request: tuned.Request,
    blocks: Any,
    arrays: dict[str, Any],
) -> Program | str:
    """The program of the pass that the blocks are for, compiled with them."""
    jax.clear_caches()  # or JAX would take a trace with other blocks
    with tuned.forcing({request.key: blocks}):
        try:
            return program_of(workload, implementation, request.key.pass_name, arrays)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            return str(error).partition("\n")[0]
