r"""Every family at one scale: the same data, tokens, seeds and budget; one table and one plot.

    python -m experiments.family_runs --config=configs/tiny.py \
        --output=experiments/results/families_tiny

Three stages, each resumable or repeatable alone with --stages. `train` runs each family with each
seed (of parameters and of the order of the data; finished runs are not repeated, interrupted ones
continue) and appends a line to OUTPUT/runs.jsonl. `time` measures training steps of all families in
turns in one process. `report` writes table.md and losses.png from what the others stored, and
nothing else.
"""

import collections
import datetime
import hashlib
import importlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from configs import families
from experiments.compiled_step import Step, in_turns

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of the reference.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for results.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/families", "Folder for checkpoints and metrics.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
_FAMILIES = flags.DEFINE_list("families", None, "Families to run; default: all of the scale.")
_STAGES = flags.DEFINE_list("stages", ["train", "time", "report"], "What to do.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Steps of each family that are timed.")
_RUNS, _TIMES = "runs.jsonl", "step_time.json"
# Batch of the decode step whose traffic the table gives.
_DECODE_BATCHES = (1, 64)


def config_of(reference: ConfigDict, family: str, sizes: families.Sizes) -> ConfigDict:
    """Returns the configuration of a family, from a copy of the reference."""
    return families.switch(reference.copy_and_resolve_references(), family, sizes)


def config_hash(values: ConfigDict) -> str:
    """Returns what tells two configurations apart in stored results."""
    return hashlib.sha256(values.to_json(sort_keys=True).encode()).hexdigest()[:12]


def run(values: ConfigDict, family: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Trains one family with one seed, or continues; returns the record of the finished run."""
    import jax

    from umv2 import modes
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    values.seed = values.data.seed = seed
    values.train.evaluation_interval_steps = values.train.num_steps
    values.train.tensorboard = False
    config = from_config_dict(values)
    start = time.monotonic()
    modes.train(config, workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    counts = accounting.parameter_counts(config.model)
    (held_out,) = [
        r for r in records if "held_out_loss" in r and r["step"] == config.train.num_steps
    ]
    return {
        "family": family,
        "seed": seed,
        "config_hash": config_hash(values),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "tokens": held_out["tokens"],
        "training_flops": accounting.training_flops_per_token(config) * held_out["tokens"],
        "active_parameters": counts.active_without_embeddings,
        "total_parameters": counts.total_without_embeddings,
        "held_out_loss": held_out["held_out_loss"],
        "held_out_bits_per_byte": held_out.get("held_out_bits_per_byte"),
        "curve": [(r["tokens"], r["loss"]) for r in records if "loss" in r],
        "seconds_shared_machine": round(time.monotonic() - start, 1),
    }


def train_all(reference: ConfigDict, sizes: families.Sizes, names: list[str], output: Path) -> None:
    """Runs what is missing in OUTPUT/runs.jsonl, seed by seed."""
    for seed in map(int, _SEEDS.value):
        for family in names:
            values = config_of(reference, family, sizes)
            done = {(r["family"], r["seed"]) for r in read_runs(output)}
            if (family, seed) in done:
                continue
            print(f"{family}, seed {seed}", flush=True)
            record = run(values, family, seed, Path(_WORKDIR.value) / family / str(seed))
            with (output / _RUNS).open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_runs(output: Path) -> list[dict[str, Any]]:
    """Returns the records of finished runs."""
    path = output / _RUNS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def time_all(reference: ConfigDict, sizes: families.Sizes, names: list[str]) -> dict[str, Any]:
    """Takes training steps of all families in turns; ratios are within a round."""
    steps = {family: Step(config_of(reference, family, sizes)) for family in names}
    base = families.REFERENCE
    return in_turns(steps, _ROUNDS.value, base=base, label="reference")


def spread(values: list[float]) -> tuple[float, float]:
    """Returns mean and standard deviation (of the sample; NaN for one value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def table(reference: ConfigDict, sizes: families.Sizes, output: Path) -> str:
    """Returns the results as a Markdown table, the best held-out loss first."""
    from umv2.config import from_config_dict
    from umv2.cost import accounting, traffic

    runs: dict[str, dict[int, Any]] = collections.defaultdict(dict)
    for record in read_runs(output):
        runs[record["family"]][record["seed"]] = record
    times_file = output / _TIMES
    times = json.loads(times_file.read_text())["variants"] if times_file.exists() else {}
    base = runs.get(families.REFERENCE, {})
    rows = []
    for family, by_seed in runs.items():
        config = from_config_dict(config_of(reference, family, sizes))
        counts = accounting.parameter_counts(config.model)
        length = config.data.sequence_length
        flops = sum(accounting.forward_flops_per_token(config.model, length).values())
        loss, deviation = spread([r["held_out_loss"] for r in by_seed.values()])
        bits = spread([r["held_out_bits_per_byte"] for r in by_seed.values()])[0]
        paired = [
            r["held_out_loss"] - base[s]["held_out_loss"] for s, r in by_seed.items() if s in base
        ]
        gap = spread(paired) if paired else (math.nan, math.nan)
        decode = [
            traffic.decode_bytes(config.model, batch, length).without_cache / 1e6
            for batch in _DECODE_BATCHES
        ]
        timing = times.get(family)
        step = (
            f"{timing['ratio_to_reference']:.2f} ({timing['ratio_quartiles'][0]:.2f}-"
            f"{timing['ratio_quartiles'][1]:.2f})"
            if timing
            else "not measured"
        )
        cells = [
            family,
            f"{loss:.4f} ± {deviation:.4f}",
            f"{gap[0]:+.4f} ± {gap[1]:.4f}" if family != families.REFERENCE else "",
            f"{bits:.3f}",
            f"{len(by_seed)}",
            f"{counts.active_without_embeddings / 1e6:.3f}",
            f"{counts.total_without_embeddings / 1e6:.3f}",
            f"{flops / 1e6:.3f}",
            step,
            *(f"{value:.2f}" for value in decode),
        ]
        rows.append((loss, cells))
    header = [
        "family",
        "held-out nats/token",
        "gap, paired",
        "bits/byte",
        "seeds",
        "active M",
        "total M",
        "MFLOP/token",
        "step time, ratio",
        *(f"MB/decode step, batch {batch}" for batch in _DECODE_BATCHES),
    ]
    lines = [header, ["---"] * len(header), *(cells for _, cells in sorted(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def draw(output: Path) -> None:
    """Draws each family's training loss as a difference to the reference, and the final losses."""
    import numpy as np
    from matplotlib.figure import Figure

    runs: dict[str, dict[int, Any]] = collections.defaultdict(dict)
    for record in read_runs(output):
        runs[record["family"]][record["seed"]] = record
    base = runs[families.REFERENCE]
    ranked = sorted(runs, key=lambda f: spread([r["held_out_loss"] for r in runs[f].values()])[0])
    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, finals = figure.subplots(1, 2)
    for index, family in enumerate(ranked):
        differences = [
            np.subtract([loss for _, loss in r["curve"]], [loss for _, loss in base[s]["curve"]])
            for s, r in runs[family].items()
            if s in base
        ]
        tokens = [t / 1e6 for t, _ in next(iter(runs[family].values()))["curve"]]
        curves.plot(tokens, np.mean(differences, axis=0), color=f"C{index}", label=family)
        losses = [r["held_out_loss"] for r in runs[family].values()]
        finals.plot([index] * len(losses), losses, "o", color=f"C{index}", alpha=0.6)
        finals.plot([index - 0.3, index + 0.3], [np.mean(losses)] * 2, color=f"C{index}")
    curves.set(
        xlabel="million tokens",
        ylabel="nats per token",
        title=f"training loss minus that of {families.REFERENCE}, mean of seeds",
    )
    finals.set(ylabel="nats per token", title="held-out loss: each seed, and the mean")
    finals.set_xticks(range(len(ranked)), ranked, rotation=30, ha="right")
    for axes in (curves, finals):
        axes.grid(alpha=0.3)
    curves.legend(fontsize=8)
    figure.savefig(output / "losses.png", dpi=120)


def main(argv: list[str]) -> None:
    """Runs the stages."""
    del argv
    file = Path(str(config_flags.get_config_filename(flags.FLAGS["config"])))
    reference, sizes = _CONFIG.value, importlib.import_module(f"configs.{file.stem}").SIZES
    names = _FAMILIES.value or [families.REFERENCE, *sizes]
    output = Path(str(_OUTPUT.value))
    output.mkdir(parents=True, exist_ok=True)
    for stage in _STAGES.value:
        match stage:
            case "train":
                train_all(reference, sizes, names, output)
            case "time":
                results = time_all(reference, sizes, names)
                (output / _TIMES).write_text(json.dumps(results, indent=2) + "\n")
            case "report":
                text = table(reference, sizes, output)
                (output / "table.md").write_text(text + "\n")
                draw(output)
                print(text)
            case _:
                raise app.UsageError(f"--stages={stage}: must be among train, time, report")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "output"])
    app.run(main)
