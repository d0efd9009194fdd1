"""Report of experiments.benchmarks.latency: ratios to UltraMemV2, in time and in traffic.

Usage: python -m experiments.benchmarks.latency_report
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, measurements
from umv2 import files

_FILE = flags.DEFINE_string(
    "latency_file", "experiments/results/latency/latency.jsonl", "File of the measurements."
)
REFERENCE = "ultramem_v2"
# Fields that every record has.
_FIELDS = ("kind", "size", "family", "context", "seconds", "device", "platform", "versions", "date")
Cells = dict[tuple[str, int], dict[int, dict[str, dict[str, Any]]]]


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file.

    Raises:
      RecordsError: the file has no records, or a line that is not one.
      FileError: the file cannot be read.
    """
    records = measurements.read(path)
    if not records:
        raise measurements.RecordsError(f"{path}: has no measurements")
    for number, record in enumerate(records, start=1):
        if missing := [name for name in _FIELDS if name not in record]:
            raise measurements.RecordsError(
                f"{path}: line {number} is not a record of experiments.benchmarks.latency: no"
                f" {missing[0]!r}"
            )
    return records


def decode_cells(records: list[dict[str, Any]]) -> Cells:
    """Groups decode steps by (size, context), then batch, then family; keeps the first of each."""
    cells: Cells = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["kind"] == "decode":
            cell = cells[record["size"], record["context"]][record["batch"]]
            # A later record of a family belongs to another interleaved run.
            cell.setdefault(record["family"], record)
    return cells


def ratio(record: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float, float]:
    """Returns the ratio of a step's time to the reference's: median, lower and upper quartile.

    Ratios are taken within a round, so that a slow spell of the machine affects both.
    """
    rounds = [a / b for a, b in zip(record["seconds"], reference["seconds"], strict=True)]
    if len(rounds) == 1:
        return rounds[0], rounds[0], rounds[0]
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return median, low, high


def table(cells: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    """Returns the lines of a Markdown table for one size and context."""
    lines = [
        "| batch | family | time vs UltraMemV2 | traffic vs UltraMemV2 | ms per step |"
        " tokens/s | reads, GB/s | of a pass over memory |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for batch in sorted(cells):
        reference = cells[batch].get(REFERENCE)
        for family, record in cells[batch].items():
            seconds = statistics.median(record["seconds"])
            rate = record["traffic_bytes"] / seconds
            peak = statistics.median(record["read_bytes_per_second"])
            times = traffic = ""
            if reference is not None:
                median, low, high = ratio(record, reference)
                times = f"{median:.2f} ({low:.2f} to {high:.2f})"
                traffic = f"{record['traffic_bytes'] / reference['traffic_bytes']:.2f}"
            lines.append(
                f"| {batch} | {family} | {times} | {traffic} | {1e3 * seconds:.1f} |"
                f" {batch / seconds:,.0f} | {rate / 1e9:.1f} | {100 * rate / peak:.0f} % |"
            )
    return lines


def draw(cells: Cells, image: Path) -> None:
    """Draws, for each size and context, the ratios of time and of traffic over the batch size.

    Raises:
      FileError: the file cannot be written.
    """
    from matplotlib.lines import Line2D

    from umv2 import pictures

    keys = sorted(cells)
    families = list(
        dict.fromkeys(
            name
            for key in keys
            for records in cells[key].values()
            for name in records
            if REFERENCE in records and name != REFERENCE
        )
    )
    # Measured curves do not coincide, so every marker is drawn, thin enough to show the whiskers.
    measured = {"linewidth": 1.6, "markersize": 6, "markevery": None}
    styles = {
        family: style | measured
        for family, style in zip(families, pictures.curve_styles(len(families)), strict=True)
    }
    figure = pictures.new(5.2 * len(keys), 5.0)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        batches = sorted(batch for batch in cells[key] if REFERENCE in cells[key][batch])
        for family, style in styles.items():
            shown = [batch for batch in batches if family in cells[key][batch]]
            ratios = [ratio(cells[key][b][family], cells[key][b][REFERENCE]) for b in shown]
            medians = [value for value, _, _ in ratios]
            low = [value - lowest for value, lowest, _ in ratios]
            high = [highest - value for value, _, highest in ratios]
            axes.errorbar(shown, medians, (low, high), elinewidth=1.2, capsize=3, **style)
            bytes_read = [
                cells[key][b][family]["traffic_bytes"] / cells[key][b][REFERENCE]["traffic_bytes"]
                for b in shown
            ]
            axes.plot(shown, bytes_read, linestyle="--", linewidth=1.2, color=style["color"])
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set(xlabel="sequences", ylabel="times UltraMemV2's", ylim=(0, None))
        axes.set_title(pictures.literal(f"{key[0]}, {key[1]:,} positions in the cache", 50))
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], **style) for style in styles.values()]
    handles.append(Line2D([], [], color="gray", linestyle="--", linewidth=1.2))
    pictures.legend_below(figure, handles, [*families, "dashed: bytes read"])
    pictures.save(figure, image)


def main(_: list[str]) -> None:
    """Writes README.md, which includes notes.md, and latency.png next to the measurements."""
    path = cli.path(_FILE)
    records = read(path)
    cells = decode_cells(records)
    sweeps = {key: value for key, value in cells.items() if _is_sweep(value)}
    if sweeps:
        draw(sweeps, path.parent / "latency.png")
    first = records[0]
    lines = [
        "# Decode latency and traffic",
        "",
        f"Measured on {first['device']} ({first['platform']}), jax {first['versions']['jax']},"
        f" {first['date']}; written by `python -m experiments.benchmarks.latency_report`."
        " Full-size models with random weights, in bfloat16 unless a family says float32; greedy"
        " decoding, families interleaved in one process, medians and quartiles over rounds. Traffic"
        " is what a step must read (`umv2.cost.traffic`); a pass over memory sums an array of 512"
        " MiB in the same run.",
        "",
    ]
    if sweeps:
        lines += ["![ratios](latency.png)", ""]
    notes = path.parent / "notes.md"
    if notes.exists():
        lines += [notes.read_text().rstrip(), ""]
    for size, context in sorted(cells):
        lines += [f"## {size}, context {context:,}", "", *table(cells[size, context]), ""]
    prefills = [record for record in records if record["kind"] == "prefill"]
    if prefills:
        lines += ["## Prefill", "", "| size | family | prompt | tokens/s | time vs UltraMemV2 |"]
        lines += ["| --- | --- | ---: | ---: | ---: |"]
        reference = next((each for each in prefills if each["family"] == REFERENCE), None)
        for record in prefills:
            seconds = statistics.median(record["seconds"])
            times = f"{ratio(record, reference)[0]:.2f}" if reference else ""
            lines.append(
                f"| {record['size']} | {record['family']} | {record['context']:,} |"
                f" {record['context'] / seconds:,.0f} | {times} |"
            )
        lines.append("")
    lines += ["## Memory of a decode step, GB", "", "| size | context | batch | family | needed |"]
    lines += ["| --- | ---: | ---: | --- | ---: |"]
    for (size, context), batches in sorted(cells.items()):
        for batch in (min(batches), max(batches)):
            lines += [
                f"| {size} | {context:,} | {batch} | {family} |"
                f" {record['memory']['needed'] / 1e9:.2f} |"
                for family, record in batches[batch].items()
                if record["memory"]
            ]
    files.write_text(path.parent / "README.md", "\n".join(lines) + "\n")
    print(f"wrote {path.parent / 'README.md'}")


def _is_sweep(cells: dict[int, dict[str, dict[str, Any]]]) -> bool:
    return sum(REFERENCE in families for families in cells.values()) > 1


if __name__ == "__main__":
    cli.run(main)
