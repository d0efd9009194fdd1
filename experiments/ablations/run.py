"""Runs or resumes ablations: every arm, every seed, one file per run.

    python -m experiments.ablations.run --ablation=heads --scale=cpu --seeds=3
    python -m experiments.ablations.run --ablation=all --scale=cpu

Finished runs are not repeated, interrupted ones resume from their checkpoints, and arms with equal
configurations run once for all ablations that have them. To split the work, start the command once
per core or GPU (`taskset -c 0 python -m ...` pins each to a core): a process skips arms that are
locked by another. `--corpus=site_packages --vocab_size=16384` trains all arms on another corpus,
with a results folder of its own.

RESULTS/SCALE/ABLATION/ARM/seed_N.jsonl has a line about the run (configuration, versions, budget),
one for every logged step and evaluation, and one about its end; it is written when the run ends.
Among arms with equal configurations, the first in the catalogue names the file. A diverged run has
a result, too.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from experiments import cli, measurements
from experiments.ablations import corpora, records, scales
from experiments.ablations.catalogue import ABLATIONS, configuration
from umv2 import command, files
from umv2.config.schema import ConfigError

_ABLATIONS = flags.DEFINE_list("ablation", None, "Ablations to run, or all.")
_ARMS = flags.DEFINE_list("arms", [], "Arms of the ablations to run; default: all.")
_SCALE = flags.DEFINE_enum("scale", "cpu", list(scales.SCALES), "Model sizes and length of runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0 to SEEDS - 1 of each arm.", 1, 1000)
_CORPUS = flags.DEFINE_string(
    "corpus", None, "standard_library, site_packages or globs of text; default: that of the scale."
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "Size of the BPE trained on --corpus; default: 8192.", 258
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of checkpoints and corpora.")
_KEEP = flags.DEFINE_bool("keep_checkpoints", False, "Keep the checkpoints of finished runs.")


class Job:
    """A configuration with the arms that have it; `answers`: whether to evaluate on questions."""

    def __init__(self, values: ConfigDict):
        self.values = values
        self.names: list[str] = []  # ABLATION/ARM; the first one names the files
        self.answers = False


def jobs_of(scale: str, corpus: dict[str, Any] | None = None) -> dict[str, Job]:
    """Returns the job of every arm of the catalogue by ABLATION/ARM; equal arms share a job.

    Args:
      scale: one of `scales.SCALES`.
      corpus: arguments of `corpora.use`; None: the corpus of the scale.
    """
    jobs: dict[str, Job] = {}
    by_arm: dict[str, Job] = {}
    for ablation, entry in ABLATIONS.items():
        for arm in entry.arms:
            values = configuration(ablation, arm, scale)
            if corpus is not None:
                corpora.use(values, **corpus)
            job = jobs.setdefault(records.identity(values), Job(values))
            job.names.append(f"{ablation}/{arm}")
            job.answers |= entry.measure == "answer_accuracy"
            by_arm[job.names[-1]] = job
    return by_arm


def arms_to_run(
    ablations: Sequence[str], arms: Sequence[str], scale: str, corpus: dict[str, Any] | None = None
) -> list[Job]:
    """Returns the jobs of arms, in the order of the ablations.

    Args:
      ablations: names; "all" selects every ablation.
      arms: names of arms; empty: all arms.
      scale: one of `scales.SCALES`.
      corpus: arguments of `corpora.use`; None: the corpus of the scale.

    Raises:
      ConfigError: an unknown ablation or arm, or no ablation.
    """
    if not ablations:
        raise ConfigError(f"--ablation: must name one of {', '.join(ABLATIONS)}, or all")
    for name in ablations:
        cli.require(f"--ablation={name}", name, [*ABLATIONS, "all"])
    if "all" in ablations:
        ablations = list(ABLATIONS)
    known = [arm for name in ablations for arm in ABLATIONS[name].arms]
    for arm in arms:
        cli.require(f"--arms={arm}", arm, dict.fromkeys(known))
    jobs = jobs_of(scale, corpus)
    selected = [
        jobs[f"{name}/{arm}"]
        for name in ablations
        for arm in ABLATIONS[name].arms
        if not arms or arm in arms
    ]
    return list(dict.fromkeys(selected))


def run(job: Job, seed: int, workdir: Path) -> list[dict[str, Any]]:
    """Trains or resumes one arm with one seed; returns the records of the finished run.

    The seed determines the parameters and the order of the data.

    Raises:
      KeyboardInterrupt: a signal stopped the training; its state is saved.
    """
    from umv2 import modes
    from umv2.config import from_config_dict
    from umv2.training.train import TrainingDiverged

    values = job.values.copy_and_resolve_references()
    values.seed = values.data.seed = seed
    config = from_config_dict(values)
    start = time.monotonic()
    diverged = None
    try:
        if not modes.train(config, workdir):
            raise KeyboardInterrupt
    except TrainingDiverged as error:
        diverged = str(error)
        logging.warning("%s, seed %d: %s", job.names[0], seed, diverged)
    lines = measurements.read(workdir / "metrics.jsonl")
    logged = [line for line in lines if "loss" in line]
    health = logged[-1] if logged else {}
    end = {
        "kind": "end",
        "diverged": diverged,
        "health": {key: _rounded(value) for key, value in health.items() if "/layer_" in key},
        "answers": corpora.answers(workdir) if job.answers and not diverged else None,
        "seconds_shared_machine": round(time.monotonic() - start, 1),
    }
    return [_head(job, seed, config), *map(_step, logged), *_held_out(lines), end]


def _head(job: Job, seed: int, config: Any) -> dict[str, Any]:
    """Returns the record about a run: configuration, versions, data and cost."""
    from umv2.cost import accounting, traffic

    counts = accounting.parameter_counts(config.model)
    length = config.data.sequence_length
    tokens = _tokens(config)
    return {
        "kind": "run",
        "arms": job.names,
        "seed": seed,
        "config": records.plain(job.values),
        "corpus": corpora.fingerprint(config),
        **measurements.about(),
        **measurements.device(),
        "tokens": tokens,
        "training_flops": accounting.training_flops_per_token(config) * tokens,
        "active_parameters": counts.active_without_embeddings,
        "total_parameters": counts.total_without_embeddings,
        "forward_flops_per_token": sum(
            accounting.forward_flops_per_token(config.model, length).values()
        ),
        "values_read": counts.selected if config.model.placements else None,
        "decode_bytes": {
            str(batch): traffic.decode_bytes(config.model, batch, length).without_cache
            for batch in (1, 64)
        },
    }


def _step(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": line["step"],
        "tokens": line["tokens"],
        "loss": _rounded(line["loss"]),
        "gradient_norm": _rounded(line["gradient_norm"]),
    }


def _held_out(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if "held_out_loss" in line:
            measures = {key: value for key, value in line.items() if key.startswith("held_out_")}
            yield {"kind": "held_out", "step": line["step"], "tokens": line["tokens"]} | measures


def _tokens(config: Any) -> int:
    """Returns the number of training tokens of a run."""
    return int(config.train.num_steps * config.train.batch_size * config.data.sequence_length)


def _rounded(value: float | None) -> float | None:
    """Rounds to six digits; None stands for a number that is not finite, as in metrics.jsonl."""
    return None if value is None else float(f"{value:.6g}")


class Sweep:
    """The selected runs and their progress."""

    def __init__(
        self,
        jobs: Sequence[Job],
        seeds: int,
        results: Path,
        workdir: Path,
        *,
        keep_checkpoints: bool = False,
    ):
        """Prepares runs of `jobs` with seeds 0 to seeds - 1; `results` is the folder of the scale.

        Raises:
          RecordsError: a file does not hold the records of a run, or holds a run with another
            configuration.
          FileError: a folder cannot be written to.
        """
        self.jobs, self.results, self.workdir = jobs, results, workdir
        self._keep_checkpoints = keep_checkpoints
        self.seeds = range(seeds)
        self._speed: list[tuple[float, float]] = []  # FLOPs and seconds of this process's runs
        for folder in (results, workdir):
            measurements.require_writable(folder / "seed_0.jsonl")
        for job, seed in self.unfinished():
            self._require_free(job, seed)

    def _require_free(self, job: Job, seed: int) -> None:
        path = self.file(job, seed)
        if path.exists():
            stored = records.read(path).head["config"]
            changes = records.differences(stored, records.plain(job.values))
            raise measurements.RecordsError(
                f"{path}: its configuration is not that of {job.names[0]}"
                f" ({', '.join(changes) or 'another seed'}); move the file away to run this arm"
            )

    def file(self, job: Job, seed: int) -> Path:
        """Returns the file for the records of a run."""
        return records.run_file(self.results, job.names[0], seed)

    def unfinished(self) -> list[tuple[Job, int]]:
        """Returns the runs without records, arm by arm."""
        stored = records.Stored(self.results)
        return [
            (job, seed)
            for job in self.jobs
            for seed in self.seeds
            if seed not in stored.paths(job.values)
        ]

    def run(self) -> None:
        """Runs everything that is not finished and not being run by another process.

        Prints the progress of the sweep before each run; on a terminal, a progress bar over all
        runs is shown above that of the current run.

        Raises:
          KeyboardInterrupt: a signal stopped the sweep; finished runs are stored, and the current
            one resumes from its checkpoint the next time.
        """
        from tqdm import tqdm

        total = len(self.jobs) * len(self.seeds)
        finished = total - len(self.unfinished())
        with tqdm(desc="sweep", total=total, initial=finished, unit="run", disable=None) as bar:
            for job in self.jobs:
                name = job.names[0]
                try:
                    with files.locked(self.workdir / name / "lock", f"the sweep's {name}"):
                        for seed in self.seeds:
                            if (job, seed) not in self.unfinished():
                                continue
                            tqdm.write(f"{self.progress()}: {', '.join(job.names)}, seed {seed}")
                            sys.stdout.flush()
                            self._run(job, seed)
                            bar.n = total - len(self.unfinished())
                            bar.refresh()
                except files.InUse as error:
                    tqdm.write(f"{name}: {error}")

    def _run(self, job: Job, seed: int) -> None:
        import jax

        workdir = self.workdir / job.names[0] / f"seed_{seed}"
        start = time.monotonic()
        lines = run(job, seed, workdir)
        measurements.write(self.file(job, seed), lines)
        self._speed.append((lines[0]["training_flops"], time.monotonic() - start))
        if not self._keep_checkpoints:
            with files.errors(workdir, "cannot be removed"):
                shutil.rmtree(workdir)
        jax.clear_caches()  # hundreds of programs would fill memory

    def progress(self) -> str:
        """Describes how many runs are finished, and how long this process needs for the rest."""
        unfinished = self.unfinished()
        total = len(self.jobs) * len(self.seeds)
        text = f"{total - len(unfinished)}/{total} runs"
        if not self._speed:
            return text
        flops, seconds = map(sum, zip(*self._speed, strict=True))
        remaining = sum(_flops(job.values) for job, _ in unfinished)
        minutes = remaining * seconds / flops / 60
        return f"{text}, {minutes:.0f} min left for one process"


def _flops(values: ConfigDict) -> float:
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    config = from_config_dict(values)
    return accounting.training_flops_per_token(config) * _tokens(config)


def main(_: list[str]) -> None:
    """Runs the sweep."""
    corpus = _corpus()
    jobs = arms_to_run(_ABLATIONS.value or [], _ARMS.value, _SCALE.value, corpus)
    folder = _SCALE.value
    if corpus is not None:
        folder += "_" + corpora.use(scales.smoke(), **corpus)
    results = cli.path(records.FOLDER) / folder
    workdir = cli.path(_WORKDIR) / folder
    sweep = Sweep(jobs, _SEEDS.value, results, workdir, keep_checkpoints=_KEEP.value)
    command.use_huge_pages()
    import jax

    # The seeds of an arm share their programs.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    if not sys.stderr.isatty():  # without a bar, training logs a line per logged step
        logging.set_verbosity(logging.WARNING)
    try:
        for job in jobs:
            corpora.prepare(job.values)
        if corpus is not None:
            measurements.write(results / records.CORPUS, [corpus])
        sweep.run()
    except KeyboardInterrupt:
        print(f"{sweep.progress()}; run the same command again to resume", flush=True)
        raise
    print(sweep.progress())


def _corpus() -> dict[str, Any] | None:
    """Returns the corpus given by the flags, as arguments of `corpora.use`."""
    if not _CORPUS.present:
        if _VOCAB_SIZE.present:
            raise ConfigError(f"--vocab_size={_VOCAB_SIZE.value}: needs --corpus")
        return None
    corpus = corpora.parse(_CORPUS.value or "", "--corpus")
    return {"corpus": corpus, "vocab_size": _VOCAB_SIZE.value or 8192}


if __name__ == "__main__":
    flags.mark_flag_as_required("ablation")
    cli.run(main)
