"""Figures of ablations: curves of differences as the paper draws them, and final results.

A PNG file carries a mark, the hash of what it shows, and is only redrawn when that changes:
versions of matplotlib draw the same figure slightly differently.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.ablations.arms import Ablation
from experiments.ablations.comparison import ArmResult
from umv2 import files

_SMOOTHED_STEPS = 9  # logged steps in a moving mean: batches differ more than arms do
_DRAWING = 2  # increment when this file draws the same data differently


def mark(*shown: Any) -> str:
    """Returns the mark of a figure that shows these JSON values."""
    text = json.dumps([_DRAWING, *shown], sort_keys=True)
    return f"drawn from {hashlib.sha256(text.encode()).hexdigest()}"


def is_drawn(path: Path, mark: str) -> bool:
    """Whether a figure exists and carries the mark.

    Raises:
      FileError: the file cannot be read.
    """
    with files.errors(path, "cannot be read"):
        return path.exists() and mark.encode() in path.read_bytes()


def save(figure: Any, path: Path, mark: str, dpi: int = 100) -> None:
    """Writes a figure with its mark, and without other metadata.

    Raises:
      FileError: the file cannot be written.
    """
    metadata = {"Software": None, "Comment": mark}
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi, format="png", metadata=metadata)


def _shown(results: Sequence[ArmResult]) -> list[Any]:
    """Returns everything that a figure of arms can depend on."""
    return [
        [
            [arm.name, arm.versus, arm.paper, arm.expected, arm.paper_difference],
            [[run.seed, run.steps, run.held_out, run.end] for run in arm.runs.values()],
        ]
        for arm in results
    ]


def draw_ablation(ablation: Ablation, results: list[ArmResult], path: Path) -> None:
    """Draws the difference in training loss to the compared arm over tokens, and final results.

    Curves are means over the seeds that both arms have, bands range from minimum to maximum.
    """
    marked = mark(ablation.measure, _shown(results))
    if is_drawn(path, marked):
        return
    from umv2 import pictures

    figure = pictures.new(13.0, 5.5)
    curves, finals = figure.subplots(1, 2)
    by_name = {arm.name: arm for arm in results}
    curves.axhline(0, color="black", linewidth=0.8)
    for index, arm in enumerate(results):
        color = f"C{index % 10}"
        _draw_curve(curves, arm, by_name[arm.versus], color)
        values = list(arm.values.values())
        if values:
            finals.plot([index] * len(values), values, "o", color=color, alpha=0.6)
            mean = sum(values) / len(values)
            finals.plot([index - 0.3, index + 0.3], [mean, mean], color=color)
        elif arm.runs:
            finals.annotate(
                "diverged", (index, 0.5), xycoords=("data", "axes fraction"), ha="center"
            )
    curves.set(
        xlabel="million tokens",
        ylabel="nats per token",
        title="training loss minus that of the arm compared with",
    )
    finals.set(title=f"{ablation.measure.replace('_', ' ')}: each seed, and the mean")
    finals.set_xticks(range(len(results)), [arm.name for arm in results], rotation=30, ha="right")
    finals.set_xlim(-0.6, len(results) - 0.4)
    for axes in (curves, finals):
        axes.grid(alpha=0.3)
    pictures.legend_below(figure, *curves.get_legend_handles_labels())
    save(figure, path, marked)


def _draw_curve(axes: Any, arm: ArmResult, versus: ArmResult, color: str) -> None:
    import numpy as np

    pairs = [
        (run, versus.runs[seed])
        for seed, run in arm.runs.items()
        if seed in versus.runs and arm.name != versus.name
    ]
    if not pairs:
        return
    # Diverged runs are shorter.
    length = min(len(run.losses) for pair in pairs for run in pair)
    if length < _SMOOTHED_STEPS:
        return
    kernel = np.full(_SMOOTHED_STEPS, 1 / _SMOOTHED_STEPS)
    smooth = [
        np.convolve(np.subtract(a.losses[:length], b.losses[:length]), kernel, mode="valid")
        for a, b in pairs
    ]
    first = _SMOOTHED_STEPS // 2
    tokens = np.array(pairs[0][0].tokens[first : length - first]) / 1e6
    axes.plot(tokens, np.mean(smooth, axis=0), color=color, label=f"{arm.name} - {versus.name}")
    axes.fill_between(
        tokens, np.min(smooth, axis=0), np.max(smooth, axis=0), color=color, alpha=0.15
    )


def draw_overview(ablations: dict[str, list[ArmResult]], path: Path) -> None:
    """Draws the difference of every arm with its interval, coloured by verdict."""
    marked = mark([[name, _shown(arms)] for name, arms in ablations.items()])
    if is_drawn(path, marked):
        return
    from matplotlib.lines import Line2D

    from umv2 import pictures

    colors = {"same sign": "C2", "opposite sign": "C3"}
    above, below = "C0", "0.6"
    rows = [
        (f"{name}: {arm.name} - {arm.versus}", arm)
        for name, arms in ablations.items()
        for arm in arms
        if arm.name != arm.versus and arm.difference.pairs
    ]
    figure = pictures.new(10.0, 1.5 + 0.24 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for y, (_, arm) in enumerate(rows):
        color = colors.get(arm.verdict, above if arm.difference.excludes_zero else below)
        axes.errorbar(arm.difference.mean, y, xerr=arm.difference.half_width, fmt="o", color=color)
        if arm.paper_difference is not None:
            axes.plot(arm.paper_difference, y, "x", color="black")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.05)
    ticks = [-1, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="difference in the ablation's measure, 95 % interval over seeds")
    axes.grid(alpha=0.3)
    meanings = {
        "sign of the paper": ("o", colors["same sign"]),
        "opposite sign": ("o", colors["opposite sign"]),
        "above noise, not in the paper": ("o", above),
        "below noise": ("o", below),
        "the paper's difference": ("x", "black"),
    }
    handles = [Line2D([], [], ls="", marker=marker, color=c) for marker, c in meanings.values()]
    pictures.legend_below(figure, handles, list(meanings))
    save(figure, path, marked)
