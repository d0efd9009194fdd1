"""Our models as safetensors, with their configuration.

Arrays have the same names as in checkpoints: `params/...` are parameters, `store/...` value tables,
and `buffers/...` saved state without a gradient. `config.json` holds the resolved configuration.
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
from umv2.interop.tokenizer_files import file_contents
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
    """Writes a model, in its own dtypes, together with its tokenizer.

    Raises:
      InteropError: the folder is not empty or cannot be written, or a tensor is not finite.
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
        others=file_contents(tokenizer, config.data),
        max_shard_bytes=max_shard_bytes,
    )


def read_config(folder: Path) -> tuple[Config, int]:
    """Returns the configuration that `export_model` wrote, and the step.

    Raises:
      InteropError: the folder does not hold a model in this format.
    """
    path = folder / CONFIG
    description = read_json(path)
    for key, value in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if description.get(key) != value:
            raise InteropError(f"{path}: {key}={description.get(key)!r}: must be {value!r}")
    section = description.get("config")
    if not isinstance(section, dict):
        raise InteropError(f"{path}: config={section!r}: must be a section")
    try:
        config = from_config_dict(section)
    except ConfigError as error:
        raise InteropError(f"{path}: config.{error}") from error
    step = description.get("step")
    if type(step) is not int:
        raise InteropError(f"{path}: step={step!r}: must be an integer")
    return config, step


def load_model(folder: Path) -> tuple[Config, Restored]:
    """Loads what `export_model` wrote: the configuration, and the model in host memory.

    Raises:
      InteropError: the folder holds something else, or its tensors do not match its configuration.
    """
    (config, step), tensors = read_config(folder), TensorFolder(folder)
    check_size(tensors, config.model)
    abstract = weights.abstract(config.model)
    expected = abstract.named()
    tensors.check(
        {name: leaf.shape for name, leaf in expected.items()},
        {name: (str(leaf.dtype),) for name, leaf in expected.items()},
    )
    arrays = dict(tensors)
    leaves = [arrays[name] for name in expected]
    loaded = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return config, Restored(step=step, weights=loaded)


def check_size(tensors: TensorFolder, config: ModelConfig) -> None:
    """Rejects a configuration of a far larger model than the tensors, before building the model.

    Raises:
      InteropError: the configuration has more than twice as many parameters as the tensors.
    """
    num_values = sum(math.prod(shape) for shape in tensors.shapes.values())
    # Check the layers first, because counting takes time and memory for each layer.
    if config.num_layers > num_values or parameter_counts(config).total > 2 * num_values:
        raise InteropError(
            f"{tensors.folder / CONFIG}: describes a far larger model than the tensors, which have"
            f" {num_values:,} elements"
        )
