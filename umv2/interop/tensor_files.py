"""Folders of safetensors: `config.json` beside `model.safetensors`, or beside shards with an index.

The layout is that of the Hugging Face hub. Tensors are read and written one file after another, so
that memory holds no more than the caller's arrays and one tensor (reading) or one shard (writing).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from umv2.schema import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# What the format calls our dtypes; any other keeps the format's name.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I64": "int64",
}
_NAMED_IN_ERRORS = 3


class InteropError(UserError):
    """A folder, file or tensor that cannot be read as the model it should be, or not be written."""


class TensorFolder:
    """The tensors of a folder: their names, shapes and dtypes at once, their values by iteration.

    Raises:
      InteropError: there is no model, a file is missing or damaged, or the index does not say what
        the shards hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        index = folder / INDEX
        if index.is_file():
            weight_map = _read_weight_map(index)
            self._files = [folder / name for name in sorted(set(weight_map.values()))]
        elif (folder / SINGLE).is_file():
            weight_map, self._files = None, [folder / SINGLE]
        else:
            raise InteropError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        found: dict[str, str] = {}
        for path in self._files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118, the file is no mapping
                    tensor = file.get_slice(name)
                    found[name] = path.name
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
        if weight_map is not None and weight_map != found:
            wrong = [n for n in {**weight_map, **found} if weight_map.get(n) != found.get(n)]
            raise InteropError(f"{index}: disagrees with its shards about {several(wrong)}")

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every tensor with its name, file by file."""
        for path in self._files:
            with _opened(path) as file:
                for name in file.offset_keys():
                    yield name, file.get_tensor(name)

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Compares names, shapes and dtypes (any of several) with what a model needs.

        Raises:
          InteropError: they differ; the message tells all the ways in which they do.
        """
        faults = []
        if missing := [name for name in shapes if name not in self.shapes]:
            faults.append(f"missing: {several(missing)}")
        if extra := [name for name in self.shapes if name not in shapes]:
            faults.append(f"not of this model: {several(extra)}")
        both = [name for name in shapes if name in self.shapes]
        faults.append(
            several(
                f"{name} has shape {list(self.shapes[name])}, not {list(shapes[name])}"
                for name in both
                if self.shapes[name] != tuple(shapes[name])
            )
        )
        faults.append(
            several(
                f"{name} is {self.dtypes[name]}, not {' or '.join(dtypes[name])}"
                for name in both
                if self.dtypes[name] not in dtypes[name]
            )
        )
        if any(faults):
            raise InteropError(f"{self.folder}: tensors: " + "; ".join(filter(None, faults)))


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model: all of it, or nothing under the folder's name.

    Args:
      folder: must not exist, or be empty.
      config: what becomes `config.json`.
      tensors: arrays or views of arrays, which are copied shard by shard.
      dtype: of the files; None: that of each array.
      max_shard_bytes: a larger tensor has a shard to itself.

    Raises:
      InteropError: the folder is in use, or cannot be written.
    """
    target = folder.absolute()
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InteropError(f"{folder}: exists already; name a new or empty folder")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        _write_shards(partial, tensors, dtype, max_shard_bytes)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(target)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InteropError(f"{folder}: cannot be written: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds.

    Raises:
      InteropError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InteropError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also for bytes that are no text
        raise InteropError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: damaged: holds no mapping")
    return content


def several(names: Any) -> str:
    """Joins a few names, and counts the rest."""
    names = list(names)
    rest = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        # A plain name: an index may not reach out of its folder.
        isinstance(file, str) and Path(file).name == file
        for file in weight_map.values()
    ):
        raise InteropError(f"{index}: weight_map must give each tensor the name of a file here")
    if missing := sorted({f for f in weight_map.values() if not (index.parent / f).is_file()}):
        raise InteropError(f"{index}: names shards that are missing: {several(missing)}")
    return weight_map


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise InteropError(f"{path}: damaged: {error}") from error


def _write_shards(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: str | None, max_shard_bytes: int
) -> None:
    sizes = {
        name: array.size * np.dtype(dtype or array.dtype).itemsize
        for name, array in tensors.items()
    }
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        # The format stores rows in order, whatever the strides of the views.
        shard = {
            n: np.ascontiguousarray(tensors[n], dtype).reshape(tensors[n].shape) for n in names
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
