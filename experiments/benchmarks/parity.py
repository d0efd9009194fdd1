"""Numerical errors of our layers against the published PyTorch layers, by file of tests/golden.

    python -m experiments.benchmarks.parity [--cases=PART OF A NAME,...]

Runs tests/parity/test_golden.py, writes a line for each file and dtype to parity.jsonl, and prints
the worst error of any compared array relative to its largest entry.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, measurements
from experiments.benchmarks import checks

RESULTS = Path("experiments/results/parity/parity.jsonl")
TESTS = "tests/parity/test_golden.py"
_COLUMNS = [(dtype, name) for dtype in ("float32", "float64") for name in ("values", "gradients")]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the worst errors of each file as a Markdown table."""
    by_case = {(record["file"], record["dtype"]): record for record in records}
    lines = ["| file | " + " | ".join(map(" ".join, _COLUMNS)) + " |", "|" + " --- |" * 5]
    for file in sorted({file for file, _ in by_case}):
        cells = [_cell(by_case.get((file, dtype), {}).get(name)) for dtype, name in _COLUMNS]
        lines.append(f"| {file} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(error: float | None) -> str:
    return "none" if error is None else f"{error:.1e}"


def main(_: list[str]) -> None:
    """Runs the tests; files that do not run keep their stored lines."""
    measurements.require_writable(RESULTS)
    outcome = checks.run(TESTS)
    records = measurements.merged(RESULTS, outcome.records, ["file", "dtype"])
    measurements.write(RESULTS, records)
    print(table(records))
    outcome.require_passed()


if __name__ == "__main__":
    cli.run(main)
