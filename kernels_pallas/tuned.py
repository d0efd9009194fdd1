"""Block sizes that were measured on a device, in place of those that a heuristic reasons out.

Nothing is measured while a program is traced. `python -m kernels_pallas.bench --tune` measures on
the attached device and writes `tuned/<device kind>.json` beside this file, or in the folder that
the environment variable KERNELS_PALLAS_TUNED names; a call whose key is there gets those blocks,
any other its heuristic's. A key is exact: operator, implementation, pass, every size, dtype.

How a backend takes part. It has a frozen dataclass of whole numbers and booleans, `Blocks`, and a
`heuristic(...)` that returns one, and where it chooses its blocks it says

    blocks = heuristic(...)
    blocks = tuned.lookup(
        blocks,
        tuned.Key.of("value_aggregation", "pallas_gpu", "forward", call.sizes, call.values.dtype),
        platform="gpu",
    ) or blocks

That is all: `bench --tune` learns from this call which
keys a shape has and from which blocks to set out, and tries one field after the other at a quarter,
half, double and four times its value. Blocks that the backend cannot compile, or with
which it computes something else, are reported and left out, so `Blocks` need not say which of its
values are sound. A kernel of a backend that has blocks of its own says so in its key:
"pallas_tpu/tokens".
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
# "both" where one choice serves the forward and the backward pass.
Pass = Literal["forward", "backward", "both"]

_ENTRY_FIELDS = ("operator", "implementation", "pass", "shape", "dtype", "blocks", "measured")


class TunedFileError(ValueError):
    """A file of measured blocks does not fit this code; the message says where and why."""


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The blocks of plain XLA: how many tokens it processes at once."""

    chunk_size: int


class Key(NamedTuple):
    """What blocks are measured for. Build it with `of`."""

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
        """The key of a call, from its sizes by name and the dtype of what it fetches."""
        sizes = tuple(sorted(shape.items()))
        return cls(operator, implementation, pass_name, sizes, jax.numpy.dtype(dtype).name)


@dataclasses.dataclass
class Request:
    """A choice of blocks that a call made while `recording`."""

    key: Key
    default: Any
    platform: str


_recorder: ContextVar[list[Request] | None] = ContextVar("recorder", default=None)
_forced: ContextVar[Mapping[Key, Any] | None] = ContextVar("forced", default=None)


def lookup[B](default: B, key: Key, *, platform: str) -> B | None:
    """Returns the blocks measured for exactly this key on the device at hand, or None.

    Args:
        default: the blocks that the heuristic chooses, a dataclass; what is returned has its type.
        key: of the call.
        platform: what the call is compiled for.

    Raises:
        TunedFileError: the file of the device has a field that is unknown or lacks one, or holds
            blocks or sizes for this operator, implementation and pass that are no longer those of
            the code.
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
    """The kind of device that a call is compiled for, or None where a trace cannot know it.

    It is that of the mesh in context (`jax.set_mesh`), else that of the default devices if they are
    of this platform. JAX calls every processor "cpu", so there it is model and number of cores.
    """
    if dispatch.lowering_platform() != platform:
        return None
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return _processor() if device.platform == "cpu" else device.device_kind


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    model = found[1] if found else machine.processor() or machine.machine()
    return f"{model.strip()}, {os.cpu_count()} cores"


def file_of(kind: str) -> Path:
    """Where the blocks of a kind of device are kept."""
    default = Path(__file__).with_name("tuned")
    folder = Path(os.environ.get("KERNELS_PALLAS_TUNED") or default).expanduser()
    return folder / f"{re.sub('[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


def load(path: Path, kind: str) -> dict[Key, dict[str, Any]]:
    """The blocks in a file by key, as fields; none if there is no such file.

    Raises:
        TunedFileError: the file cannot be read, or is not one of this kind of device and this code.
    """
    try:
        return _load(path, kind, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise TunedFileError(f"{path}: {error.strerror}") from None


@functools.cache
def _load(path: Path, kind: str, changed: int) -> dict[Key, dict[str, Any]]:
    del changed  # only makes a rewritten file another one
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise TunedFileError(f"{path}: not JSON: {error}") from None
    _require(path, isinstance(content, dict), "it must hold an object")
    _require_fields(path, "the file", content, ("device_kind", "entries"))
    found = content["device_kind"]
    _require(path, found == kind, f"device_kind is {found!r}, the device is {kind!r}")
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
            raise TunedFileError(f"{path}: {where}: no dtype {entry['dtype']!r}") from None
        _require(path, key not in blocks, f"{where} repeats the key {key}")
        blocks[key] = entry["blocks"]
    return blocks


def save(path: Path, kind: str, found: Mapping[Key, tuple[Any, Mapping[str, Any]]]) -> None:
    """Adds blocks, with what was measured of them, to a file; a key that is there is replaced.

    The file is written whole or stays as it was.
    """
    load(path, kind)  # a file that is broken is not added to
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    by_key = {json.dumps([entry[f] for f in _ENTRY_FIELDS[:5]]): entry for entry in entries}
    for key, (blocks, measured) in found.items():
        values = (*key[:3], dict(key.shape), key.dtype, dataclasses.asdict(blocks), dict(measured))
        entry = dict(zip(_ENTRY_FIELDS, values, strict=True))
        by_key[json.dumps([entry[f] for f in _ENTRY_FIELDS[:5]])] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device_kind": kind, "entries": list(by_key.values())}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def recording() -> Iterator[list[Request]]:
    """Collects the choices of blocks that the calls traced meanwhile make."""
    requests: list[Request] = []
    token = _recorder.set(requests)
    try:
        yield requests
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def forcing(blocks: Mapping[Key, Any]) -> Iterator[None]:
    """Gives the calls traced meanwhile these blocks. What JAX has traced before, it keeps."""
    token = _forced.set(blocks)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_names(
    path: Path, key: Key, field: str, found: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    rule = (
        f"{', '.join(key[:3])}: {field} has {sorted(found)}, the code has {sorted(known)};"
        " remove the entry, or measure it again with `python -m kernels_pallas.bench --tune`"
    )
    _require(path, found.keys() == known.keys(), rule)


def _require_fields(
    path: Path, where: str, found: Mapping[str, Any], known: tuple[str, ...]
) -> None:
    rule = f"{where} has the fields {sorted(found)}, must have {sorted(known)}"
    _require(path, found.keys() == set(known), rule)


def _require(path: Path, holds: bool, rule: str) -> None:
    if not holds:
        raise TunedFileError(f"{path}: {rule}")
