"""Training on meshes and in several processes, compared with one device: how far curves differ.

    python -m experiments.benchmarks.meshes [--cases=PART OF A NAME,...]

Runs tests/training/test_layouts.py (every mesh layout, on 8 devices: CPU devices if there are no
others) and tests/test_processes.py (killed and resumed with other numbers of processes), slow tests
included, which takes half an hour. Writes a line for each layout to layouts.jsonl and for each
resumed run to processes.jsonl, and prints both as tables.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, measurements
from experiments.benchmarks import checks

RESULTS = Path("experiments/results/meshes")
LAYOUTS = "tests/training/test_layouts.py::test_a_layout_trains_like_one_device"
PROCESSES = "tests/test_processes.py::test_a_killed_job_resumes_in_any_number_of_processes"
# For each file, the fields that identify a case and the relative differences that it stores.
FILES = {
    "layouts": (("family", "mesh"), ("loss", "gradient_norm")),
    "processes": (
        ("killed", "killed_mesh", "resumed", "resumed_mesh"),
        ("loss", "gradient_norm", "held_out_loss"),
    ),
}


def table(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the relative differences of a file's cases as a Markdown table."""
    cases, differences = FILES[name]
    columns = (*cases, *differences)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for record in records:
        cells = [str(record[c]) for c in cases] + [f"{record[d]:.1e}" for d in differences]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Runs the tests; cases that do not run keep their stored lines."""
    paths = {name: RESULTS / f"{name}.jsonl" for name in FILES}
    for path in paths.values():
        measurements.require_writable(path)
    outcome = checks.run(LAYOUTS, PROCESSES)
    for name, path in paths.items():
        by = FILES[name][0]
        new = [record for record in outcome.records if set(by) <= record.keys()]
        if records := measurements.merged(path, new, by):
            measurements.write(path, records)
            print(f"{name}\n{table(name, records)}")
    outcome.require_passed()


if __name__ == "__main__":
    cli.run(main)
