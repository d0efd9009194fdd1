"""Runs ablations, or goes on with them: every arm, every seed, one file a run.

    python -m experiments.run --ablation=heads --scale=cpu --seeds=3
    python -m experiments.run --ablation=all --scale=cpu

A finished run is not repeated, an interrupted one continues from its checkpoint, and arms of equal
configuration are run once for all ablations that have them. Start the command as often as there are
cores or GPUs to share the work (`taskset -c 0 python -m ...` keeps each on its own core): whoever
finds an arm locked takes the next. `--corpus=site_packages --vocab_size=16384` trains all arms on
another text than the scale's, and keeps them apart.

RESULTS/SCALE/runs/HASH/seed_N.jsonl gets a line about the run (configuration, versions, budget),
one for every logged step, and one about its end, all at once when it ends. A run that diverges has
a result too: where.
"""

import contextlib
import datetime
import fcntl
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from experiments import corpora, records, scales
from experiments.ablations import ABLATIONS, configuration

_ABLATIONS = flags.DEFINE_list("ablation", None, "Ablations to run, or all.")
_ARMS = flags.DEFINE_list("arms", [], "Arms of it to run; default: all.")
_SCALE = flags.DEFINE_enum("scale", "cpu", list(scales.SCALES), "Sizes and length.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0 to SEEDS - 1 of each arm.", 1)
_CORPUS = flags.DEFINE_string(
    "corpus", None, "standard_library, site_packages or globs of text; default: the scale's."
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8192, "Of the byte-pair encoding that is trained on --corpus.", 258
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of checkpoints and corpora.")
_KEEP = flags.DEFINE_bool("keep_checkpoints", False, "Keep the checkpoints of finished runs.")


def arms_to_run(
    ablations: list[str], arms: list[str], scale: str, corpus: dict[str, Any] | None = None
) -> dict[str, "Job"]:
    """Returns the distinct configurations of arms, by hash, in the order of the ablations.

    Args:
      ablations: names, or "all".
      arms: some of their arms; none: all.
      scale: of experiments/scales.py.
      corpus: arguments of `corpora.take`; None: the scale's own corpus.

    Raises:
      app.UsageError: an ablation or an arm that there is not.
    """
    if ablations == ["all"]:
        ablations = list(ABLATIONS)
    known = [arm for name in ablations if name in ABLATIONS for arm in ABLATIONS[name].arms]
    for flag, given, choices in (("ablation", ablations, list(ABLATIONS)), ("arms", arms, known)):
        for name in given:
            if name not in choices:
                raise app.UsageError(f"--{flag}={name}: must be among {', '.join(choices)}, or all")
    jobs: dict[str, Job] = {}
    for name in ablations:
        for arm in ABLATIONS[name].arms:
            if arms and arm not in arms:
                continue
            values = configuration(name, arm, scale)
            if corpus is not None:
                corpora.take(values, **corpus)
            job = jobs.setdefault(records.config_hash(values), Job(values))
            job.names.append(f"{name}/{arm}")
            job.answers |= ABLATIONS[name].measure == "answer_accuracy"
    return jobs


class Job:
    """One configuration, the arms that it is, and whether it is asked questions at its end."""

    def __init__(self, values: ConfigDict):
        self.values = values
        self.names: list[str] = []
        self.answers = False


def run(job: Job, seed: int, workdir: Path) -> list[dict[str, Any]]:
    """Trains one arm with one seed, or continues; returns the records of the finished run.

    The seed is that of the parameters and of the order of the data.

    Raises:
      SystemExit: SIGTERM has stopped the training; its state is saved.
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
        modes.train(config, workdir)
    except TrainingDiverged as error:
        diverged = str(error)
        logging.warning("%s, seed %d: %s", job.names[0], seed, diverged)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]["step"] if lines else 0
    if diverged is None and last < config.train.num_steps:
        sys.exit(f"{job.names[0]}, seed {seed}: stopped after step {last}; start again to go on")
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
    """Says what a run was: configuration, versions, data, and what it cost."""
    import jax

    from umv2.cost import accounting, traffic
    from umv2.training.checkpoint import PACKAGES

    counts = accounting.parameter_counts(config.model)
    length = config.data.sequence_length
    tokens = _tokens(config)
    return {
        "kind": "run",
        "arms": job.names,
        "seed": seed,
        "config_hash": records.config_hash(job.values),
        "config": json.loads(job.values.to_json()),
        "corpus": corpora.fingerprint(config),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | records.versions(PACKAGES),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "tokens": tokens,
        "training_flops": accounting.training_flops_per_token(config) * tokens,
        "active_parameters": counts.active_without_embeddings,
        "total_parameters": counts.total_without_embeddings,
        "forward_flops_per_token": sum(
            accounting.forward_flops_per_token(config.model, length).values()
        ),
        "values_read": counts.selected if config.model.family == "memory" else None,
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
    """Returns the tokens of a whole run."""
    return int(config.train.num_steps * config.train.batch_size * config.data.sequence_length)


def _rounded(value: float | None) -> float | None:
    """Keeps six digits; a number that is not finite is None in metrics.jsonl."""
    return None if value is None else float(f"{value:.6g}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a file while an arm is run; gives False where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class Sweep:
    """All runs that are asked for, and how far they are."""

    def __init__(
        self,
        jobs: dict[str, Job],
        seeds: int,
        results: Path,
        workdir: Path,
        *,
        keep_checkpoints: bool = False,
    ):
        self.jobs, self.results, self.workdir = jobs, results, workdir
        self._keep_checkpoints = keep_checkpoints
        self.seeds = range(seeds)
        self._speed: list[tuple[float, float]] = []  # FLOPs and seconds of runs of this process

    def file(self, config_hash: str, seed: int) -> Path:
        """Returns where the records of a run are stored."""
        return records.run_file(self.results, config_hash, seed)

    def unfinished(self) -> list[tuple[str, int]]:
        """Returns the runs that have no records yet, arm by arm."""
        return [(h, s) for h in self.jobs for s in self.seeds if not self.file(h, s).exists()]

    def run(self) -> None:
        """Runs what nobody else has run or is running, until nothing is left for this process.

        Says before each run how far the sweep is; on a terminal a bar over all runs stands above
        that of the run.
        """
        from tqdm import tqdm

        total = len(self.jobs) * len(self.seeds)
        finished = total - len(self.unfinished())
        with tqdm(desc="sweep", total=total, initial=finished, unit="run", disable=None) as bar:
            for config_hash, job in self.jobs.items():
                with locked(self.workdir / config_hash / "lock") as mine:
                    if not mine:
                        tqdm.write(f"{job.names[0]}: another process runs it")
                        continue
                    for seed in self.seeds:
                        if self.file(config_hash, seed).exists():
                            continue
                        tqdm.write(f"{self.progress()}: {', '.join(job.names)}, seed {seed}")
                        sys.stdout.flush()
                        self._run(config_hash, job, seed)
                        bar.n = total - len(self.unfinished())
                        bar.refresh()

    def _run(self, config_hash: str, job: Job, seed: int) -> None:
        import jax

        workdir = self.workdir / config_hash / f"seed_{seed}"
        start = time.monotonic()
        found = run(job, seed, workdir)
        records.write(self.file(config_hash, seed), found)
        self._speed.append((found[0]["training_flops"], time.monotonic() - start))
        if not self._keep_checkpoints:
            shutil.rmtree(workdir)
        jax.clear_caches()  # hundreds of programs would fill the memory

    def progress(self) -> str:
        """Says how many runs are finished, and how long this process would take for the rest."""
        unfinished = self.unfinished()
        total = len(self.jobs) * len(self.seeds)
        text = f"{total - len(unfinished)}/{total} runs"
        if not self._speed:
            return text
        flops, seconds = map(sum, zip(*self._speed, strict=True))
        left = sum(_flops(self.jobs[config_hash].values) for config_hash, _ in unfinished)
        minutes = left * seconds / flops / 60
        return f"{text}, {minutes:.0f} min left for one process"


def _flops(values: ConfigDict) -> float:
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    config = from_config_dict(values)
    return accounting.training_flops_per_token(config) * _tokens(config)


def main(argv: list[str]) -> None:
    """Runs the sweep."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]}: unexpected argument; options are written --name=value")
    import jax

    from umv2.schema import UserError

    corpus: dict[str, Any] | None = None
    if _CORPUS.value:
        corpus = {"corpus": _CORPUS.value, "vocab_size": _VOCAB_SIZE.value}
    jobs = arms_to_run(_ABLATIONS.value or [], _ARMS.value, _SCALE.value, corpus)
    folder = _SCALE.value
    if corpus is not None:
        folder += "_" + corpora.take(scales.smoke(), **corpus)
        records.write(Path(records.FOLDER.value) / folder / records.CORPUS, [corpus])
    workdir = Path(_WORKDIR.value) / folder
    # The seeds of an arm share their programs.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    results = Path(records.FOLDER.value) / folder
    sweep = Sweep(jobs, _SEEDS.value, results, workdir, keep_checkpoints=_KEEP.value)
    if not sys.stderr.isatty():  # without a terminal there is no bar, but a line a logged step
        logging.set_verbosity(logging.WARNING)
    try:
        for job in jobs.values():
            corpora.prepare(job.values)
        sweep.run()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(sweep.progress())


if __name__ == "__main__":
    flags.mark_flag_as_required("ablation")
    app.run(main)
