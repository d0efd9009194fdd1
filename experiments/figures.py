"""Pictures of ablations: curves of differences as the paper draws them, and final results."""

from pathlib import Path
from typing import Any

from experiments.arms import Ablation
from experiments.comparison import ArmResult

_SMOOTHED_STEPS = 9  # logged steps in a moving mean: batches differ more than arms do


def draw_ablation(ablation: Ablation, results: list[ArmResult], path: Path) -> None:
    """Draws training loss minus that of the arm compared with, over tokens, and the final results.

    Curves are means over the seeds that both arms have, bands their least and largest.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
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
    if curves.get_legend_handles_labels()[0]:
        curves.legend(fontsize=8)
    finals.set(title=f"{ablation.measure.replace('_', ' ')}: each seed, and the mean")
    finals.set_xticks(range(len(results)), [arm.name for arm in results], rotation=30, ha="right")
    finals.set_xlim(-0.6, len(results) - 0.4)
    for axes in (curves, finals):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _draw_curve(axes: Any, arm: ArmResult, versus: ArmResult, color: str) -> None:
    import numpy as np

    pairs = [
        (run, versus.runs[seed])
        for seed, run in arm.runs.items()
        if seed in versus.runs and arm.name != versus.name
    ]
    if not pairs:
        return
    # A run that diverged ends early.
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
    """Draws the difference of every arm with its interval, coloured by the verdict."""
    from matplotlib.figure import Figure

    colors = {"same sign": "C2", "opposite sign": "C3"}
    rows = [
        (f"{name}: {arm.name} - {arm.versus}", arm)
        for name, arms in ablations.items()
        for arm in arms
        if arm.name != arm.versus and arm.difference.pairs
    ]
    figure = Figure(figsize=(10, 1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for place, (_, arm) in enumerate(rows):
        color = colors.get(arm.verdict, "C0" if arm.difference.excludes_zero else "0.6")
        axes.errorbar(
            arm.difference.mean, place, xerr=arm.difference.half_width, fmt="o", color=color
        )
        if arm.paper_difference is not None:
            axes.plot(arm.paper_difference, place, "x", color="black")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.05)
    ticks = [-1, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(
        xlabel="difference in the ablation's measure, 95 % interval over seeds",
        title="green: sign of the paper; red: opposite; blue: above noise, not in the paper;"
        " grey: below noise; x: the paper's",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
