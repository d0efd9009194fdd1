"""Measures the operators of this package on the device that is attached.

    python -m kernels_pallas.bench --op=value_aggregation --implementation=all --output=runs/bench

Runs of every implementation, and of a naive implementation ("plain"), are interleaved with a memory
copy. Each gets a record in OUTPUT/<operator>.jsonl: bytes and FLOPs by formula, median and
quartiles of the time, bandwidth relative to the copy, speedups over "xla" and "plain" (median and
quartiles of the ratios within a round), and the relative difference, in norm, from the result of
"xla". At the end, it prints a table and draws a roofline plot, OUTPUT/<operator>.png.
Implementations that do not support a case are listed with their reason.

    python -m kernels_pallas.bench --op=product_key_top_k --implementation=xla --tune

searches for faster block sizes instead and stores them for later calls: see `tuned.py`.
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
_INTERRUPTED = 130  # exit status that shells report after Ctrl-C
_BROKEN_PIPE = 141  # and after SIGPIPE
# Errors of the machine, not bugs: reported without a traceback.
_MACHINE_ERRORS = (
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
    """An output folder is not writable; the message says which and why."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; turns lists into tuples and checks their entries."""
    parser = _Parser(prog="python -m kernels_pallas.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--op", required=True, choices=OPERATORS, help="operator to measure")
    add("--implementation", default="all", help="comma-separated names, which may include plain")
    add("--shapes", help="comma-separated names or tags (ci, model, all); default: by device")
    add("--passes", default="forward,backward", help="forward, backward, both (in one program)")
    add("--ids", help="value_aggregation only: uniform, zipf, equal, ends; default: uniform,zipf")
    add("--dtype", default="float32", help="float32, bfloat16: of tables, or of query and keys")
    add("--repeats", type=int, default=15, help="number of measurement rounds")
    add("--output", help="folder for records and plot; default: print only")
    add("--tune", action="store_true", help="search for block sizes instead, and store them")
    options = parser.parse_args(argv)

    try:
        jax.devices()
    except RuntimeError as error:  # the platform does not exist
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
        parser.error("--tune: the plain implementation has no block sizes")
    if options.output is not None:
        options.output = _output_folder(parser, options)
    try:
        options.shapes = named_shapes(operator, options.shapes)
        if operator_arguments.ids_are_checked():
            raise ValueError("KERNELS_PALLAS_CHECK_IDS=1: checks would distort timings; unset it")
    except ValueError as error:
        parser.error(str(error))
    return options


def _output_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Returns the folder for records and plot, or ends with an error if it cannot be used."""
    if options.tune:
        parser.error("--output: --tune only writes to the folder of KERNELS_PALLAS_TUNED")
    if not report.plot_is_possible():
        parser.error("--output: the plot needs matplotlib: pip install matplotlib")
    if not options.output or "://" in options.output:
        parser.error(f"--output: got {options.output!r}, must be a local folder")
    return Path(options.output).expanduser()


def _names(
    parser: argparse.ArgumentParser, option: str, names: str, known: Sequence[str]
) -> tuple[str, ...]:
    for name in names.split(","):
        if name not in known:
            parser.error(f"--{option}: got {name!r}, must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(names.split(",")))


def workloads(options: argparse.Namespace) -> Iterator[Workload]:
    """Yields the workloads that the options select."""
    operator = OPERATORS[options.op]
    for shape, dtype, ids in itertools.product(options.shapes, options.dtype, options.ids):
        yield Workload(operator, shape, dtype, ids)


def measured(
    workload: Workload, pass_name: Pass, implementations: Sequence[str], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measures the implementations of one pass, interleaved; yields a record for each."""
    arrays = workload.inputs()
    made = {name: measure.program_of(workload, name, pass_name, arrays) for name in implementations}
    programs = {name: p for name, p in made.items() if not isinstance(p, str)}
    copy = "copy of memory"
    times = measure.interleaved_times(programs | {copy: measure.copy_program()}, repeats)
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
    """Searches for block sizes and stores those that beat the heuristic."""
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
            best, measurements = tune.fastest(workload, name, request, options.repeats, print)
            if best == request.default:
                print("  nothing better")
                continue
            path = tuned.file_of(kind)
            tuned.save(path, kind, {request.key: (best, measurements | report.environment())})
            speedup = measurements["speedup_over_heuristic"]
            print(f"  {best}, {speedup:.2f} times as fast, stored in {path}")


def prepare_folder(folder: Path, name: str) -> None:
    """Creates a folder and checks, before anything is measured, that it is writable.

    Args:
        folder: the folder.
        name: the option or variable that set it, for the message.

    Raises:
        FolderError: the folder is not writable.
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
        for measurement in measured(workload, pass_name, options.implementation, options.repeats):
            record = measurement | environment
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
    """Runs the command; user errors and Ctrl-C end it with one line, bugs with a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # surfaces write errors here rather than at interpreter exit
    except (FolderError, tuned.TunedFileError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:
        # The reader is gone (`| head`). Python would flush stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_BROKEN_PIPE)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        name = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {name}{error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    run()
