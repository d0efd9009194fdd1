"""Kernel backends at the paper's sizes, compiled for chips that are not attached.

    python -m experiments.benchmarks.compile_matrix [--chips=v5e,h200] [--operators=...]
        [--backends=...] [--passes=forward,gradients] [--shapes=...]

Prints what the compilers report, temporaries and cost estimates, and writes it to
compile_matrix.txt, with a line for each case in compile_matrix.jsonl; cases that are not selected
keep their stored lines. The compiler chooses the layouts of arguments and results, so that no copy
between layouts is counted. Nothing runs: none of these numbers is a measured time.
"""

import fcntl
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, measurements
from umv2 import files

RESULTS = Path("experiments/results/kernels")
TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h200": "h200:1",
}
PASSES = ("forward", "gradients")
DTYPES = ("float32", "bfloat16")
IDENTITY = ("chip", "operator", "backend", "shape", "dtype", "pass")

_CHIPS = flags.DEFINE_list("chips", list(TOPOLOGIES), "Chips to compile for.")
_OPERATORS = flags.DEFINE_list("operators", None, "Operators of kernels_pallas; default: all.")
_BACKENDS = flags.DEFINE_list("backends", None, "Backends of the operators; default: all.")
_SHAPES = flags.DEFINE_list("shapes", None, "Shapes of the paper's models; default: all.")
_PASSES = flags.DEFINE_list("passes", list(PASSES), "Passes to compile.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: the chip that this process compiles for.")


def selected() -> dict[str, list[str]]:
    """Returns the values selected by each flag.

    Raises:
      ConfigError: a flag has an unknown value.
    """
    from kernels_pallas.benchmark.workloads import OPERATORS

    operators = list(OPERATORS.values())
    known = [
        (_CHIPS, list(TOPOLOGIES)),
        (_OPERATORS, list(OPERATORS)),
        (_BACKENDS, list(dict.fromkeys(b for o in operators for b in o.backends))),
        (_SHAPES, list(dict.fromkeys(s for o in operators for s in o.paper))),
        (_PASSES, list(PASSES)),
    ]
    for flag, names in known:
        for name in flag.value or ():
            cli.require(f"--{flag.name}={name}", name, names)
    return {flag.name: flag.value or names for flag, names in known}


def cases(chip: str, options: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yields the cases of one chip: plain XLA and the backends for its platform."""
    from kernels_pallas.benchmark.workloads import OPERATORS

    kernels = ("pallas_gpu",) if chip == "h200" else ("pallas_tpu", "pallas_sparsecore")
    for operator in options["operators"]:
        known = [name for name in OPERATORS[operator].backends if name in ("xla", *kernels)]
        backends = [backend for backend in known if backend in options["backends"]]
        shapes = [s for s in OPERATORS[operator].paper if s in options["shapes"]]
        for values in itertools.product(backends, shapes, DTYPES, options["passes"]):
            yield dict(zip(IDENTITY[1:], (operator, *values), strict=True))


def compile_case(case: Mapping[str, str], mesh: Any) -> dict[str, Any]:
    """Returns what the compiler reports of a case, or why the case is refused or fails."""
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import NamedSharding, PartitionSpec

    from kernels_pallas.benchmark.workloads import OPERATORS, Workload, differentiated
    from kernels_pallas.dispatch import UnsupportedError

    operator = OPERATORS[case["operator"]]
    (shape,) = (s for s in operator.shapes if s.name == case["shape"])
    workload = Workload(operator, shape, case["dtype"])
    call = workload.call(case["backend"])

    def gradients(arrays: dict[str, Any]) -> Any:
        by, others = workload.split(arrays)
        result, vjp, _ = jax.vjp(differentiated(call, others), by, has_aux=True)
        return vjp(result)

    function = call if case["pass"] == "forward" else gradients
    arguments = shape.arguments(case["dtype"])
    sharding = NamedSharding(mesh, PartitionSpec())
    auto = Format(Layout.AUTO, sharding)
    formats: dict[str, Any] = dict.fromkeys(arguments, auto)
    outs: Any = auto
    start = time.perf_counter()
    try:
        results = jax.eval_shape(function, arguments)
        if case["backend"] == "pallas_sparsecore":
            # The compiler never chooses an untiled layout by itself. Scores cannot have one: the
            # copy that transposes them to [T, c, K] counts as a temporary.
            outs = jax.tree.map(lambda x: contiguous(x, sharding), results)
            named = {n: contiguous(x, sharding) for n, x in arguments.items() if n != "scores"}
            formats |= named
        jitted = jax.jit(function, in_shardings=(formats,), out_shardings=outs)
        program = jitted.lower(arguments).compile()
    except UnsupportedError as error:
        return {"refused": str(error).rpartition(f"{case['backend']!r}: ")[2]}
    except jax.errors.JaxRuntimeError as error:
        return {"failed": " ".join(str(error).split())[:200]}
    # For GPUs that are not attached the compiler gives no estimate.
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    assert memory is not None
    seconds = cost.get("optimal_seconds", -1.0)
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "result_bytes": memory.output_size_in_bytes,
        "compilers_estimate": {
            "bytes_accessed": cost.get("bytes accessed"),
            "flops": cost.get("flops"),
            # Negative where the compiler has no estimate of the time.
            "seconds": seconds if seconds > 0 else None,
        },
        "compile_seconds": round(time.perf_counter() - start, 2),
    }


def contiguous(array: Any, sharding: Any) -> Any:
    """Returns the layout that SparseCore kernels read: contiguous rows, multiples of 32 bytes."""
    from jax.experimental.layout import Format, Layout

    order = tuple(range(len(array.shape)))
    return Format(Layout(order, tiling=((32 // array.dtype.itemsize,),)), sharding)


def run_worker(chip: str, options: Mapping[str, Sequence[str]]) -> None:
    """Compiles for one chip; prints a line of JSON for each case."""
    import jax
    from jax.sharding import Mesh

    from umv2.planning import topology

    mesh = Mesh(topology.parse(TOPOLOGIES[chip]).devices()[:1], ("device",))
    with jax.set_mesh(mesh):
        for case in cases(chip, options):
            print(json.dumps({"chip": chip} | case | compile_case(case, mesh)), flush=True)


def run_chip(chip: str, options: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Compiles for one chip in a process of its own.

    Raises:
      UserError: the chip's compiler is not installed.
    """
    from umv2.planning import topology

    target = topology.parse(TOPOLOGIES[chip])
    arguments = [f"--{name}={','.join(names)}" for name, names in options.items()]
    command = [sys.executable, "-m", "experiments.benchmarks.compile_matrix", *arguments]
    lines = []
    with Path(tempfile.gettempdir(), f"umv2_{target.chip.platform}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # libtpu serves one process per machine at a time
        with subprocess.Popen(
            [*command, f"--worker={chip}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | target.environment,
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                sys.stderr.write(text)
                lines.append(json.loads(text))
    if process.returncode:
        raise RuntimeError(f"{chip}: the process exited with status {process.returncode}")
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the matrix as text in aligned columns."""
    from kernels_pallas.benchmark.report import aligned

    titles = ("temporaries MiB", "arguments MiB", "results MiB")
    estimates = ("estimated GB", "estimated ms")
    rows: list[tuple[str, ...]] = [(*IDENTITY, *titles, *estimates, "compile s")]
    for line in lines:
        case = tuple(line[name] for name in IDENTITY)
        if "refused" in line or "failed" in line:
            what = f"no: {line['refused']}" if "refused" in line else f"failed: {line['failed']}"
            rows.append((*case, what))
            continue
        estimate = line["compilers_estimate"]
        sizes = (line[f"{name}_bytes"] for name in ("temporary", "argument", "result"))
        known = (estimate["bytes_accessed"], 1e-9), (estimate["seconds"], 1e3)
        rows.append(
            (
                *case,
                *(f"{size / 2**20:.1f}" for size in sizes),
                *("" if x is None else f"{x * unit:.3g}" for x, unit in known),
                f"{line['compile_seconds']:.1f}",
            )
        )
    return "\n".join(
        (
            aligned(rows),
            "",
            "Estimates are the compiler's, not measurements. They count a loop body once, and",
            "for a kernel the cost that its author declares.",
        )
    )


def ordered(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the lines sorted by case, without those of backends that no longer exist."""
    from kernels_pallas.benchmark.workloads import OPERATORS

    chips, operators = list(TOPOLOGIES), list(OPERATORS)

    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        operator = OPERATORS[line["operator"]]
        return (
            operators.index(line["operator"]),
            PASSES.index(line["pass"]),
            list(operator.backends).index(line["backend"]),
            chips.index(line["chip"]),
            operator.paper.index(line["shape"]),
            DTYPES.index(line["dtype"]),
        )

    known = {(name, backend) for name in operators for backend in OPERATORS[name].backends}
    kept = [line for line in lines if (line["operator"], line["backend"]) in known]
    return sorted(kept, key=key)


def main(_: list[str]) -> None:
    """Compiles the selected cases, then writes all results."""
    options = selected()
    if _WORKER.value is not None:
        run_worker(_WORKER.value, options)
        return
    path = RESULTS / "compile_matrix.jsonl"
    measurements.require_writable(path)
    about = measurements.about()
    lines = [about | line for chip in options["chips"] for line in run_chip(chip, options)]
    results = ordered(measurements.merged(path, lines, IDENTITY))
    measurements.write(path, results)
    files.write_text(RESULTS / "compile_matrix.txt", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    cli.run(main)
