"""Folders of safetensors: `config.json` with `model.safetensors`, or with shards and an index.

The layout is that of the Hugging Face hub. Files are read and written one at a time, so in addition
to the caller's arrays, memory holds one tensor (reading) or one shard (writing).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from umv2 import files
from umv2.config.schema import UserError, first_names

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# The format's names of our dtypes; other dtypes keep the format's name.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I64": "int64",
}
_BLOCK = 1 << 16  # elements per finiteness check, which bounds its temporaries


class InteropError(UserError):
    """A folder, file or tensor that cannot be read as the expected model, or cannot be written."""


class TensorFolder:
    """The tensors of a folder: names, shapes and dtypes are loaded, values are read by iteration.

    Raises:
      InteropError: there is no model, a file is missing or damaged, or the index disagrees with the
        shards or with a single file in the same folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index, single = folder / INDEX, folder / SINGLE
        if not index.is_file() and not single.is_file():
            raise InteropError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        weight_map = _read_weight_map(index) if index.is_file() else {}
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        paths = [single] if single.is_file() else shards
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InteropError(f"{index}: names shards that are missing: {first_names(missing)}")
        headers = _read_headers(paths)
        self._paths = {name: path for name, (path, _, _) in headers.items()}
        self.shapes = {name: shape for name, (_, shape, _) in headers.items()}
        self.dtypes = {name: dtype for name, (_, _, dtype) in headers.items()}
        if paths == shards:
            actual = {name: path.name for name, path in self._paths.items()}
            wrong = [n for n in {**weight_map, **actual} if weight_map.get(n) != actual.get(n)]
            if wrong:
                raise InteropError(f"{index}: disagrees with its shards about {first_names(wrong)}")
        elif weight_map:
            self._require_same(weight_map, [path for path in shards if path.is_file()])

    def _require_same(self, weight_map: Mapping[str, str], shards: list[Path]) -> None:
        """Checks that an index, and those of its shards that exist, agree with the single file."""
        differing = self.shapes.keys() ^ weight_map.keys()
        headers = _read_headers(shards)
        differing |= headers.keys() - self.shapes.keys()
        for name in headers.keys() & self.shapes.keys():
            path, *header = headers[name]
            if header != [self.shapes[name], self.dtypes[name]]:
                differing.add(name)
            elif self.dtypes[name] in DTYPES.values():  # no model that we read has other dtypes
                ours, theirs = self.read(name), _read_tensor(path, name)
                if not np.array_equal(ours.reshape(-1).view("u1"), theirs.reshape(-1).view("u1")):
                    differing.add(name)
        if differing:
            raise InteropError(
                f"{self.folder}: {SINGLE} and {INDEX} disagree about"
                f" {first_names(sorted(differing))}; remove the one that is not the model"
            )

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        return _read_tensor(self._paths[name], name)

    def drop(self, names: Iterable[str]) -> None:
        """Drops tensors, so that they are neither checked nor read."""
        for name in names:
            del self._paths[name], self.shapes[name], self.dtypes[name]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every tensor with its name, file by file.

        Raises:
          InteropError: a tensor holds NaN or infinity.
        """
        for path in dict.fromkeys(self._paths.values()):
            with _opened(path) as file:
                for name in file.offset_keys():
                    if name in self._paths:
                        # No local variable: it would keep a tensor alive while the next is read.
                        yield name, _finite(file.get_tensor(name), f"{path}: {name}")

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Checks names, shapes and dtypes (any of those given) against those of a model.

        Raises:
          InteropError: they differ; the message lists all differences.
        """
        faults = []
        if missing := [name for name in shapes if name not in self.shapes]:
            faults.append(f"missing: {first_names(missing)}")
        if extra := [name for name in self.shapes if name not in shapes]:
            faults.append(f"not of this model: {first_names(extra)}")
        both = [name for name in shapes if name in self.shapes]
        faults.append(
            first_names(
                f"{name} has shape {list(self.shapes[name])}, not {list(shapes[name])}"
                for name in both
                if self.shapes[name] != tuple(shapes[name])
            )
        )
        faults.append(
            first_names(
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
    others: Mapping[str, bytes] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model atomically.

    Args:
      folder: must not exist, or be empty.
      config: content of `config.json`.
      tensors: arrays or views of arrays, which are copied shard by shard.
      others: content of further files, by name.
      dtype: of the files; None: that of each array.
      max_shard_bytes: a larger tensor gets its own shard.

    Raises:
      InteropError: the folder is not empty or cannot be written, or a tensor is not finite.
      InUse: another process is writing it.
    """
    require_new(folder)
    target = Path(os.path.realpath(folder))
    partial = target.with_name(f".{target.name}.partial")
    lock = partial / "lock"
    try:
        with files.locked(lock, "export"):
            try:
                for leftover in set(partial.iterdir()) - {lock}:  # of a process that was killed
                    leftover.unlink()
                _write_shards(partial, tensors, dtype, max_shard_bytes)
                (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
                for name, content in (others or {}).items():
                    (partial / name).write_bytes(content)
                lock.unlink()
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except files.InUse:
        raise
    except (SafetensorError, OSError) as error:
        reason = files.reason(error) if isinstance(error, OSError) else str(error)
        raise InteropError(f"{folder}: cannot be written: {reason}") from error


def require_new(folder: Path) -> None:
    """Checks that a folder does not exist or is empty.

    Raises:
      InteropError: the folder is not empty, or cannot be listed.
    """
    with files.errors(folder, "cannot be used"):
        in_use = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if in_use:
        raise InteropError(f"{folder}: already exists; name a new or empty folder")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, which must be a mapping.

    Raises:
      InteropError: the file cannot be read, or is not a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InteropError(f"{path}: cannot be read: {files.reason(error)}") from error
    except ValueError as error:  # includes bytes that are not UTF-8
        raise InteropError(f"{path}: damaged: {error}") from error
    except RecursionError as error:
        raise InteropError(f"{path}: damaged: nested too deep") from error
    if not isinstance(content, dict):
        raise InteropError(f"{path}: damaged: not a mapping")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(
            # A plain file name: an index must not refer to files outside its folder. Symbolic links
            # may, as the hub's cache consists of them.
            isinstance(file, str) and file not in ("", "..") and Path(file).name == file
            for file in weight_map.values()
        )
    ):
        raise InteropError(f"{index}: weight_map must map each tensor to a file in this folder")
    return weight_map


def _read_headers(paths: Iterable[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Returns the file, the shape and the dtype of each tensor."""
    headers: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118, the file is not a mapping
                if name in headers:
                    raise InteropError(f"{path}: {name} is in {headers[name][0].name} as well")
                tensor = file.get_slice(name)
                dtype = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
                headers[name] = (path, tuple(tensor.get_shape()), dtype)
    return headers


def _read_tensor(path: Path, name: str) -> np.ndarray:
    with _opened(path) as file:
        return file.get_tensor(name)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except OSError as error:
        raise InteropError(f"{path}: cannot be read: {files.reason(error)}") from error
    except SafetensorError as error:
        raise InteropError(f"{path}: damaged: {error}") from error


def _finite(tensor: np.ndarray, name: str) -> np.ndarray:
    blocks = np.array_split(tensor.reshape(-1), 1 + tensor.size // _BLOCK)
    if not all(np.isfinite(block).all() for block in blocks):
        raise InteropError(f"{name}: holds NaN or infinity")
    return tensor


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
    file_names = [SINGLE]
    if len(shards) > 1:
        file_names = [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file for file, names in zip(file_names, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(file_names, shards, strict=True):
        # The format stores rows in order, whatever the strides of the views.
        shard = {
            n: _finite(np.ascontiguousarray(tensors[n], dtype).reshape(tensors[n].shape), n)
            for n in names
        }
        path = folder / file
        path.touch()  # gets its mode from the umask; the library would create it with mode 0600
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        if path.stat().st_mode != mode:
            path.chmod(mode)
