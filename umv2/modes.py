"""The functions behind each `--mode` of main.py."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from umv2 import sharding
from umv2.config import Config, ConfigError, to_dict
from umv2.config import files as config_files
from umv2.cost import exchange
from umv2.cost import report as cost_report
from umv2.data import prepare as data_preparation
from umv2.data import tokenizer_copy, tokenizers
from umv2.data.corpus import Corpus, open_corpus
from umv2.evaluation import downstream, long_context, report
from umv2.evaluation.scoring import Scorer
from umv2.inference.decode import Generator
from umv2.interop import runs
from umv2.planning import plan as cost_plan
from umv2.planning import search as plan_search
from umv2.training import checkpoint, inspection
from umv2.training import train as training
from umv2.training.held_out import evaluate_corpus, make_evaluation_step
from umv2.training.progress import show_progress

train = training.train
inspect = inspection.inspect
export_run = runs.export_run
import_model = runs.import_model


def evaluate(config: Config | None, workdir: Path) -> report.Report:
    """Evaluates the newest valid checkpoint on the held-out documents, and plots the loss curve.

    Raises:
      ConfigError: the model configuration or the tokenizer is not the run's.
      CheckpointError: no checkpoint can be read.
    """
    config = _run_config(config, workdir)
    corpus = open_corpus(config.data, config.model.vocab_size, purpose="evaluate")
    _check_corpus(corpus, workdir)
    config, mesh, restored = _restored(config, workdir)
    with jax.set_mesh(mesh):
        step = make_evaluation_step(
            config.model, mask_across_documents=config.data.mask_across_documents
        )
        held_out = evaluate_corpus(
            functools.partial(step, restored.weights),
            corpus,
            config,
            mesh=mesh,
        )
    return report.write(workdir, restored.step, held_out, corpus)


def evaluate_long_context(config: Config | None, workdir: Path) -> long_context.LongContextReport:
    """Evaluates the newest valid checkpoint on the long-context suite.

    Filler text is taken from the held-out documents. Process 0 writes `long_context.jsonl` and
    `long_context.png`.

    Raises:
      ConfigError: the model configuration or the tokenizer is not the run's, or it has none.
      CheckpointError: no checkpoint can be read.
    """
    config = _run_config(config, workdir)
    tokenizer = _tokenizer(config, workdir, "the long-context suite")
    corpus = open_corpus(config.data, config.model.vocab_size, purpose="evaluate")
    _check_corpus(corpus, workdir)
    config, mesh, restored = _restored(config, workdir)
    suite_report = long_context.evaluate(
        config,
        Scorer(config.model, restored.weights, mesh),
        tokenizer=tokenizer,
        texts=[text.decode() for text in corpus.held_out_documents()],
        step=restored.step,
    )
    if jax.process_index() == 0:
        suite_report.write(workdir, config)
    return suite_report


def evaluate_downstream(
    config: Config | None,
    workdir: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
) -> downstream.DownstreamReport:
    """Evaluates on tasks of lm-evaluation-harness; process 0 writes `downstream.json`.

    Raises:
      ConfigError: the model configuration or the tokenizer is not the run's, or it has none.
      UserError: the harness is not installed, a task is unknown, or its data is unavailable.
      CheckpointError: no checkpoint can be read.
    """
    downstream.require_harness()
    from umv2.evaluation import harness

    model, step = harness_model(_run_config(config, workdir), workdir)
    task_report = harness.run(
        model,
        tasks,
        step=step,
        num_fewshot=num_fewshot,
        limit=limit,
        include_path=include_path,
    )
    if jax.process_index() == 0:
        task_report.write(workdir)
    return task_report


def harness_model(config: Config, workdir: Path) -> tuple[Any, int]:
    """Returns the newest valid checkpoint as a model of lm-evaluation-harness, and its step.

    Args:
      config: configuration of the run.
      workdir: folder of the run.

    Raises:
      ConfigError: the run has no tokenizer, or was trained with another one.
      CheckpointError: no checkpoint can be read.
    """
    from umv2.evaluation import harness

    tokenizer = _tokenizer(config, workdir, "lm-evaluation-harness")
    config, mesh, restored = _restored(config, workdir)
    generator = Generator(
        config.model,
        restored.weights,
        tokenizer=tokenizer,
        config=config.generate,
        mesh=mesh if mesh.size > 1 else None,
    )
    model = harness.HarnessModel(
        Scorer(config.model, restored.weights, mesh),
        generator,
        tokenizer,
        max_length=config.data.sequence_length,
        batch_size=config.evaluation.batch_size,
    )
    return model, restored.step


def _restored(
    config: Config, workdir: Path
) -> tuple[Config, jax.sharding.Mesh, checkpoint.Restored]:
    """Returns the configuration with a resolved mesh, the mesh, and the newest checkpoint."""
    mesh = sharding.create_mesh(config.mesh, config.evaluation.batch_size)
    num_tokens = config.evaluation.batch_size * config.data.sequence_length
    config = exchange.resolve_mesh(
        config, mesh.shape, num_tokens, capacity=sharding.tpu_memory(mesh)
    )
    with jax.set_mesh(mesh), show_progress("restoring the newest checkpoint"):
        return config, mesh, checkpoint.restore_for_inference(workdir / "checkpoints", config)


def _check_corpus(corpus: Corpus, workdir: Path) -> None:
    """Rejects a tokenizer other than the run's, and warns about different held-out documents."""
    trained_on = checkpoint.saved_data(workdir / "checkpoints")
    if trained_on is None:
        return
    checkpoint.check_tokenizer(trained_on, corpus.identity.tokenizer)
    if corpus.identity.held_out != trained_on["held_out"]:
        logging.warning(
            "the held-out documents differ from those of the run in %s, which may have been trained"
            " on some of them",
            workdir,
        )


def _tokenizer(config: Config, workdir: Path, purpose: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a run.

    Raises:
      ConfigError: the run has no tokenizer, or was trained with another one.
      DataError: the file of the tokenizer cannot be read.
    """
    tokenizer = tokenizers.load_tokenizer(config.data.tokenizer, config.data.end_of_text_id)
    if tokenizer is None:
        raise ConfigError(f"data.tokenizer='none': {purpose} needs a tokenizer")
    trained_on = checkpoint.saved_data(workdir / "checkpoints")
    checkpoint.check_tokenizer(trained_on, tokenizer.fingerprint)
    return tokenizer


def generate(config: Config | None, workdir: Path, prompt: str) -> Iterator[str]:
    """Yields the prompt and its continuation by the newest valid checkpoint.

    Raises:
      ConfigError: the model configuration or the tokenizer is not the run's, or it has none.
      CheckpointError: no checkpoint can be read.
    """
    config = _run_config(config, workdir)
    config = exchange.resolve_mesh(
        config, sharding.axis_sizes(dataclasses.replace(config.mesh, replica=1), 1), num_tokens=1
    )
    tokenizer = _tokenizer(config, workdir, "generating text")
    mesh = _generation_mesh(config)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        restored = checkpoint.restore_for_inference(workdir / "checkpoints", config)
    yield prompt
    generator = Generator(
        config.model, restored.weights, tokenizer=tokenizer, config=config.generate, mesh=mesh
    )
    yield from generator.generate(prompt)


def _generation_mesh(config: Config) -> jax.sharding.Mesh | None:
    """Returns a mesh for one replica of the model; None if a single device holds it."""
    mesh = dataclasses.replace(config.mesh, replica=1)
    if mesh.fsdp * mesh.memory * mesh.tensor == 1:
        return None
    return sharding.create_mesh(mesh)


def cost(
    named_configs: Mapping[str, Config], context_length: int | None, output_dir: Path
) -> cost_report.CostReport:
    """Returns the costs of the configurations; plots the bytes of a decode step to `cost.png`."""
    report = cost_report.cost_report(named_configs, context_length=context_length)
    report.draw(output_dir / "cost.png")
    logging.info("wrote %s", output_dir / "cost.png")
    return report


def plan(
    name: str,
    config: Config,
    topology: str,
    *,
    step: cost_plan.Step,
    search_limit: int | None,
    code: bool,
) -> cost_plan.Plan | plan_search.Search:
    """Compiles a step for a topology that need not be attached: does it fit, and what bounds it?

    With a `search_limit`, compiles training steps for up to that many of the most promising meshes.
    With `code`, the compiler also generates code.

    Raises:
      UserError: the topology is unknown, its compiler is missing, or the mesh is impossible.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing is executed, so initialise no accelerator
    if search_limit is not None:
        return plan_search.search(name, config, topology, limit=search_limit, code=code)
    logging.info("compiling the %s step for %s", step, topology)
    return cost_plan.plan(name, config, topology, step, code=code)


def prepare(config: Config, output_dir: Path) -> None:
    """Tokenizes the configured text into token shards, on all cores."""
    data_preparation.prepare(config.data, output_dir, num_processes=os.cpu_count() or 1)


def train_tokenizer(config: Config, output_dir: Path, vocab_size: int) -> Path:
    """Trains a byte-level BPE on the configured text and returns the file for data.tokenizer."""
    path = output_dir / f"bpe_{vocab_size}.json"
    data_preparation.train_tokenizer(config.data, path, vocab_size)
    return path


def _run_config(config: Config | None, workdir: Path) -> Config:
    """Returns `config`, checked to have the run's model; by default the run's configuration."""
    saved = config_files.of_run(checkpoint.saved_config(workdir / "checkpoints"), {})
    if config is not None:
        of_run, given = ({"model": to_dict(each)["model"]} for each in (saved, config))
        if differences := checkpoint.essential_differences(of_run, given):
            raise ConfigError(f"--config: not the model of {workdir}: " + "; ".join(differences))
    config = config or saved
    return dataclasses.replace(config, data=tokenizer_copy.resolve(config.data, workdir))
