"""Long-context suite over families of equal budget: trains, evaluates and writes the report.

    python -m experiments.benchmarks.long_context --long_context_seeds=3
    python -m experiments.benchmarks.long_context --long_context_report

Finished runs are not repeated; interrupted ones resume.
"""

import concurrent.futures
import os
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from configs import families, long_context_tiny
from experiments import cli, measurements
from umv2 import files
from umv2.config.schema import UserError

_ROOT = Path(__file__).parents[2]
CONFIG = "configs/long_context_tiny.py"
RESULTS = Path("experiments/results/long_context")

_NAMES = flags.DEFINE_list(
    "long_context_families", [families.REFERENCE, "moe", "dense"], "Families to train."
)
_SEEDS = flags.DEFINE_integer("long_context_seeds", 3, "Seeds 0 to SEEDS - 1 of each family.", 1)
_PROCESSES = flags.DEFINE_integer(
    "long_context_processes", 2, "Runs side by side, one core each.", 1
)
_RUNS = flags.DEFINE_string("long_context_runs", "runs/long_context", "Folder of the runs.")
_REPORT = flags.DEFINE_bool(
    "long_context_report", False, "Only write the report of the stored results."
)


def run(family: str, seed: int, folder: Path) -> None:
    """Trains and evaluates one model; stores its answers among the results.

    Raises:
      UserError: the run was stopped or failed; the next call resumes it.
    """
    stored = RESULTS / f"{family}_{seed}.jsonl"
    if stored.exists():
        return
    command = [sys.executable, str(_ROOT / "main.py"), f"--workdir={folder}"]
    # One core each: runs side by side take less time than runs one after the other.
    xla_flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"XLA_FLAGS": xla_flags}
    fields = [f"--config.seed={seed}", f"--config.data.seed={seed}"]
    for arguments in (
        [f"--config={_ROOT / CONFIG}:{family}", *fields],
        ["--mode=evaluate", "--suite=long_context"],
    ):
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            *_, last = done.stderr.splitlines() or [f"status {done.returncode}"]
            if not last.startswith(("error: ", "interrupted")):
                raise RuntimeError(f"{family}, seed {seed}:\n{done.stderr[-2000:]}")
            raise UserError(f"{family}, seed {seed}: {last.removeprefix('error: ')}")
        # After a signal, training saves and exits with status 0.
        step = measurements.read(folder / "metrics.jsonl")[-1]["step"]
        if step < (needed := long_context_tiny.get_config(family).train.num_steps):
            raise UserError(f"{family}, seed {seed}: stopped after step {step} of {needed}")
    measurements.write(stored, summary(folder / "long_context.jsonl"))


def summary(path: Path) -> list[dict[str, Any]]:
    """Returns the heading of a file of answers, then a record per task, length and fifth of depth.

    The lines of single answers take megabytes, and stay in the folder of the run. A log-likelihood
    that is not finite is null, there and here.
    """
    from umv2.evaluation.long_context import depth_bin

    heading, *answers = measurements.read(path)
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        cells[answer["task"], answer["length"], depth_bin(answer["depth"])].append(answer)
    return [
        measurements.about() | heading,
        *(
            {
                "task": task,
                "length": length,
                "fifth": fifth,
                "answers": len(cell),
                "exact": sum(answer["exact"] for answer in cell),
                "chance": statistics.mean(answer["chance"] for answer in cell),
                "log_likelihood": _sum(answer["log_likelihood"] for answer in cell),
                "num_tokens": sum(answer["num_tokens"] for answer in cell),
            }
            for (task, length, fifth), cell in cells.items()
        ),
    ]


def _sum(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    return None if None in listed else sum(filter(None, listed))


def budget(family: str) -> dict[str, Any]:
    """Returns the parameters, tokens and FLOPs of a run."""
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    config = from_config_dict(long_context_tiny.get_config(family))
    counts = accounting.parameter_counts(config.model)
    tokens = config.train.num_steps * config.train.batch_size * config.data.sequence_length
    return {
        "active": counts.active,
        "total": counts.total,
        "tokens": tokens,
        "flops": tokens * accounting.training_flops_per_token(config),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a run that `summary` made, without the heading.

    Raises:
      RecordsError: the file has other content.
      FileError: the file cannot be read.
    """
    cells = measurements.read(path)[1:]
    if not cells:
        raise measurements.RecordsError(f"{path}: has no answers")
    for number, cell in enumerate(cells, start=2):
        for name in ("length", "fifth", "answers", "exact", "chance"):
            if not isinstance(cell.get(name), int | float):
                raise measurements.RecordsError(f"{path}: line {number}: {name}={cell.get(name)!r}")
        if not isinstance(cell.get("task"), str) or cell["answers"] < 1:
            raise measurements.RecordsError(f"{path}: line {number} holds no answers to a task")
    return cells


def accuracies(path: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Returns (accuracy, chance) of each task and length of one run."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for cell in read(path):
        cells[cell["task"], cell["length"]].append(cell)

    def mean(group: list[dict[str, Any]]) -> tuple[float, float]:
        total = sum(cell["answers"] for cell in group)
        chance = sum(cell["answers"] * cell["chance"] for cell in group)
        return sum(cell["exact"] for cell in group) / total, chance / total

    return {key: mean(group) for key, group in cells.items()}


def report() -> None:
    """Writes README.md, accuracy.png and FAMILY.png from the results of all runs.

    Raises:
      RecordsError: a file is not that of a run, or two files differ in tasks or lengths.
      FileError: there is no run to report, or a file cannot be written.
    """
    runs: dict[str, list[dict[tuple[str, int], tuple[float, float]]]] = {
        family: [accuracies(path) for path in _stored(family).values()] for family in _NAMES.value
    }
    runs = {family: family_runs for family, family_runs in runs.items() if family_runs}
    if not runs:
        raise files.FileError(f"{RESULTS}: no run of {', '.join(_NAMES.value)} is stored there")
    keys = list(next(iter(runs.values()))[0])
    for family, family_runs in runs.items():
        for path, run in zip(_stored(family).values(), family_runs, strict=True):
            if run.keys() != set(keys):
                raise measurements.RecordsError(
                    f"{path}: not of the same tasks and lengths as others"
                )
    tasks = list(dict.fromkeys(task for task, _ in keys))
    keys.sort(key=lambda key: (tasks.index(key[0]), key[1]))
    lines = [
        "# Long-context suite: families at equal budget",
        "",
        "    python -m experiments.benchmarks.long_context",
        "",
        f"Each family is trained with `{CONFIG}:FAMILY`, then evaluated at one, two and four times"
        " the training length. Exact answers in %: mean over seeds, with the lowest and highest;"
        " chance is as the tasks define it. The files next to this one have the results by depth"
        " of the evidence.",
        "",
        "| family | seeds | active | total | tokens | FLOPs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, family_runs in runs.items():
        cost = budget(family)
        lines.append(
            f"| {family} | {len(family_runs)} | {cost['active']:,} | {cost['total']:,} |"
            f" {cost['tokens']:,} | {cost['flops']:.2g} |"
        )
    heading = " | ".join(runs)
    lines += ["", f"| task | tokens | chance | {heading} |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(runs))
    for key in keys:
        chance = 100 * next(iter(runs.values()))[0][key][1]
        cells = []
        for family_runs in runs.values():
            values = [100 * run[key][0] for run in family_runs]
            mean = statistics.mean(values)
            cells.append(f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {key[0]} | {key[1]:,} | {chance:.1f} | {' | '.join(cells)} |")
    lines += ["", "![accuracy](accuracy.png)", ""]
    for family in runs:
        seed, path = next(iter(_stored(family).items()))
        lines += [f"## Depth and length: {family}, seed {seed}", ""]
        lines += [f"![{family}]({family}.png)", ""]
        _draw_depths(path, RESULTS / f"{family}.png")
    notes = RESULTS / "notes.md"
    if notes.exists():
        lines += [notes.read_text().rstrip(), ""]
    files.write_text(RESULTS / "README.md", "\n".join(lines))
    _draw(runs, tasks, RESULTS / "accuracy.png")


def _stored(family: str) -> dict[int, Path]:
    """Returns the results files of a family by seed."""
    paths = {path.stem: path for path in RESULTS.glob("*.jsonl")}
    seeds = [int(s) for stem in paths if (s := stem.removeprefix(f"{family}_")).isdecimal()]
    return {seed: paths[f"{family}_{seed}"] for seed in sorted(seeds)}


def _draw_depths(path: Path, image: Path) -> None:
    """Draws the accuracy of one run by length and depth."""
    from umv2.evaluation import long_context

    percent: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    answers, chances = Counter[str](), Counter[str]()
    for cell in read(path):
        task, count = cell["task"], cell["answers"]
        percent[task][cell["length"], cell["fifth"]] = 100 * cell["exact"] / count
        answers[task] += count
        chances[task] += 100 * count * cell["chance"]
    chance = {task: chances[task] / count for task, count in answers.items()}
    long_context.draw_accuracies(percent, chance, image)


def _draw(runs: dict[str, Any], tasks: list[str], image: Path) -> None:
    from umv2 import pictures

    num_columns = min(4, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    figure = pictures.new(2.9 * num_columns, 2.6 * num_rows + 0.6)
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    styles = pictures.curve_styles(len(runs))
    for axes, task in zip(grid.flat, tasks, strict=False):
        curves = []
        for family_runs, style in zip(runs.values(), styles, strict=True):
            lengths = sorted(length for name, length in family_runs[0] if name == task)
            seeds = [[100 * run[task, length][0] for run in family_runs] for length in lengths]
            means = [statistics.mean(values) for values in seeds]
            lowest, highest = [min(values) for values in seeds], [max(values) for values in seeds]
            axes.fill_between(lengths, lowest, highest, color=style["color"], alpha=0.15, zorder=1)
            curves += axes.plot(lengths, means, **style)
        chance = [100 * family_runs[0][task, length][1] for length in lengths]
        curves += axes.plot(lengths, chance, color="gray", linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(title=task, xlabel="tokens", ylim=(-5, 105))
        axes.grid(alpha=0.3)
    figure.supylabel("exact answers, %", fontsize=10)
    pictures.legend_below(figure, curves, [*runs, "chance"])
    pictures.save(figure, image)


def main(_: list[str]) -> None:
    """Runs the missing runs, then writes the report."""
    for family in _NAMES.value or [""]:
        known = [families.REFERENCE, *long_context_tiny.SIZES]
        cli.require(f"--long_context_families={family}", family, known)
    folder = cli.path(_RUNS)
    if not _REPORT.value:
        files.make_folder(folder)
        measurements.require_writable(RESULTS / "README.md")
        _run_all(folder)
    report()


def _run_all(folder: Path) -> None:
    # Seed by seed, so that all families have results early.
    jobs = [(family, seed) for seed in range(_SEEDS.value) for family in _NAMES.value]
    with concurrent.futures.ThreadPoolExecutor(_PROCESSES.value) as pool:
        running = {
            pool.submit(run, family, seed, folder / f"{family}_{seed}"): f"{family}, seed {seed}"
            for family, seed in dict.fromkeys(jobs)
        }
        try:
            for number, done in enumerate(concurrent.futures.as_completed(running), start=1):
                done.result()
                print(f"{number} of {len(running)}: {running[done]}", flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                finished = sum(job.done() and not job.cancelled() for job in running)
                print(f"{finished} of {len(running)} runs; run the same command again to resume")
            raise


if __name__ == "__main__":
    cli.run(main)
