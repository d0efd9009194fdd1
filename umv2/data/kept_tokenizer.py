"""The copy of its tokenizer's file that a run keeps, for when the original is gone."""

import dataclasses
import shutil
from pathlib import Path

from absl import logging

from umv2 import files
from umv2.config import DataConfig

_NAMES = ("bytes", "none")  # tokenizers without a file


def keep(tokenizer: str, workdir: Path) -> None:
    """Copies the file of a tokenizer (`data.tokenizer`), if it has one, into the folder of a run.

    Raises:
      FileError: it cannot be written.
    """
    original, copy = Path(tokenizer), copy_of(tokenizer, workdir)
    if tokenizer in _NAMES or not original.exists():
        return
    with files.errors(copy, "cannot be compared"):
        if copy.exists() and copy.read_bytes() == original.read_bytes():
            return
    with files.replacing(copy) as unfinished:
        shutil.copyfile(original, unfinished)


def found(config: DataConfig, workdir: Path) -> DataConfig:
    """Returns a configuration whose tokenizer is there: the run's copy where the file is gone."""
    if config.tokenizer in _NAMES or Path(config.tokenizer).exists():
        return config
    copy = copy_of(config.tokenizer, workdir)
    if not copy.exists():
        return config
    logging.info("data.tokenizer=%r is gone; the run's copy %s is used", config.tokenizer, copy)
    return dataclasses.replace(config, tokenizer=str(copy))


def copy_of(tokenizer: str, workdir: Path) -> Path:
    """Returns where a run keeps the file of its tokenizer."""
    return workdir / f"tokenizer{Path(tokenizer).suffix}"
