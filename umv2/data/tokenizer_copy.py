"""A run's own copy of its tokenizer file, used if the original is gone."""

import dataclasses
import shutil
from pathlib import Path

from absl import logging

from umv2 import files
from umv2.config import DataConfig

_NAMES = ("bytes", "none")  # tokenizers without a file


def save(tokenizer: str, workdir: Path) -> None:
    """Copies the file of a tokenizer (`data.tokenizer`), if it has one, into a run's folder.

    Raises:
      FileError: the copy cannot be written.
    """
    original, copy = Path(tokenizer), copy_path(tokenizer, workdir)
    if tokenizer in _NAMES or not original.exists():
        return
    with files.errors(copy, "cannot be compared"):
        if copy.exists() and copy.read_bytes() == original.read_bytes():
            return
    with files.replacing(copy) as unfinished:
        shutil.copyfile(original, unfinished)


def resolve(config: DataConfig, workdir: Path) -> DataConfig:
    """Returns the configuration, with the run's copy of the tokenizer if the original is gone."""
    if config.tokenizer in _NAMES or Path(config.tokenizer).exists():
        return config
    copy = copy_path(config.tokenizer, workdir)
    if not copy.exists():
        return config
    logging.info("data.tokenizer=%r is gone; using the run's copy %s", config.tokenizer, copy)
    return dataclasses.replace(config, tokenizer=str(copy))


def copy_path(tokenizer: str, workdir: Path) -> Path:
    """Returns the path of a run's copy of its tokenizer file."""
    return workdir / f"tokenizer{Path(tokenizer).suffix}"
