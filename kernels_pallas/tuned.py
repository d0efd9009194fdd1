"""Block sizes tuned on a device, which override the heuristics of the backends.

Nothing is measured while a program is traced. `python -m kernels_pallas.bench --tune` measures on
the attached device and writes `tuned/<device kind>.json` next to this file, or in the folder given
by the environment variable KERNELS_PALLAS_TUNED. A call whose key is in that file gets the tuned
blocks, any other call those of its heuristic. Keys match exactly: operator, implementation, pass,
every size and dtype.

A backend opts in with a frozen dataclass `Blocks` of integers and booleans and a `heuristic(...)`
that returns one. Where it chooses its blocks, it calls

    blocks = heuristic(...)
    blocks = tuned.lookup(
        blocks,
        tuned.Key.of("value_aggregation", "pallas_gpu", "forward", call.sizes, call.values.dtype),
        platform="gpu",
    ) or blocks

Nothing else is needed. `bench --tune` records this call to find the keys of a shape and the blocks
to start from, then varies one field at a time to a quarter, half, double and four times its value.
Blocks that fail to compile or change the result are reported and skipped, so `Blocks` need not
declare which values are valid. If a backend has several kernels with their own blocks, the key
names the kernel: "pallas_tpu/tokens".
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform as machine
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from kernels_pallas import dispatch

Operator = Literal["value_aggregation", "table_gradient", "product_key_top_k"]
# "both" if one choice applies to the forward and the backward pass.
Pass = Literal["forward", "backward", "both"]

_ENTRY_FIELDS = ("operator", "implementation", "pass", "shape", "dtype", "blocks", "measured")


class TunedFileError(ValueError):
    """A file of tuned blocks does not match this code; the message says where and why."""


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The blocks of the "xla" backends: how many tokens to process at once."""

    chunk_size: int


class Key(NamedTuple):
    """The key under which tuned blocks are stored. Build it with `of`."""

    operator: Operator
    implementation: str
    pass_name: Pass
    shape: tuple[tuple[str, int], ...]  # sorted by name
    dtype: str

    @classmethod
    def of(
        cls,
        operator: Operator,
        implementation: str,
        pass_name: Pass,
        shape: Mapping[str, int],
        dtype: Any,
    ) -> "Key":
        """The key of a call, from its sizes by name and the dtype of the arrays it fetches."""
        sizes = tuple(sorted(shape.items()))
        return cls(operator, implementation, pass_name, sizes, jax.numpy.dtype(dtype).name)


@dataclasses.dataclass
class Request:
    """A choice of blocks that a call made under `recording`."""

    key: Key
    default: Any
    platform: str


_recorder: ContextVar[list[Request] | None] = ContextVar("recorder", default=None)
_forced: ContextVar[Mapping[Key, Any] | None] = ContextVar("forced", default=None)


def lookup[B](default: B, key: Key, *, platform: str) -> B | None:
    """Returns the blocks tuned for exactly this key on the target device, or None.

    Args:
        default: the heuristic's blocks, a dataclass; the result has the same type.
        key: the key of the call.
        platform: what the call is compiled for.

    Raises:
        TunedFileError: the device's file has unknown or missing fields, or an entry for this
            operator, implementation and pass whose block or size names no longer match the code.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Request(key, default, platform))
    forced = _forced.get()
    if forced is not None and key in forced:
        return forced[key]
    kind = device_kind(platform)
    if kind is None:
        return None
    path = file_of(kind)
    entries = load(path, kind)
    for other, blocks in entries.items():
        if other[:3] == key[:3]:
            _check_names(path, other, "shape", dict(other.shape), dict(key.shape))
            _check_names(path, other, "blocks", blocks, vars(default))
    return type(default)(**entries[key]) if key in entries else None


def device_kind(platform: str) -> str | None:
    """The kind of device that a call is compiled for, or None if tracing cannot know it.

    It is the device kind of the mesh in context (`jax.set_mesh`), else that of the default devices
    if they are of this platform. JAX calls every CPU "cpu", so for CPUs it is the model name and
    the number of cores.
    """
    if dispatch.lowering_platform() != platform:
        return None
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return _processor() if device.platform == "cpu" else device.device_kind


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    model = match[1] if match else machine.processor() or machine.machine()
    return f"{model.strip()}, {os.cpu_count()} cores"


def file_of(kind: str) -> Path:
    """The path of the file with the tuned blocks of a device kind."""
    default = Path(__file__).with_name("tuned")
    folder = Path(os.environ.get("KERNELS_PALLAS_TUNED") or default).expanduser()
    return folder / f"{re.sub('[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


def load(path: Path, kind: str) -> dict[Key, dict[str, Any]]:
    """Loads the fields of the blocks in a file, by key; empty if the file does not exist.

    Raises:
        TunedFileError: the file cannot be read, or does not match this device kind and this code.
    """
    try:
        return _load(path, kind, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise TunedFileError(f"{path}: {error.strerror}") from None


@functools.cache
def _load(path: Path, kind: str, changed: int) -> dict[Key, dict[str, Any]]:
    del changed  # part of the cache key, so that a rewritten file is read again
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise TunedFileError(f"{path}: not JSON: {error}") from None
    _require(path, isinstance(content, dict), "it must hold an object")
    _require_fields(path, "the file", content, ("device_kind", "entries"))
    file_kind = content["device_kind"]
    _require(path, file_kind == kind, f"device_kind is {file_kind!r}, the device is {kind!r}")
    blocks: dict[Key, dict[str, Any]] = {}
    _require(path, isinstance(content["entries"], list), "entries must be a list")
    for number, entry in enumerate(content["entries"]):
        where = f"entry {number}"
        _require(path, isinstance(entry, dict), f"{where} must be an object")
        _require_fields(path, where, entry, _ENTRY_FIELDS)
        for field, known in (("operator", get_args(Operator)), ("pass", get_args(Pass))):
            rule = f"{where}: {field} is {entry[field]!r}, must be one of {known}"
            _require(path, entry[field] in known, rule)
        for field in ("shape", "blocks"):
            _require(path, isinstance(entry[field], dict), f"{where}: {field} must be an object")
        names = (entry["operator"], entry["implementation"], entry["pass"])
        try:
            key = Key.of(*names, entry["shape"], entry["dtype"])
        except TypeError:
            raise TunedFileError(f"{path}: {where}: unknown dtype {entry['dtype']!r}") from None
        _require(path, key not in blocks, f"{where} repeats the key {key}")
        blocks[key] = entry["blocks"]
    return blocks


def save(path: Path, kind: str, results: Mapping[Key, tuple[Any, Mapping[str, Any]]]) -> None:
    """Adds blocks and their measurements to a file, replacing entries that have the same key.

    The file is replaced atomically.
    """
    load(path, kind)  # raises if the file is invalid
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    by_key = {json.dumps([entry[f] for f in _ENTRY_FIELDS[:5]]): entry for entry in entries}
    for key, (blocks, measured) in results.items():
        values = (*key[:3], dict(key.shape), key.dtype, dataclasses.asdict(blocks), dict(measured))
        entry = dict(zip(_ENTRY_FIELDS, values, strict=True))
        by_key[json.dumps([entry[f] for f in _ENTRY_FIELDS[:5]])] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device_kind": kind, "entries": list(by_key.values())}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def recording() -> Iterator[list[Request]]:
    """Records the choices of blocks made by calls that are traced inside this context."""
    requests: list[Request] = []
    token = _recorder.set(requests)
    try:
        yield requests
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def forcing(blocks: Mapping[Key, Any]) -> Iterator[None]:
    """Overrides the blocks of calls that are traced inside this context.

    Calls that JAX has already traced and cached are not affected.
    """
    token = _forced.set(blocks)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_names(
    path: Path, key: Key, field: str, got: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    rule = (
        f"{', '.join(key[:3])}: {field} has {sorted(got)}, the code has {sorted(known)};"
        " remove the entry, or measure it again with `python -m kernels_pallas.bench --tune`"
    )
    _require(path, got.keys() == known.keys(), rule)


def _require_fields(path: Path, where: str, got: Mapping[str, Any], known: tuple[str, ...]) -> None:
    rule = f"{where} has the fields {sorted(got)}, must have {sorted(known)}"
    _require(path, got.keys() == set(known), rule)


def _require(path: Path, holds: bool, rule: str) -> None:
    if not holds:
        raise TunedFileError(f"{path}: {rule}")
