"""Training runs as models in other formats, and such models as runs to continue from."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from absl import logging

from umv2.config import Config, ConfigError, differing_fields, from_config_dict, to_dict
from umv2.interop import model_files, olmoe
from umv2.interop.tensor_files import CONFIG, MAX_SHARD_BYTES, InteropError, read_json
from umv2.training import checkpoint, optim
from umv2.training.state import TrainState, abstract_state

Format = Literal["umv2", "olmoe"]


def export_run(
    workdir: Path,
    output: Path,
    format: Format = "umv2",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model of a run's newest good checkpoint to a new folder.

    Raises:
      CheckpointError: there is no checkpoint that can be read.
      InteropError: the format has no place for such a model, or the folder is in use.
    """
    checkpoints = workdir / "checkpoints"
    config = from_config_dict(checkpoint.saved_config(checkpoints))
    if format == "olmoe":
        olmoe.describe(config, "float32")  # refuses before the arrays are read
    model = checkpoint.restore_for_inference(checkpoints, config)
    if format == "olmoe":
        olmoe.export_olmoe(output, config, model.params, max_shard_bytes=max_shard_bytes)
    else:
        model_files.export_model(output, config, model, max_shard_bytes=max_shard_bytes)
    logging.info("wrote the model of step %d to %s", model.step, output)


def import_model(folder: Path, workdir: Path, config: Config | None) -> None:
    """Writes a run whose checkpoint, of step 0, is the model in a folder of either format.

    Args:
      folder: what `export_run` writes, or OLMoE as published.
      workdir: of a run that does not exist yet.
      config: the run's; None: the one in the folder. For OLMoE it says all that the folder does not
        and its sizes give way, with a message for each; for our own format the models must agree.

    Raises:
      ConfigError: the folder holds no configuration of ours and none is given, or it does not suit
        the folder's model.
      InteropError: the folder cannot be read, or `workdir` has checkpoints already.
    """
    config, model = _read(folder, config)
    config.validate()
    optimizer = optim.Optimizer(config.optimizer, config.train.num_steps)
    checkpointer = checkpoint.Checkpointer(
        workdir / "checkpoints", keep=config.train.num_checkpoints_kept, config=to_dict(config)
    )
    with checkpointer:
        if checkpointer.latest_step() is not None:
            raise InteropError(f"{workdir}: has checkpoints already; name a new folder")
        params, store, buffers = jax.tree.map(
            jnp.asarray, (model.params, model.store, model.buffers)
        )
        usage = abstract_state(config, optimizer).usage
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            store=store,
            buffers=buffers,
            optimizer=optimizer.init(params, store),
            usage=None if usage is None else jnp.zeros(usage.shape, usage.dtype),
        )
        checkpointer.save(0, state)
    logging.info("wrote the model of %s to %s, as step 0 of a run", folder, workdir)


def _read(folder: Path, config: Config | None) -> tuple[Config, checkpoint.Restored]:
    """Returns the configuration of the run to be, and the model."""
    if read_json(folder / CONFIG).get("format") == model_files.FORMAT:
        saved, model = model_files.load_model(folder)
        if config is not None:
            checkpoint.check_config(
                {"model": to_dict(saved)["model"]}, {"model": to_dict(config)["model"]}
            )
        return config or saved, model
    if config is None:
        raise ConfigError(f"--config: needed, since {folder} says nothing of data and training")
    section, params = olmoe.load_olmoe(folder, config.model)
    merged = dataclasses.replace(config, model=section)
    # The run can only go on under this configuration, so whoever asked for another is told.
    for line in differing_fields(to_dict(config)["model"], to_dict(merged)["model"], "model."):
        logging.info("%s says %s", folder / CONFIG, line)
    return merged, checkpoint.Restored(step=0, params=params, store=None, buffers={})
