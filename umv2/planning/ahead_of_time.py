"""Compiles a step for devices that are not attached, and reads from the program what it needs.

A compiler takes its settings from the environment, before JAX starts, and that of TPUs serves one
process of a machine at a time. So each program is compiled in a process of its own, which
`measure` starts: `python -m umv2.planning.ahead_of_time REQUEST ANSWER`, two JSON files.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from umv2.planning import topology
from umv2.planning.hlo import workload
from umv2.planning.hlo.collectives import Collective, read, totals
from umv2.planning.program import memory
from umv2.training.state import TrainState, abstract_state, map_declared
from umv2.training.train import make_train_step
from umv2.types import Batch

Step = Literal["train", "decode"]
STEPS: tuple[Step, ...] = ("train", "decode")

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_EXHAUSTED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


class TooSlow(UserError):
    """A compiler needed more time than it was given."""


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Bytes that one device receives in one step, through one kind of collective over some axes.

    `source` is the operation of the JAX program behind most of them.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the compiler made of a step, for each device; bytes unless said otherwise.

    Attributes:
      mesh: devices along each axis.
      table_sharding: mesh.table_sharding, chosen where it is "auto" and there is a choice.
      device_kind: as JAX names it.
      arguments: as the compiler places them; where it gave up, without its padding.
      parts: of the arguments, without padding: "dense" and "sparse" parameters (value tables,
        experts) with their moments, and "data": batch, cache and counters.
      needed: arguments, results that lie in none of them, and temporaries; None where the compiler
        gave up without saying how much.
      available: where the compiler gave up: what it says that there is.
      refusal: what the compiler said where it gave up; None where there is a program.
      program: what it does; None where there is none.
      collectives: of the program.
      seconds: of wall time, from the start of the process to the figures.
      process_bytes: memory that the process needed at its worst moment.
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
    collectives: tuple[Collectives, ...]
    seconds: float
    process_bytes: int

    @property
    def temporaries(self) -> int | None:
        """What is needed beside the arguments."""
        return None if self.needed is None else self.needed - self.arguments


def measure(
    config: Config, place: topology.Topology, step: Step, *, timeout_seconds: float | None = None
) -> Measurement:
    """Compiles one step in a process of its own; takes seconds to minutes.

    Raises:
      UserError: the configuration does not work on this topology, or this machine lacks memory.
      TooSlow: it took longer than `timeout_seconds`; compilers that run out of memory try for long
        to need less.
      RuntimeError: the process failed for a reason of its own; its last words are the message.
    """
    with tempfile.TemporaryDirectory() as folder, _turn(place):
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        start = time.monotonic()
        request.write_text(
            json.dumps({"config": to_dict(config), "topology": place.name, "step": step})
        )
        try:
            process = subprocess.run(
                [sys.executable, "-m", "umv2.planning.ahead_of_time", str(request), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | place.environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TooSlow(
                f"--topology={place.name}: the compiler took longer than {timeout_seconds:.0f} s"
            ) from error
        if process.returncode == -9:
            raise UserError(
                f"--topology={place.name}: the compiler was killed, as happens where a machine has"
                " too little memory for it"
            )
        if not answer.exists():
            raise RuntimeError(f"compiling for {place.name} failed:\n{process.stderr[-4000:]}")
        found = json.loads(answer.read_text())
        found["seconds"] = time.monotonic() - start
    if "error" in found:
        raise UserError(found["error"])
    return from_dict(found)


def from_dict(values: dict[str, Any]) -> Measurement:
    """Returns the measurement that `dataclasses.asdict` made plain values of."""
    program = values["program"]
    received = (part | {"axes": tuple(part["axes"])} for part in values["collectives"])
    return Measurement(
        **values
        | {
            "program": _work(program) if program else None,
            "collectives": tuple(Collectives(**part) for part in received),
        }
    )


def _work(values: dict[str, Any]) -> workload.Work:
    heaviest = tuple((source, size) for source, size in values["heaviest"])
    return workload.Work(**values | {"heaviest": heaviest})


def argument_bytes(config: Config, mesh_sizes: Mapping[str, int], step: Step) -> dict[str, int]:
    """Returns the bytes of a device's arguments by part, without a compiler or devices.

    Raises:
      ValueError: an array that the mesh cannot shard evenly.
    """
    config = exchange.resolve_mesh(config, mesh_sizes, _num_tokens(config, step))
    one_device = MeshConfig(1, 1, 1, 1, parameters="fsdp", table_sharding="auto")
    train = dataclasses.replace(config.train, gradient_accumulation=1)
    one_device_config = dataclasses.replace(config, mesh=one_device, train=train)
    arguments: Any = _unsharded_state(one_device_config)
    rules = sharding.rules(config.resolved_mesh)
    parts = {"dense": 0, "sparse": 0, "data": _data_bytes(config, mesh_sizes, step)}

    def of_weight(name: str, declared: Declaration) -> _Placed:
        spec = sharding.partition(declared.axes, rules, mesh_sizes, name=name)
        sparse = "row" in declared.axes or "expert" in declared.axes
        part = "data" if declared.group is None else "sparse" if sparse else "dense"
        return _Placed(name, part, spec, declared)

    other = _Placed("counters", "data", PartitionSpec(), None)
    placed = map_declared(one_device_config, arguments, of_weight, other)
    if step == "decode":
        arguments, placed = arguments.weights, placed.weights
    leaves = jax.tree.leaves(placed, is_leaf=lambda node: isinstance(node, _Placed))
    for leaf, place in zip(jax.tree.leaves(arguments), leaves, strict=True):
        dtype = leaf.dtype
        if step == "decode" and place.declared is not None:
            dtype = serving.served_dtype(place.declared, dtype, config.model.compute_dtype)
        size = dtype.itemsize
        for length, entry in itertools.zip_longest(leaf.shape, place.spec):
            over = math.prod(mesh_sizes[axis] for axis in sharding.axes_of(entry))
            if length % over:
                raise ValueError(f"{over} devices cannot shard {place.name} of shape {leaf.shape}")
            size *= length // over
        parts[place.part] += size
    return parts


class _Placed(NamedTuple):
    """Where the bytes of an array belong, and how it is sharded."""

    name: str
    part: str
    spec: PartitionSpec
    declared: Declaration | None


def _data_bytes(config: Config, mesh_sizes: Mapping[str, int], step: Step) -> int:
    """Bytes of a batch, or of a key-value cache, on one device."""
    shards = sharding.num_batch_shards(mesh_sizes)
    length = config.data.sequence_length
    if step == "train":
        return len(dataclasses.fields(Batch)) * 4 * config.train.batch_size * length // shards
    cache = traffic.cache_bytes(config.model, config.evaluation.batch_size, length)
    return int(cache) // shards // mesh_sizes[sharding.TENSOR]


@functools.lru_cache(maxsize=1)  # a search asks for many meshes of one model
def _unsharded_state(config: Config) -> TrainState:
    return abstract_state(config)


def lower(config: Config, mesh: Mesh, step: Step) -> jax.stages.Lowered:
    """Traces a step for a mesh, whose devices need not be attached; call it outside of the mesh."""
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
    """Arguments of a decode step: as many sequences as evaluation takes, with a full cache."""
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


def _with_sharding(leaf: Any, placed: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


@jax.disable_jit(False)  # what is planned is the compiled program, however this one runs
def _measured(config: Config, place: topology.Topology, step: Step) -> Measurement:
    devices = place.devices()
    batch_size = _batch_size(config, step)
    mesh = sharding.create_mesh(config.mesh, batch_size, devices=devices)
    on_tpu = place.chip.platform == "tpu"
    config = exchange.resolve_mesh(
        config,
        mesh.shape,
        _num_tokens(config, step),
        capacity=place.chip.memory_bytes if on_tpu else None,
    )
    parts, lowered = argument_bytes(config, dict(mesh.shape), step), lower(config, mesh, step)
    available = refusal = program = None
    placed = sum(parts.values())
    received: list[Collectives] = []
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
        found = _EXHAUSTED.search(refusal)
        needed = _bytes(found[1], found[2]) if found else None
        available = _bytes(found[3], found[4]) if found else None
    else:
        held = memory(compiled)
        assert held is not None  # compilers for chips report it
        placed = held.arguments
        needed = held.arguments + held.outputs - held.aliased + held.temporaries
        text = compiled.as_text()
        assert text is not None  # every XLA backend of jax gives it
        program = workload.read(text)
        received = _by_kind_and_axes(read(text, mesh))
    return Measurement(
        mesh=dict(mesh.shape),
        table_sharding=config.mesh.table_sharding,
        device_kind=devices[0].device_kind,
        parts=parts,
        arguments=placed,
        needed=needed,
        available=available,
        refusal=refusal,
        program=program,
        collectives=tuple(received),
        seconds=0.0,  # which the parent knows
        process_bytes=max(
            resource.getrusage(who).ru_maxrss * 1024
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ),
    )


def _by_kind_and_axes(found: Sequence[Collective]) -> list[Collectives]:
    """Adds up collectives, the most bytes first."""
    parts = []
    for (kind, axes), size in totals(found).items():
        alike = [one for one in found if (one.kind, one.axes) == (kind, axes)]
        source = max(alike, key=lambda one: one.total_bytes).source
        parts.append(Collectives(kind, axes, size, source))
    return sorted(parts, key=lambda part: -part.bytes)


def _batch_size(config: Config, step: Step) -> int:
    """Sequences that go through the model at once, over all devices."""
    if step == "decode":
        return config.evaluation.batch_size
    return config.train.batch_size // config.train.gradient_accumulation


def _num_tokens(config: Config, step: Step) -> int:
    """Tokens that go through the model at once, over all devices."""
    length = 1 if step == "decode" else config.data.sequence_length
    return _batch_size(config, step) * length


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** _UNITS[unit])


@contextlib.contextmanager
def _turn(place: topology.Topology) -> Iterator[None]:
    """Waits until no other process of this machine compiles for TPUs."""
    with Path(tempfile.gettempdir(), f"umv2_{place.chip.platform}.lock").open("w") as lock:
        if place.chip.platform == "tpu":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _main(request: Path, answer: Path) -> None:
    """Answers one request; a mistake of the user's is an answer too."""
    wanted = json.loads(request.read_text())
    config, place = from_config_dict(wanted["config"]), topology.parse(wanted["topology"])
    try:
        found = dataclasses.asdict(_measured(config, place, wanted["step"]))
    except UserError as error:
        found = {"error": str(error)}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
