"""Regenerates tables and figures from stored results, without measuring anything.

    python -m experiments.benchmarks.redraw

Costs are computed from the configurations; the loss curve of cpu_small and the rooflines are drawn
from the records next to them. Some results have a report command of their own:
experiments.ablations.report, experiments.benchmarks.latency_report and
experiments.benchmarks.long_context --long_context_report.
"""

import importlib
import json
from pathlib import Path

from experiments import cli, measurements
from umv2 import files

RESULTS = Path("experiments/results")
COSTS = ("227m_1b2", "1b_7b")
# The first one is the baseline of the comparison.
_FAMILIES = ("moe", None, "moe_2_of_16", "dense", "ultramem", "memory_plus")
_CONTEXT_LENGTH = 2048
_TABLE_WIDTH = 200  # for a file: all families side by side


def cost(size: str, folder: Path) -> None:
    """Writes `table.txt` and `cost.png` of the families at one size of the paper."""
    from umv2.config import from_config_dict
    from umv2.cost import report

    module = f"paper_{size}"
    get_config = importlib.import_module(f"configs.{module}").get_config
    configs = {
        f"{module}:{family}" if family else module: from_config_dict(
            get_config(family) if family else get_config()
        )
        for family in _FAMILIES
    }
    cost_report = report.cost_report(configs, context_length=_CONTEXT_LENGTH)
    files.write_text(folder / "table.txt", cost_report.as_text(_TABLE_WIDTH) + "\n")
    cost_report.draw(folder / "cost.png")


def loss(folder: Path) -> None:
    """Draws `loss.png` from the metrics of a run and its evaluation."""
    from umv2.evaluation import report

    path = folder / "evaluation.json"
    with files.errors(path, "cannot be read"):
        compressors = json.loads(path.read_text())["compressors"]
    report.plot_loss(folder / "metrics.jsonl", folder / "loss.png", compressors)


def rooflines(folder: Path) -> None:
    """Draws a roofline for each file of an operator's records."""
    from kernels_pallas.benchmark import report

    for path in sorted(folder.glob("*.jsonl")):
        report.roofline(measurements.read(path), path.with_suffix(".png"))


def main(_: list[str]) -> None:
    """Regenerates everything."""
    if not RESULTS.is_dir():
        raise files.FileError(f"{RESULTS}: no such folder here; run this in the clone")
    for size in COSTS:
        cost(size, RESULTS / f"cost_{size}")
    loss(RESULTS / "cpu_small")
    rooflines(RESULTS / "kernels" / "cpu")
    print(f"wrote tables and figures in {RESULTS}")


if __name__ == "__main__":
    cli.run(main)
