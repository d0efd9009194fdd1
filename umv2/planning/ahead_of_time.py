"""Compiles a step for devices that are not attached, and analyses the compiled program.

A compiler reads its settings from the environment before JAX starts, and the process must end to
stop it before it generates code. So `measure` compiles each program in a separate process,
`python -m umv2.planning.ahead_of_time REQUEST ANSWER`, which communicates through two JSON files.
Several may run at a time.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umv2 import sharding
from umv2.config import Config, MeshConfig, from_config_dict, to_dict
from umv2.config.schema import UserError
from umv2.cost import exchange, traffic
from umv2.inference import decode, serving
from umv2.inference.sampling import Sampling
from umv2.model.parameter import Declaration
from umv2.model.weights import Weights
from umv2.planning import optimized, topology
from umv2.planning.hlo import faults, workload
from umv2.planning.hlo.collectives import Collective, read, totals
from umv2.training.state import TrainState, abstract_state, map_declared
from umv2.training.train import make_train_step
from umv2.types import Batch

Step = Literal["train", "decode"]
STEPS: tuple[Step, ...] = ("train", "decode")

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_EXHAUSTED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


class TooSlow(UserError):
    """A compiler exceeded its time limit."""


class Killed(UserError):
    """A compiler was killed, as Linux does when the machine runs out of memory."""


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """Bytes that one device receives per step, over all collectives of one kind and mesh axes.

    `source` is the JAX operation of the one that moves the most bytes, and `overlapped` the bytes
    of those that run during other work.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    source: str
    overlapped: int = 0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the compiler reports for a step, per device; in bytes unless stated otherwise.

    Attributes:
      mesh: devices along each axis.
      table_sharding: mesh.table_sharding, with "auto" resolved if there is a choice.
      device_kind: JAX's name of the device.
      arguments: including the compiler's padding; excluding it if compilation failed.
      parts: of the arguments, without padding: "dense" and "sparse" parameters (value tables,
        experts) with their moments, and "data": batch, cache and counters.
      needed: arguments, outputs that do not alias them, and temporaries; None if compilation failed
        and the compiler does not say.
      available: memory according to the compiler if compilation failed; else None.
      refusal: the compiler's message if compilation failed; else None.
      program: work of the program; None if compilation failed.
      collectives: of the program.
      seconds: wall time from the start of the process to the result.
      process_bytes: peak memory of the process.
      faults: number of instructions of each kind of `faults.Faults`; empty if compilation failed.
    """

    mesh: dict[str, int]
    table_sharding: str
    device_kind: str
    arguments: int
    parts: dict[str, int]
    needed: int | None
    available: int | None
    refusal: str | None
    program: workload.Work | None
    collectives: tuple[CollectiveTotal, ...]
    seconds: float
    process_bytes: int
    faults: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def temporaries(self) -> int | None:
        """The memory needed in addition to the arguments."""
        return None if self.needed is None else self.needed - self.arguments


def measure(
    config: Config,
    target: topology.Topology,
    step: Step,
    *,
    code: bool = False,
    timeout_seconds: float | None = None,
) -> Measurement:
    """Compiles one step in a separate process; takes seconds, and with `code` minutes.

    Args:
      config: with the mesh to use.
      target: the topology to compile for.
      step: "train" or "decode".
      code: also generates code: TPU compilers estimate cycles as they do, and may still refuse the
        program, such as one whose kernels need too much of a core's memory.
      timeout_seconds: limit for the compiler; None: unlimited.

    Raises:
      UserError: the configuration does not work on this topology.
      Killed: the compiler was killed, probably because this machine ran out of memory.
      TooSlow: it took longer than `timeout_seconds`; a compiler that runs out of memory may take
        very long trying to need less.
      RuntimeError: the process failed otherwise; the message is the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        values = {"config": to_dict(config), "topology": target.name, "step": step, "code": code}
        request.write_text(json.dumps(values))
        flags = target.environment["XLA_FLAGS"], optimized.dump_flags(Path(folder))
        environment = target.environment | {
            "XLA_FLAGS": " ".join(flags),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        start = time.monotonic()
        try:
            process = subprocess.run(
                [sys.executable, "-m", "umv2.planning.ahead_of_time", str(request), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | environment,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TooSlow(
                f"--topology={target.name}: the compiler took longer than {timeout_seconds:.0f} s"
            ) from error
        if process.returncode == -signal.SIGKILL:
            raise Killed(
                f"--topology={target.name}: the compiler was killed, probably because this machine"
                " ran out of memory"
            )
        if not answer.exists():
            raise RuntimeError(f"compiling for {target.name} failed:\n{process.stderr[-4000:]}")
        values = json.loads(answer.read_text())
        values["seconds"] = time.monotonic() - start
    if "error" in values:
        raise UserError(values["error"])
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> Measurement:
    """Returns a measurement from the plain values of `dataclasses.asdict`."""
    program = values["program"]
    collectives = (part | {"axes": tuple(part["axes"])} for part in values["collectives"])
    return Measurement(
        **values
        | {
            "program": _work(program) if program else None,
            "collectives": tuple(CollectiveTotal(**part) for part in collectives),
        }
    )


def _work(values: dict[str, Any]) -> workload.Work:
    heaviest = tuple((source, size) for source, size in values["heaviest"])
    sources = tuple(workload.SourceWork(**source) for source in values.get("sources", ()))
    return workload.Work(**values | {"heaviest": heaviest, "sources": sources})


def argument_bytes(config: Config, mesh_sizes: Mapping[str, int], step: Step) -> dict[str, int]:
    """Returns the bytes of a device's arguments by part; needs no compiler and no devices.

    Raises:
      ValueError: the mesh cannot shard an array evenly.
    """
    config = exchange.resolve_mesh(config, mesh_sizes, _num_tokens(config, step))
    one_device = MeshConfig(1, 1, 1, 1, parameters="fsdp", table_sharding="auto")
    train = dataclasses.replace(config.train, gradient_accumulation=1)
    one_device_config = dataclasses.replace(config, mesh=one_device, train=train)
    arguments: Any = _unsharded_state(one_device_config)
    rules = sharding.rules(config.resolved_mesh)
    parts = {"dense": 0, "sparse": 0, "data": _data_bytes(config, mesh_sizes, step)}

    def of_weight(name: str, declared: Declaration) -> _Argument:
        spec = sharding.partition(declared.axes, rules, mesh_sizes, name=name)
        sparse = "row" in declared.axes or "expert" in declared.axes
        part = "data" if declared.group is None else "sparse" if sparse else "dense"
        return _Argument(name, part, spec, declared)

    other = _Argument("counters", "data", PartitionSpec(), None)
    described: Any = map_declared(one_device_config, arguments, of_weight, other)
    if step == "decode":
        arguments, described = arguments.weights, described.weights
    leaves = jax.tree.leaves(described, is_leaf=lambda node: isinstance(node, _Argument))
    for leaf, argument in zip(jax.tree.leaves(arguments), leaves, strict=True):
        dtype = leaf.dtype
        if step == "decode" and argument.declared is not None:
            dtype = serving.served_dtype(argument.declared, dtype, config.model.compute_dtype)
        size = dtype.itemsize
        for length, entry in itertools.zip_longest(leaf.shape, argument.spec):
            shards = math.prod(mesh_sizes[axis] for axis in sharding.axes_of(entry))
            if length % shards:
                raise ValueError(
                    f"{shards} devices cannot shard {argument.name} of shape {leaf.shape}"
                )
            size *= length // shards
        parts[argument.part] += size
    return parts


class _Argument(NamedTuple):
    """The part that an array counts toward, and its sharding."""

    name: str
    part: str
    spec: PartitionSpec
    declared: Declaration | None


def _data_bytes(config: Config, mesh_sizes: Mapping[str, int], step: Step) -> int:
    """Returns the bytes of a batch, or of a key-value cache, on one device."""
    shards = sharding.num_batch_shards(mesh_sizes)
    length = config.data.sequence_length
    if step == "train":
        return len(dataclasses.fields(Batch)) * 4 * config.train.batch_size * length // shards
    cache = traffic.cache_bytes(config.model, config.evaluation.batch_size, length)
    return int(cache) // shards // mesh_sizes[sharding.TENSOR]


@functools.lru_cache(maxsize=1)  # a search tries many meshes of one model
def _unsharded_state(config: Config) -> TrainState:
    return abstract_state(config)


def lower(config: Config, mesh: Mesh, step: Step) -> jax.stages.Lowered:
    """Lowers a step for a mesh of possibly abstract devices; call it outside any mesh context."""
    batch = _batch(config, mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        if step == "train":
            arguments: tuple[Any, ...] = (state, batch)
            function: Any = make_train_step(config)
            donated = 0
        else:
            arguments = tuple(_served(config, mesh, state.weights).values())
            sampling = Sampling.of(config.generate, config.model.vocab_size)
            function, donated = functools.partial(decode.decode, sampling=sampling), 1
        return jax.jit(function, donate_argnums=donated).lower(*arguments)


def _batch(config: Config, mesh: Any) -> Batch:
    shape = (config.train.batch_size, config.data.sequence_length)
    example = jax.eval_shape(
        lambda: Batch(*(jnp.zeros(shape, kind) for kind in (int, int, int, float)))
    )
    return jax.tree.map(lambda leaf: _with_sharding(leaf, sharding.batch_sharding(mesh)), example)


def _served(config: Config, mesh: Any, weights: Weights) -> dict[str, Any]:
    """Returns the arguments of a decode step, for `evaluation.batch_size` sequences."""
    model, size = config.model, config.evaluation.batch_size
    served, cache = jax.eval_shape(
        lambda weights: (
            serving.serve(model, weights),
            weights.model(model).empty_cache(size, config.data.sequence_length),
        ),
        weights,
    )
    served, cache = jax.tree.map(
        lambda leaf: _with_sharding(leaf, NamedSharding(mesh, leaf.sharding.spec)), (served, cache)
    )
    rows = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    keys = _with_sharding(keys, sharding.batch_sharding(mesh))
    return {"served": served, "cache": cache, "tokens": rows, "positions": rows, "keys": keys}


def _with_sharding(leaf: Any, leaf_sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)


@jax.disable_jit(False)  # always analyse the compiled program, even if jit is disabled here
def _compile(
    config: Config, target: topology.Topology, step: Step, folder: Path, *, code: bool
) -> Measurement:
    devices = target.devices()
    batch_size = _batch_size(config, step)
    mesh = sharding.create_mesh(config.mesh, batch_size, devices=devices)
    on_tpu = target.chip.platform == "tpu"
    config = exchange.resolve_mesh(
        config,
        mesh.shape,
        _num_tokens(config, step),
        capacity=target.chip.memory_bytes if on_tpu else None,
    )
    parts, lowered = argument_bytes(config, dict(mesh.shape), step), lower(config, mesh, step)
    program, compilation = optimized.compile_until_optimized(lowered, folder, mesh.size)
    refusal = None if program is not None and not code else _refusal(compilation)
    match = _EXHAUSTED.search(refusal or "")
    num_bytes, needed = sum(parts.values()), _bytes(match[1], match[2]) if match else None
    work, collective_totals, num_faults = None, list[CollectiveTotal](), dict[str, int]()
    if program is not None:
        num_bytes, needed = program.memory.arguments, program.memory.total
        if refusal is None:
            text = compilation.result().as_text() if code else program.text
            assert text is not None  # every XLA backend of JAX has it
            work, collective_totals = workload.read(text), _by_kind_and_axes(read(text, mesh))
            num_faults = _count_faults(text, config, mesh.shape)
    elif refusal is None:
        raise RuntimeError(f"the compiler for {target.name} dumped no program")
    return Measurement(
        mesh=dict(mesh.shape),
        table_sharding=config.mesh.table_sharding,
        device_kind=devices[0].device_kind,
        parts=parts,
        arguments=num_bytes,
        needed=needed,
        available=_bytes(match[3], match[4]) if match else None,
        refusal=refusal,
        program=work,
        collectives=tuple(collective_totals),
        seconds=0.0,  # set by the parent
        process_bytes=max(
            resource.getrusage(who).ru_maxrss * 1024
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ),
        faults=num_faults,
    )


def _refusal(compilation: concurrent.futures.Future[jax.stages.Compiled]) -> str | None:
    """Waits for the end; returns the first line of the error if the program needs too much memory.

    Raises:
      Exception: it failed otherwise.
    """
    error = compilation.exception()
    if error is not None and "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return None if error is None else str(error).splitlines()[0]


def _count_faults(text: str, config: Config, mesh_sizes: Mapping[str, int]) -> dict[str, int]:
    memory, size = config.model.memory, mesh_sizes[sharding.MEMORY]
    rows, columns = memory.num_values, min(memory.value_dim, memory.pre_value_dim or math.inf)
    if config.mesh.table_sharding == "rows":
        rows //= size
    elif config.mesh.table_sharding == "columns":
        columns //= size
    table = (rows, int(columns)) if config.model.placements else None
    found = faults.find(text, sequence_length=config.data.sequence_length, table=table)
    return {name: len(instructions) for name, instructions in dataclasses.asdict(found).items()}


def _by_kind_and_axes(collectives: Sequence[Collective]) -> list[CollectiveTotal]:
    """Sums collectives by kind and axes, most bytes first."""
    parts = []
    for (kind, axes), size in totals(collectives).items():
        group = [one for one in collectives if (one.kind, one.axes) == (kind, axes)]
        source = max(group, key=lambda one: one.total_bytes).source
        overlapped = sum(one.total_bytes for one in group if one.overlapped and not one.dynamic)
        parts.append(CollectiveTotal(kind, axes, size, source, overlapped))
    return sorted(parts, key=lambda part: -part.bytes)


def _batch_size(config: Config, step: Step) -> int:
    """Returns the sequences per pass through the model, over all devices."""
    if step == "decode":
        return config.evaluation.batch_size
    return config.train.batch_size // config.train.gradient_accumulation


def _num_tokens(config: Config, step: Step) -> int:
    """Returns the tokens per pass through the model, over all devices."""
    length = 1 if step == "decode" else config.data.sequence_length
    return _batch_size(config, step) * length


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** _UNITS[unit])


def _main(request: Path, answer: Path) -> None:
    """Answers one request; a UserError is an answer too."""
    values = json.loads(request.read_text())
    config, target = from_config_dict(values["config"]), topology.parse(values["topology"])
    try:
        measured = _compile(config, target, values["step"], request.parent, code=values["code"])
        result = dataclasses.asdict(measured)
    except UserError as error:
        result = {"error": str(error)}
    answer.write_text(json.dumps(result))
    os._exit(0)  # a normal exit waits for the compiler, which may still generate code


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
