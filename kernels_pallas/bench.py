"""Measures the operators of this package on the device that is attached.

    python -m kernels_pallas.bench --op=value_aggregation --implementation=all --output=runs/bench

Every implementation, and the plain form that one writes first, takes turns with a copy of memory.
A record of each goes to OUTPUT/<operator>.jsonl: bytes and FLOP by formula, median and quartiles of
the time, bytes per second beside the copy's, how many times as fast it is as "xla" and as "plain"
(medians and quartiles of the ratios within a round), and the relative difference, in norm, from
what "xla" computes. At the end come a table and, in OUTPUT/<operator>.png, a roofline plot.
Implementations that cannot take a case are listed with what they say.

    python -m kernels_pallas.bench --op=product_key_top_k --implementation=xla --tune

looks for better block sizes instead, and writes them where calls find them: see `tuned.py`.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from kernels_pallas import tuned
from kernels_pallas.benchmark import measure, report, tune
from kernels_pallas.benchmark.workloads import OPERATORS, PLAIN, Pass, Workload, named_shapes
from kernels_pallas.value_aggregation.shapes import Ids

_DTYPES = ("float32", "bfloat16")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; lists become tuples, and their entries are checked."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.bench", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--op", required=True, choices=OPERATORS, help="operator to measure")
    add("--implementation", default="all", help="names parted by commas, of which one may be plain")
    add("--shapes", help="names or tags (ci, model, all) parted by commas; default: the device's")
    add("--passes", default="forward,backward", help="forward, backward, both (in one program)")
    add("--ids", help="uniform, zipf, equal, ends: of value_aggregation; default: uniform,zipf")
    add("--dtype", default="float32", help="float32, bfloat16: of tables, or of query and keys")
    add("--repeats", type=int, default=15, help="rounds of measurements")
    add("--output", type=Path, help="folder for records and plot; none: print only")
    add("--tune", action="store_true", help="look for block sizes instead, and keep them")
    options = parser.parse_args(argv)

    operator = OPERATORS[options.op]
    if options.op == "value_aggregation":
        options.ids = _names(parser, "ids", options.ids or "uniform,zipf", get_args(Ids))
    elif options.ids is None:
        options.ids = (None,)
    else:
        parser.error(f"--ids: {options.op} takes no ids")
    known = (*operator.backends, PLAIN)
    if options.implementation == "all":
        options.implementation = ",".join(operator.backends if options.tune else known)
    options.implementation = _names(parser, "implementation", options.implementation, known)
    options.passes = _names(parser, "passes", options.passes, get_args(Pass))
    options.dtype = _names(parser, "dtype", options.dtype, _DTYPES)
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, must be at least 1")
    if options.tune and PLAIN in options.implementation:
        parser.error("--tune: the plain form has no block sizes")
    if options.output is not None and not options.tune and not report.plot_is_possible():
        parser.error("--output: the plot needs matplotlib: pip install matplotlib")
    try:
        options.shapes = named_shapes(operator, options.shapes)
    except ValueError as error:
        parser.error(str(error))
    return options


def _names(
    parser: argparse.ArgumentParser, option: str, names: str, known: Sequence[str]
) -> tuple[str, ...]:
    for name in names.split(","):
        if name not in known:
            parser.error(f"--{option}: got {name!r}, must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(names.split(",")))


def workloads(options: argparse.Namespace) -> Iterator[Workload]:
    """The cases of a command line."""
    operator = OPERATORS[options.op]
    for shape, dtype, ids in itertools.product(options.shapes, options.dtype, options.ids):
        yield Workload(operator, shape, dtype, ids)


def measured(
    workload: Workload, pass_name: Pass, implementations: Sequence[str], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measures the implementations of one pass in turns; yields a record of each."""
    arrays = workload.inputs()
    made = {name: measure.program_of(workload, name, pass_name, arrays) for name in implementations}
    programs = {name: p for name, p in made.items() if not isinstance(p, str)}
    copy = "copy of memory"
    times = measure.in_turns(programs | {copy: measure.copy_program()}, repeats)
    num_bytes, flops = workload.cost(pass_name)
    copied = 2 * measure.COPY_BYTES / times[copy].median
    for name, program in made.items():
        record = workload.describe() | {"pass": pass_name, "implementation": name}
        if isinstance(program, str):
            yield record | {"reason": program}
            continue
        seconds = times[name].median
        record |= {
            "rounds": repeats,
            "calls_per_round": program.calls,
            "median_seconds": seconds,
            "quartiles_seconds": times[name].quartiles,
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
            "bytes": num_bytes,
            "flops": flops,
            "bytes_per_second": num_bytes / seconds,
            "flops_per_second": flops / seconds,
            "copy_bytes_per_second": copied,
            "share_of_copy": num_bytes / seconds / copied,
        }
        for other in ("xla", PLAIN):
            if other in programs and other != name:
                ratio, spread = times[name].speedup_over(times[other])
                record[f"speedup_over_{other}"] = ratio
                record[f"speedup_over_{other}_quartiles"] = spread
        if "xla" in programs and name != "xla":
            record["difference"] = measure.difference(program.run(), programs["xla"].run())
        yield record


def run_tuning(options: argparse.Namespace) -> None:
    """Looks for block sizes and keeps those that beat the heuristic's."""
    for workload, name in itertools.product(workloads(options), options.implementation):
        case = f"{options.op} {workload.shape.name} {workload.dtype} {workload.ids or ''} {name}"
        for request in tune.requests(workload, name):
            kind = tuned.device_kind(request.platform)
            assert kind is not None  # the default device is attached
            print(f"{case} {request.key.pass_name}, from {request.default}", flush=True)
            best, found = tune.fastest(workload, name, request, options.repeats, print)
            if best == request.default:
                print("  nothing better")
                continue
            path = tuned.file_of(kind)
            tuned.save(path, kind, {request.key: (best, found | report.environment())})
            print(f"  {best}, {found['speedup_over_heuristic']:.2f} times as fast, in {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and records."""
    options = arguments(argv)
    if options.tune:
        run_tuning(options)
        return
    environment = report.environment()
    records: list[dict[str, Any]] = []
    for workload, pass_name in itertools.product(workloads(options), options.passes):
        for found in measured(workload, pass_name, options.implementation, options.repeats):
            record = found | environment
            records.append(record)
            if options.output is not None:
                options.output.mkdir(parents=True, exist_ok=True)
                with (options.output / f"{options.op}.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(f"{options.op} on {jax.local_devices()[0].device_kind}, {options.repeats} rounds")
    print(report.table(records))
    if options.output is not None:
        path = options.output / f"{options.op}.png"
        report.roofline(records, path, matrix_flops=measure.matrix_flops_per_second())
        print(f"records and roofline in {options.output}")


if __name__ == "__main__":
    main()
