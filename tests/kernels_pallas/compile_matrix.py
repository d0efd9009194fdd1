"""Every backend of every operator at the paper's sizes, compiled for chips that are not attached.

    python -m tests.kernels_pallas.compile_matrix [--chips=v5e,h200] [--operators=...]
        [--backends=...] [--passes=forward,gradients] [--shapes=...]

prints a matrix of what the compiler says, temporaries and its own estimate of the cost, and writes
it, with a JSON line for each case, under experiments/results/kernels; cases that are left out keep
the line they had. Arguments and results have the layouts that the compiler chooses for them, so
that no copy from one layout to another is counted. Nothing runs: none of these numbers is a time
that anyone measured.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.benchmark.report import aligned, environment
from kernels_pallas.benchmark.workloads import OPERATORS, Workload, differentiated
from kernels_pallas.dispatch import UnsupportedError
from tests.kernels_pallas import aot
from tests.kernels_pallas.conformance import DTYPES, PLATFORMS, RESULTS
from tests.kernels_pallas.sparsecore_compile import contiguous
from umv2.planning.topology import H200

TOPOLOGIES = {chip.partition(":")[0]: chip for chip in aot.CHIPS} | {"h200": "1x1x1"}
PASSES = ("forward", "gradients")
IDENTITY = ("chip", "operator", "backend", "shape", "dtype", "pass")


def cases(chip: str, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """What to compile for one chip: plain XLA, and the backends that are for its platform."""
    platforms = ("cpu", "gpu" if chip == "h200" else "tpu")  # "xla" is tested on CPU
    for operator in options.operators:
        known = [b for b in OPERATORS[operator].backends if PLATFORMS[b] in platforms]
        backends = [backend for backend in known if backend in options.backends]
        shapes = [s for s in OPERATORS[operator].paper if s in options.shapes]
        for values in itertools.product(backends, shapes, DTYPES, options.passes):
            yield dict(zip(IDENTITY[1:], (operator, *values), strict=True))


def devices(chip: str) -> Sequence[Any]:
    """One device of a kind that is not attached."""
    name = TOPOLOGIES[chip]
    if chip == "h200":
        topology = topologies.get_topology_desc(
            "h200", platform="cuda", topology=name, target_config=H200
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topology.devices[:1]


def outcome(case: dict[str, str], mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of a case, or who refuses it and why."""
    operator = OPERATORS[case["operator"]]
    (shape,) = (s for s in operator.shapes if s.name == case["shape"])
    workload = Workload(operator, shape, case["dtype"])
    call = workload.call(case["backend"])

    def gradients(arrays: dict[str, Any]) -> Any:
        chosen, others = workload.split(arrays)
        result, vjp, _ = jax.vjp(differentiated(call, others), chosen, has_aux=True)
        return vjp(result)

    function = call if case["pass"] == "forward" else gradients
    arguments = shape.arguments(case["dtype"])
    sharding = NamedSharding(mesh, PartitionSpec())
    free = Format(Layout.AUTO, sharding)
    formats: dict[str, Any] = dict.fromkeys(arguments, free)
    outs: Any = free
    start = time.perf_counter()
    try:
        results = jax.eval_shape(function, arguments)
        if case["backend"] == "pallas_sparsecore":
            # The compiler chooses no layout without tiles on its own, and knows none for scores:
            # the copy that transposes them to [T, c, K] counts among the temporaries.
            outs = jax.tree.map(lambda x: contiguous(x, sharding), results)
            named = {n: contiguous(x, sharding) for n, x in arguments.items() if n != "scores"}
            formats |= named
        jitted = jax.jit(function, in_shardings=(formats,), out_shardings=outs)
        program = jitted.lower(arguments).compile()
    except UnsupportedError as error:
        return {"refused": str(error).rpartition(f"{case['backend']!r}: ")[2]}
    except jax.errors.JaxRuntimeError as error:
        return {"failed": " ".join(str(error).split())[:200]}
    # Of GPUs that are not attached the compiler gives no estimate.
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
            # Of some programs the compiler knows no time, and then it is negative.
            "seconds": seconds if seconds > 0 else None,
        },
        "compile_seconds": round(time.perf_counter() - start, 2),
    }


def work(chip: str, options: argparse.Namespace) -> None:
    """Compiles for one chip; a line of standard output for each case."""
    mesh = Mesh(devices(chip), ("device",))
    with jax.set_mesh(mesh):
        for case in cases(chip, options):
            line = {"chip": chip} | case | outcome(case, mesh)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def run_chip(chip: str, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Compiles for one chip in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, *argv, f"--worker={chip}"]
    lines = []
    with (
        aot.environment("h200" if chip == "h200" else "tpu") as variables,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        ) as process,
    ):
        assert process.stdout is not None
        for text in process.stdout:
            sys.stderr.write(text)
            lines.append(json.loads(text))
    if process.returncode:
        raise RuntimeError(f"{chip}: the process ended with {process.returncode}")
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The matrix; the bytes of a loop's body count once in the compiler's estimate."""
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
            "Estimates are the compiler's own, not measurements. They count the body of a loop",
            "once, and of a kernel what its author says that it moves.",
        )
    )


def merged(path: Path, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a file with those of the same cases replaced, ordered by case."""
    old = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    by_case = {tuple(line[name] for name in IDENTITY): line for line in [*old, *lines]}
    chips, operators = list(TOPOLOGIES), list(OPERATORS)

    def place(line: dict[str, Any]) -> tuple[Any, ...]:
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
    kept = [x for x in by_case.values() if (x["operator"], x["backend"]) in known]
    return sorted(kept, key=place)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    operators = list(OPERATORS.values())
    known = {
        "chips": list(TOPOLOGIES),
        "operators": list(OPERATORS),
        "backends": list(dict.fromkeys(b for o in operators for b in o.backends)),
        "shapes": list(dict.fromkeys(s for o in operators for s in o.paper)),
        "passes": list(PASSES),
    }
    parser = argparse.ArgumentParser()
    for name, values in known.items():
        parser.add_argument(f"--{name}", default=values, type=lambda text: text.split(","))
    parser.add_argument("--worker", help="for this script's own use: compile for this chip")
    options = parser.parse_args()
    for name, values in known.items():
        for value in getattr(options, name):
            if value not in values:
                parser.error(f"--{name}: got {value!r}, must be one of {', '.join(values)}")
    if options.worker:
        work(options.worker, options)
        return

    where = {name: x for name, x in environment().items() if name in ("date", "versions")}
    lines = [line | where for chip in options.chips for line in run_chip(chip, sys.argv[1:])]
    RESULTS.mkdir(parents=True, exist_ok=True)
    everything = merged(RESULTS / "compile_matrix.jsonl", lines)
    (RESULTS / "compile_matrix.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in everything)
    )
    matrix = table(everything) + "\n"
    (RESULTS / "compile_matrix.txt").write_text(matrix)
    sys.stdout.write(matrix)


if __name__ == "__main__":
    main()
