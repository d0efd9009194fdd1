"""Formats records of measurements as an aligned table and as a roofline plot."""

import datetime
import functools
import importlib.metadata
import importlib.util
import platform
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "numpy", "libtpu", "jax-cuda13-plugin")


def environment() -> dict[str, Any]:
    """Date, versions and device, stored in every record."""
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
    """Aligns cells in columns: numbers to the right, everything else to the left.

    The last cell of a row that is shorter than the first row does not affect the column widths.
    """
    num_columns = len(rows[0])
    full_rows = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[i]) for row in full_rows) for i in range(num_columns)]
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


def _fitted(rows: Sequence[Sequence[str]], width: int | None, num_names: int) -> str:
    """Aligns cells if the terminal is wide enough; else each row becomes a paragraph.

    Args:
      rows: the first one holds the titles.
      width: columns of the terminal; None: what the terminal or COLUMNS says, else 100.
      num_names: leading cells of a row that say what was measured.
    """
    width = width or max(40, shutil.get_terminal_size((100, 0)).columns)
    lines = aligned(rows).splitlines()
    if max(map(len, lines)) > width:
        lines = [line for row in rows[1:] for line in _paragraph(rows[0], row, width, num_names)]
    return "\n".join(lines)


def _paragraph(titles: Sequence[str], row: Sequence[str], width: int, num_names: int) -> list[str]:
    name = " ".join(row[:num_names])
    if len(row) == len(titles):
        named = zip(titles[num_names:], row[num_names:], strict=True)
        values = ", ".join(f"{title} {cell}" for title, cell in named if cell)
    else:
        values = " ".join(row[num_names:])
    fill = functools.partial(textwrap.wrap, width=width, subsequent_indent="  ")
    return [*fill(name), *fill(values, initial_indent="  ")]


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+."


def table(records: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """Formats the records of one operator, including unsupported cases, in at most `width` columns.

    If `width` is None, the width of the terminal is used.
    """
    case_titles = ("shape", "ids", "dtype", "pass", "implementation")
    titles = (*case_titles, "ms", "quartiles", "GB/s")
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
    return _fitted(rows, width, len(case_titles))


def _ratio(record: dict[str, Any], name: str) -> str:
    if f"speedup_over_{name}" not in record:
        return ""
    low, high = record[f"speedup_over_{name}_quartiles"]
    return f"{record[f'speedup_over_{name}']:.2f} ({low:.2f}-{high:.2f})"


def _label(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The name of the shape, with ids and dtype if they differ between records."""

    def parts(record: dict[str, Any]) -> tuple[str, ...]:
        return record["shape"]["name"], record["shape"].get("ids", ""), record["dtype"]

    distinct = [set(column) for column in zip(*map(parts, records), strict=True)]
    name, *others = parts(record)
    differing = (x for x, values in zip(others, distinct[1:], strict=True) if len(values) > 1)
    return " ".join((name, *differing))


def plot_is_possible() -> bool:
    """Whether matplotlib is installed, an optional dependency that only the plot needs."""
    return importlib.util.find_spec("matplotlib") is not None


def roofline(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots FLOP/s over FLOP/byte of every measurement, with the roofline of the device.

    The slope of the roof is the bandwidth of the copy; its ceiling is the throughput of a float32
    matrix product, both measured in the same run. Numbers next to the points are shapes; the legend
    lists them.
    """
    # Imported here because the package itself only depends on jax.
    from matplotlib.figure import Figure

    measured = [record for record in records if "reason" not in record]
    if not measured:
        return
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    operator, device = measured[0]["operator"], measured[0]["device"]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, by formula",
        ylabel="FLOP/s",
        title=f"{operator} on {device}",
    )
    axes.grid(which="both", alpha=0.2)
    copy = max(record["copy_bytes_per_second"] for record in measured)
    matrices = max(record["matrix_flops_per_second"] for record in measured)
    intensities = [record["flops"] / record["bytes"] for record in measured]
    ends = [min(intensities) / 1.5, max(intensities) * 1.5]
    if ends[0] < matrices / copy < ends[1]:
        ends.insert(1, matrices / copy)
    roof = [min(matrices, copy * x) for x in ends]
    handles = axes.plot(ends, roof, color="black")
    names = [f"copy {copy / 1e9:.3g} GB/s,\nmatrices {matrices / 1e9:.3g} GFLOP/s"]

    implementations = list(dict.fromkeys(record["implementation"] for record in measured))
    cases = list(dict.fromkeys(_label(record, measured) for record in measured))
    markers = {"forward": "o", "backward": "s", "both": "D"}
    labelled = []
    for record, intensity in zip(measured, intensities, strict=True):
        point = (intensity, record["flops_per_second"])
        color = f"C{implementations.index(record['implementation'])}"
        # Later points are smaller, so that overlapping points stay visible.
        size = 4 + 2 * (len(implementations) - implementations.index(record["implementation"]))
        style: dict[str, Any] = {"color": color, "markersize": size, "linestyle": "none"}
        (drawn,) = axes.plot(*point, marker=markers[record["pass"]], **style)
        name = f"{record['implementation']}, {record['pass']}"
        if name not in names:
            handles.append(drawn)
            names.append(name)
        labelled.append((point, str(1 + cases.index(_label(record, measured)))))
    for number, case in enumerate(cases, start=1):
        handles += axes.plot([], [], marker=f"${number}$", color="black", linestyle="none")
        names.append(case)
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()  # fixes the positions of the points
    _annotate(axes, labelled)
    # The same records must give a byte-identical file.
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _annotate(axes: Any, labelled: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Writes labels to the right of their points, moved down where they would overlap."""
    size = 7  # points
    pixels = size * axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    positions = [(*axes.transData.transform(point), point, label) for point, label in labelled]
    for x, y, point, label in sorted(positions, key=lambda position: -position[1]):
        below = y
        while any(abs(x - i) < 2 * pixels and abs(below - j) < pixels for i, j in taken):
            below -= pixels / 4
        taken.append((x, below))
        axes.annotate(
            label,
            point,
            xytext=(10, 72 * (below - y) / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=size,
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "shrinkA": 0, "shrinkB": 0},
        )
