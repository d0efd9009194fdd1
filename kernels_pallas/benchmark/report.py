"""Records of measurements as an aligned table and as a roofline plot."""

import datetime
import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "numpy", "libtpu", "jax-cuda13-plugin")


def environment() -> dict[str, Any]:
    """Date, versions and device, which every record holds."""
    device = jax.local_devices()[0]
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version.strip(),
        "versions": {"python": platform.python_version()}
        | {name: installed[name] for name in _PACKAGES if name in installed},
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines up cells: the first column to the left, numbers to the right, reasons as they come.

    A row that is shorter than the first ends with a cell that may be as long as it likes.
    """
    num_columns = len(rows[0])
    whole = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[i]) for row in whole) for i in range(num_columns)]
    for row in rows:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths[i], len(cell))
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 or not _is_number(cell) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+."


def table(records: Sequence[dict[str, Any]]) -> str:
    """The measurements of one operator as lined-up columns, refusals with their reasons."""
    titles = ("shape", "ids", "dtype", "pass", "implementation", "ms", "quartiles", "GB/s")
    rows: list[tuple[str, ...]] = [
        (*titles, "of copy", "GFLOP/s", "x xla", "x plain", "difference", "temp MiB", "compile s")
    ]
    for record in records:
        shape = record["shape"]
        case = (
            shape["name"],
            shape.get("ids", "none"),
            record["dtype"],
            record["pass"],
            record["implementation"],
        )
        if "reason" in record:
            rows.append((*case, f"no: {record['reason']}"))
            continue
        low, high = record["quartiles_seconds"]
        rows.append(
            (
                *case,
                f"{1e3 * record['median_seconds']:.3g}",
                f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                f"{record['bytes_per_second'] / 1e9:.3g}",
                f"{record['share_of_copy']:.0%}",
                f"{record['flops_per_second'] / 1e9:.3g}",
                *(_ratio(record, name) for name in ("xla", "plain")),
                f"{record['difference']:.0e}" if "difference" in record else "",
                f"{record['temporary_bytes'] / 2**20:.1f}",
                f"{record['compile_seconds']:.1f}",
            )
        )
    return aligned(rows)


def _ratio(record: dict[str, Any], name: str) -> str:
    if f"speedup_over_{name}" not in record:
        return ""
    low, high = record[f"speedup_over_{name}_quartiles"]
    return f"{record[f'speedup_over_{name}']:.2f} ({low:.2f}-{high:.2f})"


def _label(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The shape, and whatever else of ids and dtype is not the same everywhere."""

    def parts(record: dict[str, Any]) -> tuple[str, ...]:
        return record["shape"]["name"], record["shape"].get("ids", ""), record["dtype"]

    everywhere = [set(column) for column in zip(*map(parts, records), strict=True)]
    name, *others = parts(record)
    differing = (x for x, known in zip(others, everywhere[1:], strict=True) if len(known) > 1)
    return " ".join((name, *differing))


def plot_is_possible() -> bool:
    """Whether matplotlib, which nothing else needs, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def roofline(records: Sequence[dict[str, Any]], path: Path, *, matrix_flops: float) -> None:
    """Draws FLOP/s over FLOP/byte of every measurement, under what copies and matrices reach.

    The slope is the copy's bandwidth, the ceiling a product of float32 matrices of the same run.
    """
    # The package itself imports jax alone.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [record for record in records if "reason" not in record]
    if not measured:
        return
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    copy = max(record["copy_bytes_per_second"] for record in measured)
    intensities = [record["flops"] / record["bytes"] for record in measured]
    ridge = matrix_flops / copy
    ends = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    roof = [min(matrix_flops, copy * x) for x in ends]
    axes.plot(ends, roof, color="black", label=f"copy {copy / 1e9:.3g} GB/s, float32 matrices")

    names = list(dict.fromkeys(record["implementation"] for record in measured))
    markers = {"forward": "o", "backward": "s", "both": "D"}
    seen: set[tuple[str, str]] = set()
    for record, intensity in zip(measured, intensities, strict=True):
        kind = (record["implementation"], record["pass"])
        axes.plot(
            intensity,
            record["flops_per_second"],
            linestyle="none",
            marker=markers[record["pass"]],
            color=f"C{names.index(record['implementation'])}",
            label=None if kind in seen else ", ".join(kind),
        )
        seen.add(kind)
        point = (intensity, record["flops_per_second"])
        axes.annotate(
            _label(record, measured),
            point,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    operator, device = measured[0]["operator"], measured[0]["device"]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, by formula",
        ylabel="FLOP/s",
        title=f"{operator} on {device}",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
