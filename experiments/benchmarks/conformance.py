"""Numerical errors of every kernel backend against the float32 reference, at small shapes.

    python -m experiments.benchmarks.conformance [--cases=PART OF A NAME,...]

Runs tests/kernels_pallas/conformance.py, with the kernels in the interpreter of their platform, and
writes a line for each case to conformance.jsonl and a table of all cases to conformance.txt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, measurements
from experiments.benchmarks import checks
from umv2 import files

RESULTS = Path("experiments/results/kernels")
TESTS = "tests/kernels_pallas/conformance.py"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns counts and worst error by operator, backend, dtype and pass, then the refusals."""
    from kernels_pallas.benchmark.report import aligned

    counted = ("passed", "failed", "refused")
    rows: list[tuple[str, ...]] = [
        ("operator", "backend", "dtype", "pass", *counted, "worst error", "of tolerated", "at")
    ]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in records:
        groups.setdefault((line["operator"], line["backend"], line["dtype"]), []).append(line)
    for group, lines in groups.items():
        run = [line for line in lines if "refused" not in line]
        for name in ("forward", "gradients"):
            failed = sum(line[name]["share"] > 1 for line in run)
            counts = (str(len(run) - failed), str(failed), str(len(lines) - len(run)))
            worst = max(run, key=lambda line: line[name]["share"], default=None)
            where = ("", "", "")
            if worst is not None:
                error = worst[name]
                where = (
                    f"{error['largest']:.1e}",
                    f"{error['share']:.2f}",
                    f"{worst['shape']['name']}, {error['array']}",
                )
            rows.append((*group, name, *counts, *where))
    refusals = [f"{line['case']}: {line['refused']}" for line in records if "refused" in line]
    return "\n".join((aligned(rows), "", "refused", *refusals)) + "\n"


def main(_: list[str]) -> None:
    """Runs the cases; those that do not run keep their stored lines."""
    path = RESULTS / "conformance.jsonl"
    measurements.require_writable(path)
    outcome = checks.run(TESTS)
    records = measurements.merged(path, outcome.records, ["case"])
    measurements.write(path, records)
    files.write_text(RESULTS / "conformance.txt", table(records))
    print(table(records))
    outcome.require_passed()


if __name__ == "__main__":
    cli.run(main)
