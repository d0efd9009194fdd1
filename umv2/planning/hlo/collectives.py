"""Reads the collectives of a compiled program from its HLO text: kind, mesh axes, bytes, count."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jax.sharding import Mesh

from umv2 import tables
from umv2.planning import hlo

Kind = Literal[
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]
_KINDS: tuple[Kind, ...] = get_args(Kind)

# Replica groups in XLA's three formats: mesh axes, iota, and explicit lists.
_GROUPS = (
    r"mesh\[[^\]]*\](?:, device_ids=\(.*?\))? ?\{[^}]*\}"
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|\{(?:\{[\d,]*\},?)*\}"
)
_MESH_AXIS = re.compile(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?")
_NUMBERS = re.compile(r"\d+")
# The TPU compiler may split a collective over several fusions, each of which contains it; in the
# fusion that starts it, it is an operand of this custom call.
_SPREAD = '"async_collective_fusion_config"'
_SPREAD_START = '"AsyncCollectiveStart"'
# Instructions during which a collective may run.
_WORK = {"call", "conditional", "convolution", "custom-call", "dot", "fusion", "while"}
# Instructions that may separate an all-reduce from the slice of it that a device keeps.
_RESHAPING = ("bitcast", "reshape", "copy", "convert", "transpose", "pad")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    Attributes:
      kind: of the collective.
      axes: mesh axes that it communicates over, in the order of the mesh.
      dtype: of the operands, by NumPy name; several are joined by "+".
      bytes: received by one device per execution of the instruction.
      count: executions per execution of the program. If `dynamic`: per iteration of the loops whose
        trip count depends on data.
      dynamic: whether it is inside such a loop.
      source: the JAX operation that it comes from, as recorded by the compiler.
      overlapped: whether other work is scheduled between its start and its end.
    """

    kind: Kind
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    count: int
    dynamic: bool = False
    source: str = ""
    overlapped: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes that one device receives per execution of the program."""
        return self.bytes * self.count


def read(text: str | None, mesh: Mesh | Mapping[str, int]) -> tuple[Collective, ...]:
    """Reads the collectives over more than one device.

    Counts the bytes received in an ideal ring of G devices: (G-1)/G of the result of an all-gather,
    (G-1)/G of the operand of a reduce-scatter or all-to-all (for a ragged one: of its output
    buffer), 2 (G-1)/G of the operand of an all-reduce, and the operand of a permute or broadcast.
    Instructions in a loop count once per iteration, and a conditional counts as its most expensive
    branch. Collectives in loops whose trip count depends on data are marked as dynamic: they may
    run any number of times, or never.

    Args:
      text: of a program compiled for CPU, TPU or GPU, from `jax.stages.Compiled.as_text()`; None,
        which some backends return, is an error.
      mesh: that it was compiled for, or its axis sizes by name, in order.

    Raises:
      ValueError: the text is not a compiled program, or not for this mesh.
    """
    sizes = dict(mesh.shape if isinstance(mesh, Mesh) else mesh)
    program = hlo.parse(text or "")
    num_devices = math.prod(sizes.values())
    if program.num_devices != num_devices:
        raise ValueError(
            f"the program is compiled for {program.num_devices} devices, the mesh {sizes} has"
            f" {num_devices}"
        )
    return tuple(_Reader(program, sizes).collectives(program.entry, ()))


def totals(collectives: Iterable[Collective]) -> dict[tuple[Kind, tuple[str, ...]], int]:
    """Sums the bytes that one device receives per execution, excluding dynamic collectives."""
    sums: dict[tuple[Kind, tuple[str, ...]], int] = {}
    for collective in collectives:
        if not collective.dynamic:
            key = collective.kind, collective.axes
            sums[key] = sums.get(key, 0) + collective.total_bytes
    return sums


def as_text(collectives: Iterable[Collective]) -> str:
    """Returns a table with one row per kind, axes and dtype, most bytes first.

    Dynamic collectives follow separately, per iteration of their loops, excluded from the total.
    """
    rows: list[tuple[str, ...]] = [("received by one device", "executions", "MB each", "MB")]
    collectives = tuple(collectives)
    for dynamic in (False, True):
        groups: dict[str, list[Collective]] = {}
        for collective in collectives:
            if collective.dynamic == dynamic:
                axes = ", ".join(collective.axes)
                name = f"  {collective.kind} ({axes}) {collective.dtype}"
                groups.setdefault(name, []).append(collective)
        sums = {name: sum(c.total_bytes for c in group) for name, group in groups.items()}
        if dynamic and groups:
            rows.append(("in one round of loops that depend on data",))
        for name, total in sorted(sums.items(), key=lambda item: -item[1]):
            count = sum(collective.count for collective in groups[name])
            rows.append((name, f"{count:,}", f"{total / count / 1e6:,.3f}", f"{total / 1e6:,.3f}"))
        if not dynamic:
            rows.append(("  total", "", "", f"{sum(sums.values()) / 1e6:,.3f}"))
    return tables.table(rows)


class _Reader:
    """Walks a program from its entry through all called computations."""

    def __init__(self, program: hlo.Program, sizes: Mapping[str, int]):
        self._program = program
        self._sizes = sizes
        self._communicates: dict[str, bool] = {}

    def collectives(
        self, computation: hlo.Computation, arguments: Sequence[hlo.Value]
    ) -> Iterator[Collective]:
        """Yields the collectives of one run of a computation, given its known arguments."""
        values = hlo.Evaluation(self._program, computation, arguments)
        for instruction in computation.instructions.values():
            if kind := _kind(instruction):
                yield from self._collective(kind, computation, instruction)
            elif not self._leads_to_collectives(instruction):
                continue
            elif instruction.opcode == "while":
                yield from self._loop(instruction, values.operands(instruction)[0])
            elif instruction.opcode == "conditional":
                called = self._program.called(instruction)
                operands = values.operands(instruction)[1:]
                branches = zip(called, operands, strict=True)
                alternatives = [tuple(self.collectives(branch, [o])) for branch, o in branches]
                yield from max(alternatives, key=_branch_bytes)
            else:
                operands = values.operands(instruction)
                overlapped = _is_overlapped(computation, instruction)
                for called_computation in self._program.called(instruction):
                    for collective in self.collectives(called_computation, operands):
                        overlaps = overlapped or collective.overlapped
                        yield dataclasses.replace(collective, overlapped=overlaps)

    def _loop(self, loop: hlo.Instruction, state: hlo.Value) -> Iterator[Collective]:
        trip_count = self._program.trip_count(loop, state)
        invariant = self._program.loop_invariant(loop, state)
        (body,) = self._program.called(loop, "body")
        (condition,) = self._program.called(loop, "condition")
        in_body = tuple(self.collectives(body, [invariant]))
        in_condition = tuple(self.collectives(condition, [invariant]))
        yield from in_condition  # evaluated once more than the body
        for collective in (*in_condition, *in_body):
            if trip_count is None:
                yield dataclasses.replace(collective, dynamic=True)
            elif trip_count:
                yield dataclasses.replace(collective, count=collective.count * trip_count)

    def _leads_to_collectives(self, instruction: hlo.Instruction) -> bool:
        if instruction.opcode.endswith(("-done", "-update")):
            return False  # its start calls the same computation
        return any(self._has_collectives(called) for called in self._program.called(instruction))

    def _has_collectives(self, computation: hlo.Computation) -> bool:
        if computation.name not in self._communicates:
            self._communicates[computation.name] = any(
                _kind(instruction) or self._leads_to_collectives(instruction)
                for instruction in computation.instructions.values()
            )
        return self._communicates[computation.name]

    def _collective(
        self, kind: Kind, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> Iterator[Collective]:
        if is_continuation(computation, instruction):
            return
        if kind == "all-reduce" and self._is_reduce_scatter(computation, instruction):
            kind = "reduce-scatter"
        groups = _groups(kind, instruction, self._program.num_devices)
        size = max(map(len, groups), default=1)
        if size == 1:
            return
        operands = instruction.operands
        if kind == "ragged-all-to-all":
            operands = operands[1:2]  # the output buffer; the others are rows, offsets and sizes
        types = self._program.operand_types(computation, operands)
        yield Collective(
            kind=kind,
            axes=self._axes(groups),
            dtype="+".join(dict.fromkeys(array.numpy_name for array in types)),
            bytes=_received(kind, sum(array.num_bytes for array in types), size),
            count=1,
            source=instruction.op_name,
            overlapped=_is_overlapped(computation, instruction),
        )

    def _axes(self, groups: Iterable[Sequence[int]]) -> tuple[str, ...]:
        """Returns the mesh axes along which the members of a group differ."""
        shape = tuple(self._sizes.values())
        differ = np.zeros(len(shape), bool)
        for group in groups:
            coordinates = np.stack(np.unravel_index(np.asarray(group), shape))
            differ |= (coordinates != coordinates[:, :1]).any(axis=1)
        return tuple(axis for axis, differs in zip(self._sizes, differ, strict=True) if differs)

    def _is_reduce_scatter(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> bool:
        """Returns whether an all-reduce is fused with slicing a device's shard, as on TPUs."""
        if computation.name not in self._program.fused:
            return False
        users = list(computation.users.get(instruction.name, ()))
        for user in users:  # grows while iterating
            if user.opcode in _RESHAPING:
                users += computation.users.get(user.name, ())
        used = [user.opcode for user in users if user.opcode not in _RESHAPING]
        return bool(used) and all(opcode == "dynamic-slice" for opcode in used)


def _is_overlapped(computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
    """Returns whether work is scheduled between the start of a collective and its end."""
    if _SPREAD in instruction.attributes:
        return True
    if not instruction.opcode.endswith("-start"):
        return False
    names, computes = {instruction.name}, False
    instructions = iter(computation.instructions.values())
    for other in itertools.dropwhile(lambda one: one is not instruction, instructions):
        if names.isdisjoint(other.operands):
            computes |= other.opcode in _WORK
        elif other.opcode.endswith("-done"):
            break
        else:  # an update, on which the end waits
            names.add(other.name)
    return computes


def _kind(instruction: hlo.Instruction) -> Kind | None:
    opcode = instruction.opcode.removesuffix("-start")
    return next((kind for kind in _KINDS if kind == opcode), None)


def _received(kind: Kind, num_bytes: int, size: int) -> int:
    """Returns the bytes that one of `size` devices receives for operands of `num_bytes`."""
    match kind:
        case "all-gather":
            return num_bytes * (size - 1)
        case "all-reduce":
            return -(-num_bytes * 2 * (size - 1) // size)
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return -(-num_bytes * (size - 1) // size)
        case "collective-permute" | "collective-broadcast":
            return num_bytes


def _branch_bytes(branch: Iterable[Collective]) -> tuple[int, int]:
    """Sort key to select a branch of a conditional: bytes outside dynamic loops, then all bytes."""
    return sum(totals(branch).values()), sum(collective.total_bytes for collective in branch)


def is_continuation(computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
    """Returns whether an instruction is a later part of a split collective."""
    if _SPREAD not in instruction.attributes:
        return False
    users = computation.users.get(instruction.name, ())
    return not any(_SPREAD_START in user.attributes for user in users)


def _groups(
    kind: Kind, instruction: hlo.Instruction, num_devices: int
) -> Sequence[tuple[int, ...]]:
    """Returns the groups of communicating devices, as indices in the order of the mesh."""
    if kind == "collective-permute":
        pairs = instruction.attribute("source_target_pairs", r"\{.*?\}\}|\{\}")
        groups = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs)]
        return [pair for pair in groups if pair[0] != pair[1]]
    if not instruction.attribute("channel_id", r"\d+"):
        return ()  # it is over replicas of the program, and JAX uses a single replica
    groups = _parse_groups(instruction.attribute("replica_groups", _GROUPS))
    always_devices = kind in ("all-to-all", "ragged-all-to-all", "collective-broadcast")
    names_devices = always_devices or instruction.attribute("use_global_device_ids", "true")
    return groups if groups and names_devices else [tuple(range(num_devices))]


def _parse_groups(text: str) -> list[tuple[int, ...]]:
    """Parses `mesh['a'=2,'b'=4] {'b'}`, `[4,2]<=[2,4]T(1,0)` or `{{0,1},{2,3}}`."""
    if text.startswith("mesh"):
        return _parse_mesh_groups(text)
    if text.startswith("["):
        return [tuple(group) for group in _parse_iota(text).tolist()]
    groups = [tuple(map(int, _NUMBERS.findall(group))) for group in text.split("}")]
    return [group for group in groups if group]


def _parse_iota(text: str) -> np.ndarray:
    """Parses `[4,2]<=[2,4]T(1,0)`: iota of shape [2, 4], transposed, reshaped to [4, 2]."""
    shape, _, order = text.partition("<=")
    dimensions, _, permutation = order.partition("T")
    iota = np.arange(math.prod(_integers(dimensions))).reshape(_integers(dimensions))
    if permutation:
        iota = iota.transpose(_integers(permutation))
    return iota.reshape(_integers(shape))


def _parse_mesh_groups(text: str) -> list[tuple[int, ...]]:
    """Parses groups over mesh axes or sub-axes: `'a':(2)4` has size 4 after a factor of 2."""
    head, _, axes = text.rpartition("{")
    mesh, _, order = head.partition("device_ids=")
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", mesh)}
    along: list[tuple[str, int, int]] = []
    for name, before, size in _MESH_AXIS.findall(axes):
        along.append((name, int(before or 1), int(size or sizes[name])))
    # Split each axis into sub-axes that are each either inside or outside the groups.
    shape, inside = [], {}
    for name, size in sizes.items():
        parts = sorted((before, part) for other, before, part in along if other == name)
        done = 1
        for before, part in parts:
            shape.append(before // done)
            inside[name, before] = len(shape)
            shape.append(part)
            done = before * part
        shape.append(size // done)
    ids = (
        _parse_iota(order)
        if "<=" in order
        else np.asarray(_integers(order) or range(math.prod(shape)))
    )
    grouped = [inside[name, before] for name, before, _ in along]
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    size = math.prod(shape[axis] for axis in grouped)
    ids = ids.reshape(shape).transpose(*others, *grouped).reshape(-1, size)
    return [tuple(group) for group in ids.tolist()]


def _integers(text: str) -> list[int]:
    return [int(number) for number in _NUMBERS.findall(text)]
