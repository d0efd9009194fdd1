"""Exports training runs to other formats, and imports such models as runs to continue."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging

from umv2 import files
from umv2.config import Config, ConfigError, differing_fields, to_dict
from umv2.config import files as config_files
from umv2.data import tokenizer_copy
from umv2.interop import model_files, olmoe, tokenizer_files
from umv2.interop.tensor_files import (
    CONFIG,
    MAX_SHARD_BYTES,
    InteropError,
    read_json,
    require_new,
)
from umv2.training import checkpoint
from umv2.training.state import initial_state

Format = Literal["umv2", "olmoe"]


def export_run(
    workdir: Path,
    output: Path,
    format: Format = "umv2",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model of a run's newest valid checkpoint, and its tokenizer, to a new folder.

    Raises:
      CheckpointError: no checkpoint can be read.
      InteropError: the format does not support the model, the folder is not empty or cannot be
        written, or the model is not finite.
    """
    require_new(output)
    checkpoints = workdir / "checkpoints"
    config = config_files.of_run(checkpoint.saved_config(checkpoints), {})
    if format == "olmoe":
        olmoe.describe(config, "float32")  # raises before the arrays are read
    trained_on = checkpoint.saved_data(checkpoints) or {}
    data = tokenizer_copy.resolve(config.data, workdir)
    tokenizer = tokenizer_files.load_for_export(data, trained_on.get("tokenizer", ""))
    model = checkpoint.restore_for_inference(checkpoints, config)
    if format == "olmoe":
        olmoe.export_olmoe(
            output, config, model.weights, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
        )
    else:
        model_files.export_model(
            output, config, model, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
        )
    logging.info("wrote the model of step %d to %s", model.step, output)


def import_model(folder: Path, workdir: Path, config: Config | None) -> None:
    """Writes a run whose checkpoint of step 0 is the model in a folder of either format.

    The run uses the folder's tokenizer; it keeps a copy unless the configuration already names the
    same tokenizer.

    Args:
      folder: written by `export_run`, or OLMoE as published.
      workdir: of the new run.
      config: of the new run; None: the configuration in the folder. For OLMoE, it supplies all that
        the folder does not specify, and the folder's model sizes override it, which is logged. For
        our own format, the model configurations must agree.

    Raises:
      ConfigError: the folder has no configuration of ours and none is given, or the configuration
        does not match the folder's model.
      InteropError: the folder cannot be read, or `workdir` already has checkpoints.
      FileError: `workdir` is in use, or is not a valid folder for a run.
    """
    checkpoint.check_name(workdir)
    _require_no_checkpoints(workdir)
    description = read_json(folder / CONFIG)
    config, tokenizer = _run_config(folder, workdir, config, description)
    with files.locked(workdir / "lock", "import"):
        _require_no_checkpoints(workdir)
        if _is_ours(description):
            _, model = model_files.load_model(folder)
        else:
            _, loaded = olmoe.load_olmoe(folder, config.model)
            model = checkpoint.Restored(step=0, weights=loaded)
        if tokenizer is not None:
            tokenizer_copy.save(str(tokenizer), workdir)
        _save(model, workdir, config)
    logging.info("wrote the model of %s to %s, as step 0 of a run", folder, workdir)


def _require_no_checkpoints(workdir: Path) -> None:
    checkpoints = workdir / "checkpoints"
    with files.errors(checkpoints, "cannot be read"):
        if checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir()):
            raise InteropError(f"{workdir}: already has checkpoints; name a new folder")


def _run_config(
    folder: Path, workdir: Path, config: Config | None, description: dict[str, Any]
) -> tuple[Config, Path | None]:
    """Returns the configuration of the new run, and the tokenizer file to copy into it."""
    if _is_ours(description):
        saved, _ = model_files.read_config(folder)
        if config is not None:
            checkpoint.check_config(
                {"model": to_dict(saved)["model"]}, {"model": to_dict(config)["model"]}
            )
        config = config or saved
        end_of_text_id: Any = saved.data.end_of_text_id
    elif config is None:
        raise ConfigError(f"--config: required, since {folder} does not specify data and training")
    else:
        merged = dataclasses.replace(config, model=olmoe.read_config(folder, config.model))
        # The run can only continue with this configuration; log what it overrides.
        for line in differing_fields(to_dict(config)["model"], to_dict(merged)["model"], "model."):
            logging.info("%s says %s", folder / CONFIG, line)
        config, end_of_text_id = merged, description.get("eos_token_id")
    data, tokenizer = tokenizer_files.adopt(
        config.data, folder, end_of_text_id, config.model.vocab_size
    )
    if tokenizer is not None:
        # Point to the run's copy: the folder may be deleted.
        copy = tokenizer_copy.copy_path(str(tokenizer), workdir.absolute())
        data = dataclasses.replace(data, tokenizer=str(copy))
    adopted = dataclasses.replace(config, data=data)
    for line in differing_fields(to_dict(config)["data"], to_dict(adopted)["data"], "data."):
        logging.info("using the tokenizer of %s: %s", folder, line)
    adopted.validate()
    return adopted, tokenizer


def _is_ours(description: dict[str, Any]) -> bool:
    return description.get("format") == model_files.FORMAT


def _save(model: checkpoint.Restored, workdir: Path, config: Config) -> None:
    """Writes the model as the first checkpoint of a run."""
    checkpointer = checkpoint.Checkpointer(
        workdir / "checkpoints", keep=config.train.num_checkpoints_kept, config=to_dict(config)
    )
    with checkpointer:
        checkpointer.save(0, initial_state(config, jax.tree.map(jnp.asarray, model.weights)))
