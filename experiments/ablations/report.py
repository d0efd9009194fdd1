"""Pages of all ablations from the stored runs: tables, figures, verdicts and an index.

    python -m experiments.ablations.report

Writes RESULTS/SCALE/ABLATION.md and .png for each ablation with runs, and RESULTS/README.md with an
overview of every scale. All measured numbers come from the files of the runs; the paper's findings
come from catalogue.py. A page includes notes/ABLATION.md in the folder of the scale if it exists.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.ablations import corpora, figures, records
from experiments.ablations.arms import Ablation
from experiments.ablations.catalogue import ABLATIONS, configuration
from experiments.ablations.comparison import ArmResult, compare, mean_and_deviation
from experiments.ablations.records import Run
from experiments.measurements import RecordsError
from umv2 import files

_MEASURES = {
    "held_out_loss": "held-out loss, nats/token",
    "decay_gain": "drop of the held-out loss in the decay, nats/token",
    "answer_accuracy": "accuracy of answers",
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
    """Returns rows, the first of them the header, as a Markdown table with aligned columns."""
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
        f"    python -m experiments.ablations.run --ablation={name} --scale={scale}"
        f" --seeds={max(len(arm.runs) for arm in results)}",
        _results_table(entry, results),
        "Differences are relative to the arm in the column `compared with`, paired by seed, with a"
        " 95 % confidence interval (Student's t, over seeds).",
        f"![differences and final losses]({name}.png)",
        "## Training loss, difference by quarter of training\n\n" + _quarters_table(results),
        _answers_section(results),
        "## Cost of each arm\n\n" + _cost_table(results),
        _budget(results),
        "## Differences between the arms\n\n" + _differences(results),
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
    sized = f"Held fixed by sizing {', '.join(entry.free)}" if entry.free else "Held fixed"
    return f"{sized}: {', '.join(words[rule] for rule in entry.fixed)}."


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
                _with_deviation(mean, deviation) if arm.values else "",
                arm.versus if compared else "",
                arm.paper,
                str(arm.difference) if compared else "",
                arm.verdict,
            ]
        )
    return markdown_table(rows)


def _with_deviation(mean: float, deviation: float) -> str:
    """Formats a mean; one seed has no deviation."""
    return f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


def _quarters_table(results: list[ArmResult]) -> str:
    rows = [["arm", "compared with", "first", "second", "third", "last"]]
    for arm in results:
        if arm.name != arm.versus and arm.runs:
            rows.append([arm.name, arm.versus, *map(str, arm.quarters)])
    return markdown_table(rows)


def _answers_section(results: list[ArmResult]) -> str:
    """Returns the section on multi-hop questions; empty if none were asked."""
    answers = {
        arm.name: [run.end["answers"] for run in arm.runs.values() if run.end["answers"]]
        for arm in results
    }
    if not any(answers.values()):
        return ""
    hops = sorted(
        {hop for entries in answers.values() for entry in entries for hop in entry["by_hops"]}
    )
    rows = [["arm", *(f"{hop} hops" for hop in hops)]]
    for name, entries in answers.items():
        if entries:
            seeds = [[e["by_hops"][hop] for e in entries if hop in e["by_hops"]] for hop in hops]
            rows.append([name, *(f"{statistics.fmean(s):.3f}" if s else "" for s in seeds)])
    return (
        "## Accuracy of answers by number of hops\n\n"
        + markdown_table(rows)
        + "\n\nMeans over seeds. A guess among the places that the facts name has an accuracy of"
        f" {corpora.CHANCE:.3f}."
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
    """Describes tokens, corpus, device, versions and dates of the runs."""
    heads = [run.head for arm in results for run in arm.runs.values()]

    def all_of(get: Any) -> str:
        return " and ".join(sorted({get(head) for head in heads}))

    return (
        f"{all_of(lambda head: format(head['tokens'], ','))} tokens per run of"
        f" {all_of(lambda head: head['corpus']['source'])} (corpus"
        f" {all_of(lambda head: head['corpus']['hash'])}); {all_of(lambda head: head['device'])},"
        f" jax {all_of(lambda head: head['versions']['jax'])}, Python"
        f" {all_of(lambda head: head['versions']['python'])}; {all_of(lambda head: head['date'])}."
        " Parameters exclude embeddings; FLOPs are those of a forward pass; bytes of a decode step"
        " exclude the cache; minutes are the median over seeds, on a machine with other load."
    )


def _differences(results: list[ArmResult]) -> str:
    """Lists the stored fields in which each arm differs from the one it is compared with."""
    configs = {arm.name: _runs(arm)[0].head["config"] for arm in results if arm.runs}
    lines = []
    for arm in results:
        if arm.name == arm.versus or arm.name not in configs or arm.versus not in configs:
            continue
        changed = [
            "`{}` {}".format(*difference.split(": ", 1))
            for difference in records.differences(configs[arm.versus], configs[arm.name])
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
        " layers and seeds; hits are counted since the last log but one."
    )


@dataclasses.dataclass(frozen=True)
class Scale:
    """Results of a scale, or of a scale on another corpus.

    `ablations` are those with a page, where two or more arms have runs; `single` maps each ablation
    with runs of only one arm to that arm. `runs` are all stored runs, `unknown` the number of them
    that no longer belong to an arm.
    """

    ablations: dict[str, list[ArmResult]]
    single: dict[str, str]
    runs: list[Run]
    unknown: int


def index(by_scale: dict[str, Scale]) -> str:
    """Returns the overview of all scales that have runs."""
    parts = [
        "# Ablations",
        "Written by `python -m experiments.ablations.report` from the runs stored next to it;"
        " [experiments/ablations/catalogue.py](../../ablations/catalogue.py) defines the ablations."
        " A verdict compares signs: *same sign* and *opposite sign* are differences whose 95 %"
        " interval over seeds excludes zero. Of twenty arms without any effect, one does so by"
        " chance.",
    ]
    for name, scale in by_scale.items():
        parts += [f"## Scale {name}", _scale_line(scale)]
        if scale.unknown:
            parts.append(
                f"{scale.unknown} stored runs have configurations that no arm has any longer."
            )
        if scale.ablations:
            parts += [f"![all differences]({name}/overview.png)", _index_table(name, scale)]
        if scale.single:
            arms = ", ".join(f"{ablation} ({arm})" for ablation, arm in scale.single.items())
            parts.append(f"Only one arm has runs, with nothing to compare it to: {arms}.")
        started = scale.ablations.keys() | scale.single.keys()
        if missing := [ablation for ablation in ABLATIONS if ablation not in started]:
            parts.append(f"Not run at this scale: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _scale_line(scale: Scale) -> str:
    half_widths = [
        arm.difference.half_width
        for arms in scale.ablations.values()
        for arm in arms
        if arm.difference.pairs > 1 and arm.name != arm.versus and not arm.diverged
    ]
    hours = sum(run.end["seconds_shared_machine"] for run in scale.runs) / 3600
    flops = sum(run.head["training_flops"] for run in scale.runs)
    noise = ""
    if half_widths:
        noise = f"; median half-width of an interval {statistics.median(half_widths):.4f}"
    return (
        f"{len(scale.runs)} runs, {flops / 1e15:.2f} PFLOP, {hours:.1f} process hours on a shared"
        f" machine{noise}."
    )


def _runs(arm: ArmResult) -> list[Run]:
    return list(arm.runs.values())


def _index_table(name: str, scale: Scale) -> str:
    rows = [["ablation", "paper's finding", "ours", "verdict"]]
    for ablation, arms in scale.ablations.items():
        compared = [arm for arm in arms if arm.name != arm.versus and arm.runs]
        rows.append(
            [
                f"[{ablation}]({name}/{ablation}.md)",
                ABLATIONS[ablation].finding,
                "<br>".join(f"{arm.name} {arm.difference}".strip() for arm in compared),
                "<br>".join(arm.verdict for arm in compared),
            ]
        )
    return markdown_table(rows)


def _read_scale(folder: Path) -> Scale:
    stored, corpus = records.Stored(folder), records.corpus_of(folder)
    ablations: dict[str, list[ArmResult]] = {}
    single: dict[str, str] = {}
    known: set[Path] = set()
    for name, entry in ABLATIONS.items():
        runs: dict[str, dict[int, Run]] = {}
        for arm in entry.arms:
            values = configuration(name, arm, records.scale_of(folder))
            if corpus is not None:
                corpora.use(values, **corpus)
            if arm_runs := stored.find(values):
                runs[arm] = arm_runs
                known.update(stored.paths(values).values())
        if len(runs) > 1:
            ablations[name] = compare(entry, runs)
        elif runs:  # for example, only those of a baseline that other ablations share
            (single[name],) = runs
    if not known:
        raise RecordsError(_describe_mismatch(folder, stored))
    return Scale(ablations, single, list(stored.runs.values()), len(stored.runs) - len(known))


def _describe_mismatch(folder: Path, stored: records.Stored) -> str:
    """Returns the message for a folder without a run of any arm; shows the changes of one run."""
    text = f"{folder}: none of its {len(stored.runs)} runs has the configuration of an arm"
    for path, run in stored.runs.items():
        name, arm = path.parts[-3:-1]
        if name in ABLATIONS and arm in ABLATIONS[name].arms:
            now = records.plain(configuration(name, arm, records.scale_of(folder)))
            changes = ", ".join(records.differences(run.head["config"], now)[:3])
            return f"{text}; {name}/{arm}, stored and now: {changes}"
    return text


def _notes(path: Path) -> str:
    try:
        with files.errors(path, "cannot be read"):
            return path.read_text(encoding="utf-8").strip() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise RecordsError(f"{path}: must be text in UTF-8") from error


def write_all(results: Path) -> str:
    """Writes the pages and figures of all scales, and returns the index.

    Raises:
      RecordsError: there are no runs, so that nothing is written; or a file is invalid.
      FileError: a page cannot be written.
    """
    folders = records.scale_folders(results)
    if not folders:
        raise RecordsError(
            f"{results}: has no runs; make some with python -m experiments.ablations.run"
        )
    by_scale = {folder.name: _read_scale(folder) for folder in folders}
    for folder, scale in zip(folders, by_scale.values(), strict=True):
        for name, arms in scale.ablations.items():
            notes = _notes(folder / "notes" / f"{name}.md")
            files.write_text(folder / f"{name}.md", page(name, folder.name, arms, notes))
            figures.draw_ablation(ABLATIONS[name], arms, folder / f"{name}.png")
        if scale.ablations:
            figures.draw_overview(scale.ablations, folder / "overview.png")
    text = index(by_scale)
    files.write_text(results / "README.md", text)
    return text


def main(_: list[str]) -> None:
    """Writes all pages and prints the index."""
    print(write_all(cli.path(records.FOLDER)))


if __name__ == "__main__":
    cli.run(main)
