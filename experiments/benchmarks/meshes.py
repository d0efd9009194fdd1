"""Training on meshes and by several processes against one device: how far curves differ.

    python -m experiments.benchmarks.meshes [--cases=PART OF A NAME,...]

Runs the slow tests too, in tests/training/test_layouts.py (every layout of the mesh, on 8 devices,
of a CPU if there are no others) and tests/test_processes.py (killed and resumed as other numbers of
processes), for half an hour. Writes a line for each layout to layouts.jsonl and for each resumed
run to processes.jsonl, and prints tables of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, measurements
from experiments.benchmarks import checks

RESULTS = Path("experiments/results/meshes")
LAYOUTS = "tests/training/test_layouts.py::test_a_layout_trains_as_one_device"
PROCESSES = "tests/test_processes.py::test_a_killed_job_resumes_in_any_number_of_processes"
# The fields that name a case of each file, and the relative differences that it holds.
FILES = {
    "layouts": (("family", "mesh"), ("loss", "gradient_norm")),
    "processes": (
        ("killed", "killed_mesh", "resumed", "resumed_mesh"),
        ("loss", "gradient_norm", "held_out_loss"),
    ),
}


def table(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the relative differences of a file's cases, in Markdown."""
    cases, differences = FILES[name]
    columns = (*cases, *differences)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for record in records:
        cells = [str(record[c]) for c in cases] + [f"{record[d]:.1e}" for d in differences]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Runs the tests; cases that are left out keep their lines."""
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
