"""Any model of ours as safetensors, every array under its one name, with its configuration.

`params/...` are parameters, `store/...` value tables, `buffers/...` saved state that no gradient
reaches. `config.json` holds all of the resolved configuration.
"""

import math
from pathlib import Path

import jax
import numpy as np

from umv2.config import Config, ModelConfig, from_config_dict, to_dict
from umv2.config.schema import ConfigError
from umv2.cost.accounting import parameter_counts
from umv2.data.tokenizers import Tokenizer
from umv2.interop.tensor_files import (
    CONFIG,
    MAX_SHARD_BYTES,
    InteropError,
    TensorFolder,
    read_json,
    write_folder,
)
from umv2.interop.tokenizer_files import files_of
from umv2.model import weights
from umv2.training.checkpoint import Restored

FORMAT, FORMAT_VERSION = "umv2", 2


def export_model(
    folder: Path,
    config: Config,
    model: Restored,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model, in its own dtypes, and the tokenizer that goes along.

    Raises:
      InteropError: the folder is in use, or cannot be written, or a tensor holds NaN or infinity.
    """
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": model.step,
        "config": to_dict(config),
    }
    tensors = {name: np.asarray(leaf) for name, leaf in model.weights.named().items()}
    write_folder(
        folder,
        description,
        tensors,
        others=files_of(tokenizer, config.data),
        max_shard_bytes=max_shard_bytes,
    )


def read_config(folder: Path) -> tuple[Config, int]:
    """Returns the configuration that `export_model` wrote, and the step.

    Raises:
      InteropError: the folder holds something else.
    """
    path = folder / CONFIG
    description = read_json(path)
    for key, value in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if description.get(key) != value:
            raise InteropError(f"{path}: {key}={description.get(key)!r}: must be {value!r}")
    given = description.get("config")
    if not isinstance(given, dict):
        raise InteropError(f"{path}: config={given!r}: must be a section")
    try:
        config = from_config_dict(given)
    except ConfigError as error:
        raise InteropError(f"{path}: config.{error}") from error
    step = description.get("step")
    if type(step) is not int:
        raise InteropError(f"{path}: step={step!r}: must be an integer")
    return config, step


def load_model(folder: Path) -> tuple[Config, Restored]:
    """Returns what `export_model` wrote: the configuration, and the model in host memory.

    Raises:
      InteropError: the folder holds something else, or tensors that are not of its configuration.
    """
    (config, step), tensors = read_config(folder), TensorFolder(folder)
    require_numbers(tensors, config.model)
    abstract = weights.abstract(config.model)
    wanted = abstract.named()
    tensors.check(
        {name: leaf.shape for name, leaf in wanted.items()},
        {name: (str(leaf.dtype),) for name, leaf in wanted.items()},
    )
    arrays = dict(tensors)
    leaves = [arrays[name] for name in wanted]
    loaded = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return config, Restored(step=step, weights=loaded)


def require_numbers(tensors: TensorFolder, config: ModelConfig) -> None:
    """Refuses a folder whose configuration is that of a far larger model, before it is made.

    Raises:
      InteropError: the configuration needs more than twice the numbers that the tensors hold.
    """
    held = sum(math.prod(shape) for shape in tensors.shapes.values())
    # Counting takes time and memory for each layer.
    if config.num_layers > held or parameter_counts(config).total > 2 * held:
        raise InteropError(
            f"{tensors.folder / CONFIG}: describes a far larger model than the tensors, which hold"
            f" {held:,} numbers"
        )
