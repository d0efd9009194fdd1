"""Pages of all ablations from the stored runs: tables, pictures, verdicts, and an index.

    python -m experiments.report

Writes RESULTS/SCALE/ABLATION.md and .png for each ablation with runs, and RESULTS/README.md with an
overview of every scale. Numbers come from the files of the runs and nowhere else; what the paper
found stands in experiments/ablations.py. A file notes/ABLATION.md in the folder of a scale is taken
into its page.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from absl import app

from experiments import corpora, figures, records, scales
from experiments.ablations import ABLATIONS, configuration
from experiments.arms import Ablation
from experiments.comparison import ArmResult, compare, mean_and_deviation
from experiments.records import Run

_MEASURES = {
    "held_out_loss": "held-out loss, nats/token",
    "decay_gain": "fall of the held-out loss in the decay, nats/token",
    "answer_accuracy": "questions answered, share",
}
_HEALTH = {
    "coverage": "rows hit",
    "uniform_kl": "KL from uniform",
    "output_to_ffn_std": "output / FFN, std",
    "top_score": "top score",
    "last_score": "last score",
    "lambda_1": "lambda 1",
    "lambda_2": "lambda 2",
}


def markdown_table(rows: list[list[str]]) -> str:
    """Returns rows, the first of them the header, as a Markdown table that lines up as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def page(name: str, scale: str, results: list[ArmResult], notes: str) -> str:
    """Returns the page of one ablation at one scale."""
    entry = ABLATIONS[name]
    parts = [
        f"# {name}, scale {scale}",
        f"{entry.question}\n\n**Paper** ({entry.source}): {entry.finding}.",
        entry.explanation,
        _held_fixed(entry),
        f"    python -m experiments.run --ablation={name} --scale={scale}"
        f" --seeds={max(len(arm.runs) for arm in results)}",
        _results_table(entry, results),
        "Differences are to the arm named two columns before, run by run of equal seed, with a"
        " 95 % interval (Student's, over seeds).",
        f"![differences and final losses]({name}.png)",
        "## Training loss, difference by quarter of training\n\n" + _quarters_table(results),
        _answers_section(results),
        "## What an arm costs\n\n" + _cost_table(results),
        _budget(results),
        "## In what the arms differ\n\n" + _differences(results),
        _health_section(results),
        f"## Notes\n\n{notes}" if notes else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _held_fixed(entry: Ablation) -> str:
    if not entry.fixed:
        return "All sizes are the same."
    words = {
        "active": "active parameters",
        "total": "total parameters",
        "flops": "FLOPs",
        "values_read": "values read",
    }
    return f"Held fixed, through {', '.join(entry.free) or 'the arms themselves'}: " + (
        ", ".join(words[rule] for rule in entry.fixed) + "."
    )


def _results_table(entry: Ablation, results: list[ArmResult]) -> str:
    rows = [
        [
            "arm",
            "seeds",
            _MEASURES[entry.measure],
            "compared with",
            "paper",
            "difference",
            "verdict",
        ]
    ]
    for arm in results:
        mean, deviation = mean_and_deviation(list(arm.values.values()))
        compared = arm.name != arm.versus
        rows.append(
            [
                arm.name,
                str(len(arm.runs)),
                f"{mean:.4f} ± {deviation:.4f}" if arm.values else "",
                arm.versus if compared else "",
                arm.paper,
                str(arm.difference) if compared else "",
                arm.verdict,
            ]
        )
    return markdown_table(rows)


def _quarters_table(results: list[ArmResult]) -> str:
    rows = [["arm", "compared with", "first", "second", "third", "last"]]
    for arm in results:
        if arm.name != arm.versus and arm.runs:
            rows.append([arm.name, arm.versus, *map(str, arm.quarters)])
    return markdown_table(rows)


def _answers_section(results: list[ArmResult]) -> str:
    """Shows the share of multi-hop questions answered by the number of hops, where any were."""
    answers = {
        arm.name: [run.end["answers"] for run in arm.runs.values() if run.end["answers"]]
        for arm in results
    }
    if not any(answers.values()):
        return ""
    hops = sorted(
        {hop for found in answers.values() for entry in found for hop in entry["by_hops"]}
    )
    rows = [["arm", *(f"{hop} hops" for hop in hops)]]
    for name, found in answers.items():
        if found:
            means = [statistics.fmean(entry["by_hops"][hop] for entry in found) for hop in hops]
            rows.append([name, *(f"{mean:.3f}" for mean in means)])
    return (
        "## Questions answered, by hops\n\n"
        + markdown_table(rows)
        + "\n\nMeans over seeds. A guess"
        f" among the places that the facts name is right in {corpora.CHANCE:.3f} of cases."
    )


def _cost_table(results: list[ArmResult]) -> str:
    rows = [
        [
            "arm",
            "active M",
            "total M",
            "MFLOP/token",
            "values read/token",
            "MB a decode step, batch 1",
            "batch 64",
            "training PFLOP",
            "minutes, shared machine",
        ]
    ]
    for arm in results:
        if not arm.runs:
            continue
        head = next(iter(arm.runs.values())).head
        seconds = [run.end["seconds_shared_machine"] for run in arm.runs.values()]
        rows.append(
            [
                arm.name,
                f"{head['active_parameters'] / 1e6:.3f}",
                f"{head['total_parameters'] / 1e6:.3f}",
                f"{head['forward_flops_per_token'] / 1e6:.3f}",
                "none" if head["values_read"] is None else f"{head['values_read']:,}",
                f"{head['decode_bytes']['1'] / 1e6:.2f}",
                f"{head['decode_bytes']['64'] / 1e6:.2f}",
                f"{head['training_flops'] / 1e15:.3f}",
                f"{statistics.median(seconds) / 60:.1f}",
            ]
        )
    return markdown_table(rows)


def _budget(results: list[ArmResult]) -> str:
    """Says what the runs have in common, or all that they had."""
    heads = [run.head for arm in results for run in arm.runs.values()]

    def all_of(take: Any) -> str:
        return " and ".join(sorted({take(head) for head in heads}))

    return (
        f"{all_of(lambda head: format(head['tokens'], ','))} tokens a run of"
        f" {all_of(lambda head: head['corpus']['source'])} (corpus"
        f" {all_of(lambda head: head['corpus']['hash'])}); {all_of(lambda head: head['device'])},"
        f" jax {all_of(lambda head: head['versions']['jax'])}, Python"
        f" {all_of(lambda head: head['versions']['python'])}; {all_of(lambda head: head['date'])}."
        " Parameters leave out embeddings; FLOPs are of a forward pass; decode steps leave out the"
        " cache; minutes are the median of the seeds, beside whatever else the machine did."
    )


def _differences(results: list[ArmResult]) -> str:
    """Lists the fields in which each arm differs from the one it is compared with, as stored."""
    from umv2.schema import differing_fields

    configs = {arm.name: _runs(arm)[0].head["config"] for arm in results if arm.runs}
    lines = []
    for arm in results:
        if arm.name == arm.versus or arm.name not in configs or arm.versus not in configs:
            continue
        changed = [
            "`{}` {}".format(*difference.split(": ", 1))
            for difference in differing_fields(configs[arm.versus], configs[arm.name])
        ]
        lines.append(f"- **{arm.name}** from {arm.versus}: {', '.join(changed) or 'nothing'}")
    return "\n".join(lines)


def _health_section(results: list[ArmResult]) -> str:
    rows = [["arm", *_HEALTH.values()]]
    for arm in results:
        health = [run.end["health"] for run in arm.runs.values() if not run.diverged]
        cells = []
        for name in _HEALTH:
            values = [
                value
                for entry in health
                for key, value in entry.items()
                if key.startswith(f"{name}/layer_") and value is not None
            ]
            cells.append(f"{statistics.fmean(values):.3g}" if values else "")
        if any(cells):
            rows.append([arm.name, *cells])
    if len(rows) == 1:
        return ""
    return (
        "## Health of the sparse layers at the end\n\n" + markdown_table(rows) + "\n\nMeans over"
        " layers and seeds; hits are those since the log before the last."
    )


def index(by_scale: dict[str, dict[str, list[ArmResult]]], unknown: dict[str, int]) -> str:
    """Returns the overview of all scales that have runs."""
    parts = [
        "# Ablations",
        "Written by `python -m experiments.report` from the runs stored beside it; what an ablation"
        " is stands in [experiments/ablations.py](../../ablations.py). A verdict compares signs:"
        " *same sign* and *opposite sign* are differences whose 95 % interval over seeds leaves out"
        " zero. Of twenty arms without any effect one would.",
    ]
    for scale, ablations in by_scale.items():
        parts += [f"## Scale {scale}", _scale_line(ablations)]
        if unknown[scale]:
            parts.append(
                f"{unknown[scale]} stored runs are of configurations that no arm has any more."
            )
        parts += [f"![all differences]({scale}/overview.png)", _index_table(scale, ablations)]
        missing = [name for name in ABLATIONS if name not in ablations]
        if missing:
            parts.append(f"Not run at this scale: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _scale_line(ablations: dict[str, list[ArmResult]]) -> str:
    runs = {id(run): run for arms in ablations.values() for arm in arms for run in _runs(arm)}
    deviations = [
        arm.difference.half_width
        for arms in ablations.values()
        for arm in arms
        if arm.difference.pairs > 1 and arm.name != arm.versus and not arm.diverged
    ]
    hours = sum(run.end["seconds_shared_machine"] for run in runs.values()) / 3600
    flops = sum(run.head["training_flops"] for run in runs.values())
    noise = ""
    if deviations:
        noise = f"; median half width of an interval {statistics.median(deviations):.4f}"
    return (
        f"{len(runs)} runs, {flops / 1e15:.2f} PFLOP, {hours:.1f} hours of processes that shared"
        f" the machine{noise}."
    )


def _runs(arm: ArmResult) -> list[Run]:
    return list(arm.runs.values())


def _index_table(scale: str, ablations: dict[str, list[ArmResult]]) -> str:
    rows = [["ablation", "paper's finding", "ours", "verdict"]]
    for name, arms in ablations.items():
        compared = [arm for arm in arms if arm.name != arm.versus and arm.runs]
        rows.append(
            [
                f"[{name}]({scale}/{name}.md)",
                ABLATIONS[name].finding,
                "<br>".join(f"{arm.name} {arm.difference}".strip() for arm in compared),
                "<br>".join(arm.verdict for arm in compared),
            ]
        )
    return markdown_table(rows)


def _order(folder: Path) -> tuple[int, str]:
    """Puts scales in their own order, and other corpora after a scale's own."""
    scale = folder.name.partition("_")[0]
    return list(scales.SCALES).index(scale) if scale in scales.SCALES else 99, folder.name


def _hash(ablation: str, arm: str, folder: Path) -> str:
    """Returns the hash of an arm's configuration on the corpus that a folder is of."""
    values = configuration(ablation, arm, folder.name.partition("_")[0])
    if (corpus := folder / records.CORPUS).exists():
        corpora.take(values, **json.loads(corpus.read_text()))
    return records.config_hash(values)


def write_all(results: Path) -> str:
    """Writes the pages and pictures of all scales, and returns the index.

    Raises:
      ValueError: a file among the runs that is not the records of one.
    """
    by_scale: dict[str, dict[str, list[ArmResult]]] = {}
    unknown: dict[str, int] = {}
    for folder in sorted({path.parent for path in results.glob("*/runs")}, key=_order):
        stored = records.read_all(folder)
        scale = folder.name
        known: set[str] = set()
        by_scale[scale] = {}
        for name, entry in ABLATIONS.items():
            hashes = {arm: _hash(name, arm, folder) for arm in entry.arms}
            runs = {arm: stored[key] for arm, key in hashes.items() if key in stored}
            known |= set(hashes.values())
            if len(runs) < 2:  # a baseline that other ablations share says nothing
                continue
            arms = compare(entry, runs)
            notes = folder / "notes" / f"{name}.md"
            text = page(name, scale, arms, notes.read_text().strip() if notes.exists() else "")
            (folder / f"{name}.md").write_text(text)
            figures.draw_ablation(entry, arms, folder / f"{name}.png")
            by_scale[scale][name] = arms
        unknown[scale] = sum(len(seeds) for key, seeds in stored.items() if key not in known)
        figures.draw_overview(by_scale[scale], folder / "overview.png")
    text = index(by_scale, unknown)
    (results / "README.md").write_text(text)
    return text


def main(argv: list[str]) -> None:
    """Writes all pages and shows the index."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]}: unexpected argument; options are written --name=value")
    print(write_all(Path(records.FOLDER.value)))


if __name__ == "__main__":
    app.run(main)
