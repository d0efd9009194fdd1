"""Training: the train step, a pure function, and the training loop."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from umv2 import distributed, sharding
from umv2.config import Config, to_dict
from umv2.config.schema import UserError
from umv2.cost import accounting, exchange
from umv2.data import loader, tokenizer_copy
from umv2.data.corpus import Corpus, open_corpus
from umv2.model.memory.store import TableCopy, TrainedStore, ValueStore, read_copy
from umv2.model.slots import Observe, memory_layer
from umv2.model.transformer import ModelStats
from umv2.model.weights import Weights, refreshed_buffers
from umv2.training import checkpoint, health, losses, records
from umv2.training.held_out import evaluate_corpus, make_evaluation_step
from umv2.training.progress import Progress, ShowsCompilation, show_progress
from umv2.training.state import TrainState, abstract_state, create_optimizer, create_state
from umv2.training.table_gradient import Dense, TableGradient
from umv2.types import Batch, struct


class TrainingDiverged(UserError):
    """The loss or the gradient norm is not finite."""


@struct
class StepMetrics:
    """Metrics of one step: cross entropy in nats per token, gradient norm before clipping."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    stats: ModelStats


def make_train_step(
    config: Config,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the function for one optimizer step, to be jitted with the state donated.

    Gradients are accumulated over `train.gradient_accumulation` microbatches, with equal weight for
    every token. Buffers are recomputed from the updated parameters, outside the gradient.
    """
    accumulation = config.train.gradient_accumulation
    optimizer = create_optimizer(config)
    observe = Observe.training(config.loss)
    reads_copy = bool(config.model.placements) and memory_layer(config.model).reads_copy

    def objective(
        trained: tuple[Any, ValueStore | None],
        copy: TableCopy | None,
        buffers: dict[str, Any],
        batch: Batch,
        weight: Array,
    ) -> tuple[Array, tuple[Array, ModelStats]]:
        params, masters = trained
        store = masters if masters is None or copy is None else TrainedStore(masters, copy)
        model = Weights(params=params, buffers=buffers, store=masters).model(config.model)
        segment_ids = batch.segment_ids if config.data.mask_across_documents else None
        hidden = model.hidden(batch.inputs, store=store, segment_ids=segment_ids, observe=observe)
        with jax.named_scope("head"):
            loss, nll = losses.cross_entropy(
                hidden.x,
                model.output_embedding,
                batch.targets,
                batch.weights / weight,
                z_loss=config.loss.z_loss,
            )
        terms = model.losses(hidden.stats, config.loss, num_tokens=batch.inputs.size)
        auxiliary = functools.reduce(jnp.add, terms.values(), jnp.zeros(()))
        return loss + auxiliary / accumulation, (nll, hidden.stats)

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weight = jnp.maximum(batch.weights.sum(), 1.0)
        masters, copy = state.store, None
        if reads_copy:
            masters = sharding.defer_gradient_reduction(masters)
            with jax.named_scope("accumulation"):  # once a step, not in every microbatch
                copy = read_copy(state.store, config.model)

        def gradients_of(batch: Batch) -> tuple[Array, ModelStats, Any, TableGradient]:
            trained = (state.params, masters)
            (_, (loss, stats)), (params, tables) = differentiate(
                trained, copy, state.buffers, batch, weight
            )
            return loss, stats, params, Dense(tables)

        if accumulation == 1:
            loss, stats, params_gradient, table_gradient = gradients_of(batch)
        else:

            def accumulate(total: Any, microbatch: Batch) -> tuple[Any, ModelStats]:
                loss, stats, params, table = gradients_of(microbatch)
                summed = jax.tree.map(jnp.add, total[:2], (loss, params))
                return (*summed, total[2].add(table)), stats

            zeros = (
                jnp.zeros(()),
                jax.tree.map(jnp.zeros_like, state.params),
                Dense.zeros_like(masters),
            )
            microbatches = jax.tree.map(
                lambda x: sharding.split_microbatches(x, accumulation), batch
            )
            with jax.named_scope("accumulation"):
                (loss, params_gradient, table_gradient), stacked = jax.lax.scan(
                    accumulate, zeros, microbatches
                )
            stats = jax.tree.map(_over_microbatches, stacked)

        with jax.named_scope("accumulation"):
            table_gradient = table_gradient.reduce(state.store)
        with jax.named_scope("optimizer"):
            params, store, optimizer_state, gradient_norm = optimizer.update(
                params_gradient, table_gradient, state.optimizer, state.params, state.store
            )
        updated = Weights(params=params, buffers=state.buffers, store=store)
        hits = health.hits(stats)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            store=store,
            buffers=refreshed_buffers(config.model, updated),
            optimizer=optimizer_state,
            usage={name: used + hits[name] for name, used in state.usage.items()},
        )
        stats = health.without_hits(stats)
        return new_state, StepMetrics(loss=loss, gradient_norm=gradient_norm, stats=stats)

    return train_step


def train(config: Config, workdir: Path) -> bool:
    """Trains until `train.num_steps`, resuming from the newest valid checkpoint in `workdir`.

    Writes checkpoints (which include the configuration), `metrics.jsonl` and TensorBoard events to
    `workdir`. SIGTERM and Ctrl-C save a checkpoint and return; a second Ctrl-C ends the process. An
    evaluation that was interrupted is repeated when the run resumes.

    Returns:
      Whether the run is complete; False if a signal stopped it.

    Raises:
      ConfigError: the model does not fit the data, or the checkpoint has a different configuration
        or was trained on other data.
      DataError: the data cannot be read.
      FileError: the folder is not writable, or another process is training in it.
      CheckpointError: no checkpoint can be read, or the last one cannot be saved.
      TrainingDiverged: the loss or gradient norm is not finite; the last checkpoint is kept.
    """
    checkpoint.check_name(workdir)
    with distributed.lock_folder(workdir, "training"):
        data = tokenizer_copy.resolve(config.data, workdir)
        corpus = open_corpus(data, config.model.vocab_size)
        microbatch_size = config.train.batch_size // config.train.gradient_accumulation
        mesh = sharding.create_mesh(config.mesh, microbatch_size, config.evaluation.batch_size)
        config = exchange.resolve_mesh(
            config,
            mesh.shape,
            microbatch_size * config.data.sequence_length,
            capacity=sharding.tpu_memory(mesh),
        )
        checkpointer = checkpoint.Checkpointer(
            workdir / "checkpoints",
            keep=config.train.num_checkpoints_kept,
            config=to_dict(config),
            data=dataclasses.asdict(corpus.identity),
        )
        # StopSignal exits last, so that signals do not interrupt pending checkpoint writes.
        with distributed.StopSignal() as stop, jax.set_mesh(mesh), checkpointer:
            state = _restore_or_create(config, checkpointer)
            if jax.process_index() == 0:  # only after any checkpoint was found to match
                tokenizer_copy.save(data.tokenizer, workdir)
            step = int(state.step)
            evaluate_first = _evaluation_is_missing(config, workdir, step)
            if step >= config.train.num_steps and not evaluate_first:
                logging.info("%s has already taken its %d steps", workdir, step)
                return True
            stopped: _Stopped | None = None
            try:
                _run(
                    config,
                    workdir,
                    state,
                    checkpointer,
                    corpus,
                    mesh,
                    stop,
                    evaluate_first=evaluate_first,
                )
            except _Stopped as caught:
                stopped = caught
            with show_progress("writing the last checkpoint"):
                checkpointer.wait()
            if stopped is not None:
                logging.info("stopped by %s after step %s; the state is saved", stop.name, stopped)
    return stopped is None


class _Stopped(Exception):
    """Training stops because of a signal; the argument is the step that was saved."""


def _evaluation_is_missing(config: Config, workdir: Path, step: int) -> bool:
    """Returns whether a restored step still lacks its scheduled evaluation."""
    interval = config.train.evaluation_interval_steps
    if step == 0 or (step % interval and step != config.train.num_steps):
        return False
    return not distributed.broadcast_from_first(lambda: records.has_evaluation(workdir, step))


def _run(
    config: Config,
    workdir: Path,
    state: TrainState,
    checkpointer: checkpoint.Checkpointer,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    stop: distributed.StopSignal,
    *,
    evaluate_first: bool,
) -> None:
    train_config, first_step = config.train, int(state.step)
    train_step = ShowsCompilation(
        jax.jit(make_train_step(config), donate_argnums=0), "the training step"
    )
    optimizer = create_optimizer(config)
    evaluation_step = make_evaluation_step(
        config.model, mask_across_documents=config.data.mask_across_documents
    )
    compute_health = ShowsCompilation(
        jax.jit(functools.partial(health.arrays, config.model)), "the health metrics"
    )
    tokens_per_step = train_config.batch_size * config.data.sequence_length
    batches = loader.train_batches(
        corpus,
        config.data,
        batch_size=train_config.batch_size,
        rows=sharding.local_rows(mesh, train_config.batch_size),
        start_step=first_step,
    )
    progress = Progress(
        num_steps=train_config.num_steps,
        first_step=first_step,
        tokens_per_step=tokens_per_step,
        flops_per_token=accounting.training_flops_per_token(config),
        log_interval_steps=train_config.log_interval_steps,
    )

    def evaluate(step: int, state: TrainState) -> None:
        def step_unless_stopped(batch: Batch) -> tuple[Array, Array]:
            if stop.received:
                raise _Stopped(step)
            return evaluation_step(state.weights, batch)

        with progress.paused():
            held_out = evaluate_corpus(step_unless_stopped, corpus, config, mesh=mesh)
        writer.write(step, {"tokens": step * tokens_per_step, **held_out.metrics()})
        logging.info("step %d: held-out %s", step, held_out)

    with (
        contextlib.closing(batches),
        records.MetricWriter(workdir, config, first_step=first_step) as writer,
        progress,
    ):
        if evaluate_first:
            evaluate(first_step, state)
        pending: tuple[int, StepMetrics] | None = None
        for step in range(first_step + 1, train_config.num_steps + 1):
            batch = sharding.local_to_global(mesh, next(batches))
            state, step_metrics = train_step(state, batch)
            # Report the previous step while the device runs this one.
            if pending is not None:
                _report(*pending, progress, workdir)
            pending = (step, step_metrics)

            # Read the signal only once per step: one that arrives later takes effect, and saves,
            # after the next step.
            stopping = stop.requested(step)
            last = step == train_config.num_steps
            if step % train_config.log_interval_steps == 0 or last:
                loss = _report(*pending, progress, workdir)
                pending = None
                with progress.paused():  # the first call compiles
                    layers = health.fetch(
                        compute_health(step_metrics.stats, state.usage, state.weights)
                    )
                record = {
                    "loss": loss,
                    "gradient_norm": float(step_metrics.gradient_norm),
                    "tokens": step * tokens_per_step,
                    **optimizer.learning_rates(step - 1),
                    **progress.rates(),
                    **layers,
                }
                writer.write(step, record)
                state = _reset_usage(state)
            # Save before evaluating, so that nothing is lost if the evaluation is killed.
            if step % train_config.checkpoint_interval_steps == 0 or last or stopping:
                if pending is not None:  # raises if not finite, so that only good states are saved
                    _report(*pending, progress, workdir)
                    pending = None
                checkpointer.save(step, state)
            if stopping:
                raise _Stopped(step)
            if step % train_config.evaluation_interval_steps == 0 or last:
                evaluate(step, state)


def _restore_or_create(
    config: Config,
    checkpointer: checkpoint.Checkpointer,
) -> TrainState:
    """Restores the newest valid checkpoint, or initialises a new state."""
    if checkpointer.latest_step() is not None:
        with show_progress("restoring the newest checkpoint"):
            state = checkpointer.restore(abstract_state(config))
        logging.info("continuing after step %d", int(state.step))
        return state
    start = time.monotonic()
    with show_progress("initializing the state"):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config))
        # Pass the seed as an argument, so that runs with different seeds share a compiled program.
        create = functools.partial(create_state, config)
        state = sharding.create(create, shardings, config.seed)
        jax.block_until_ready(state)
    logging.info("initialized the state in %.1f s", time.monotonic() - start)
    return state


def _report(step: int, step_metrics: StepMetrics, progress: Progress, workdir: Path) -> float:
    """Waits for a step and reports its loss; raises TrainingDiverged if it is not finite."""
    loss, gradient_norm = float(step_metrics.loss), float(step_metrics.gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        statistics = health.describe(step_metrics.stats)
        raise TrainingDiverged(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}; {statistics}."
            f" The last good checkpoint is kept in {workdir / 'checkpoints'}"
        )
    progress.update(step, loss)
    return loss


def _over_microbatches(stacked: Array) -> Array:
    """Averages a statistic over microbatches; hits are counts, so they are summed."""
    if jnp.issubdtype(stacked.dtype, jnp.integer):
        return stacked.sum(axis=0)
    return stacked.astype(jnp.float32).mean(axis=0)


def _reset_usage(state: TrainState) -> TrainState:
    return dataclasses.replace(state, usage=jax.tree.map(jnp.zeros_like, state.usage))
