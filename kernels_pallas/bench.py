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
import errno
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax

from kernels_pallas import arguments as operator_arguments
from kernels_pallas import tuned
from kernels_pallas.benchmark import measure, report, tune
from kernels_pallas.benchmark.measure import reason_of
from kernels_pallas.benchmark.workloads import OPERATORS, PLAIN, Pass, Workload, named_shapes
from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.value_aggregation.shapes import Ids

_DTYPES = ("float32", "bfloat16")
_INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended
_CLOSED = 141  # and of one whose reader went away
# What a machine may come to while a command runs; no bug.
_MACHINE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
)


class FolderError(Exception):
    """Nothing can be written to a folder that was named; the message says which and why."""


class _Parser(argparse.ArgumentParser):
    """Ends with one line, and without the usage, where an argument is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; lists become tuples, and their entries are checked."""
    parser = _Parser(prog="python -m kernels_pallas.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--op", required=True, choices=OPERATORS, help="operator to measure")
    add("--implementation", default="all", help="names parted by commas, of which one may be plain")
    add("--shapes", help="names or tags (ci, model, all) parted by commas; default: the device's")
    add("--passes", default="forward,backward", help="forward, backward, both (in one program)")
    add("--ids", help="uniform, zipf, equal, ends: of value_aggregation; default: uniform,zipf")
    add("--dtype", default="float32", help="float32, bfloat16: of tables, or of query and keys")
    add("--repeats", type=int, default=15, help="rounds of measurements")
    add("--output", help="folder for records and plot; none: print only")
    add("--tune", action="store_true", help="look for block sizes instead, and keep them")
    options = parser.parse_args(argv)

    try:
        jax.devices()
    except RuntimeError as error:  # a platform that there is not
        parser.error(" ".join(str(error).split()))
    operator = OPERATORS[options.op]
    if options.op == "value_aggregation":
        ids = "uniform,zipf" if options.ids is None else options.ids
        options.ids = _names(parser, "ids", ids, get_args(Ids))
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
    if options.output is not None:
        options.output = _output_folder(parser, options)
    try:
        options.shapes = named_shapes(operator, options.shapes)
        if operator_arguments.ids_are_checked():
            raise ValueError("KERNELS_PALLAS_CHECK_IDS=1: checks would be measured; unset it")
    except ValueError as error:
        parser.error(str(error))
    return options


def _output_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Returns the folder for records and a plot, if there is a use for it and it can be one."""
    if options.tune:
        parser.error("--output: --tune writes to the folder of KERNELS_PALLAS_TUNED alone")
    if not report.plot_is_possible():
        parser.error("--output: the plot needs matplotlib: pip install matplotlib")
    if not options.output or "://" in options.output:
        parser.error(f"--output: got {options.output!r}, must be a folder of this machine")
    return Path(options.output).expanduser()


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
        try:
            requests = tune.requests(workload, name)
        except UnsupportedError as error:
            print(f"{case}: no: {reason_of(error, name)}")
            continue
        for request in requests:
            kind = tuned.device_kind(request.platform)
            assert kind is not None  # the default device is attached
            prepare_folder(tuned.file_of(kind).parent, "KERNELS_PALLAS_TUNED")
            print(f"{case} {request.key.pass_name}, from {request.default}", flush=True)
            best, found = tune.fastest(workload, name, request, options.repeats, print)
            if best == request.default:
                print("  nothing better")
                continue
            path = tuned.file_of(kind)
            tuned.save(path, kind, {request.key: (best, found | report.environment())})
            print(f"  {best}, {found['speedup_over_heuristic']:.2f} times as fast, in {path}")


def prepare_folder(folder: Path, name: str) -> None:
    """Makes a folder, and finds out before anything is measured whether it takes files.

    Args:
        folder: the folder.
        name: of what gave it, for the message.

    Raises:
        FolderError: it takes none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FolderError(f"{name}: cannot write to {folder}: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and records."""
    options = arguments(argv)
    if options.tune:
        run_tuning(options)
        return
    if options.output is not None:
        prepare_folder(options.output, "--output")
    environment = report.environment()
    if options.output is not None:
        environment["matrix_flops_per_second"] = measure.matrix_flops_per_second()
    records: list[dict[str, Any]] = []
    for workload, pass_name in itertools.product(workloads(options), options.passes):
        for found in measured(workload, pass_name, options.implementation, options.repeats):
            record = found | environment
            records.append(record)
            if options.output is not None:
                with (options.output / f"{options.op}.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(f"{options.op} on {jax.local_devices()[0].device_kind}, {options.repeats} rounds")
    print(report.table(records))
    if options.output is not None:
        path = options.output / f"{options.op}.png"
        report.roofline(records, path)
        print(f"records and roofline in {options.output}")


def run() -> None:
    """The command: what a user can mend, and Ctrl-C, end it in one line; a bug shows its trace."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # or Python would find out too late that it cannot be written
    except (FolderError, tuned.TunedFileError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:
        # Nobody reads any more (`| head`). Python would flush once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_CLOSED)
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        name = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {name}{error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    run()
