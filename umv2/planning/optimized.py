"""Programs that a compiler has optimised, before it generates code for them.

Planning needs no code, yet libtpu spends most of its time on it: 370 of 388 s for the 227M model on
16 chips of a v5e. JAX has no call that stops earlier. But XLA can dump each program, with the
memory assigned to its buffers, before it generates code. So `compile_until_optimized` compiles in a
thread and returns as soon as the dump is there; the process must then end without the thread.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from umv2.planning.program import Memory

_POLL_SECONDS = 0.1

# Fields of XLA's protocol buffers: hlo.proto in openxla/xla.
_HLO_MODULE, _BUFFER_ASSIGNMENT = 1, 3  # HloProto
_ALLOCATION = 3  # BufferAssignmentProto
_SIZE, _PARAMETER, _LIVE_OUT, _COLOR = 2, 5, 7, 8  # BufferAllocationProto
_MAIN_MEMORY = 0  # colours are memory spaces, such as a TPU core's VMEM


@dataclasses.dataclass(frozen=True)
class Optimized:
    """A program after all optimisations, scheduled and with its buffers assigned.

    Attributes:
      text: as of `jax.stages.Compiled.as_text`, but TPU compilers add estimates of cycles later.
      memory: of one device. Unlike `Compiled.memory_analysis`, whose temporaries on TPUs exceed the
        memory that the compiler checks, by up to 40 %, its sum is what must fit.
    """

    text: str
    memory: Memory


def dump_flags(folder: Path) -> str:
    """Returns the XLA_FLAGS with which `compile_until_optimized` finds programs in `folder`."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_proto"


def compile_until_optimized(
    lowered: jax.stages.Lowered, folder: Path, num_devices: int
) -> tuple[Optimized | None, concurrent.futures.Future[jax.stages.Compiled]]:
    """Starts to compile a program for TPU or GPU; returns when it is optimised, or this failed.

    Args:
      lowered: the program.
      folder: to which `dump_flags` make XLA dump programs. No other one may have the same name.
      num_devices: devices of the program.

    Returns:
      The optimised program, or None if the compilation ended without one; and its compilation,
      which may still be running.
    """
    module: Any = lowered.compiler_ir()
    name = module.operation.attributes["sym_name"].value
    compilation = concurrent.futures.ThreadPoolExecutor(max_workers=1).submit(lowered.compile)
    while True:
        done = bool(concurrent.futures.wait([compilation], timeout=_POLL_SECONDS).done)
        paths = [
            path
            for path in folder.glob(f"*.{name}.*after_optimizations.hlo.pb")
            if not path.name.endswith(".cpu_after_optimizations.hlo.pb")
        ]
        program = _read(paths[0].read_bytes(), num_devices) if paths else None
        if program is not None or done:
            return program, compilation


def _read(dump: bytes, num_devices: int) -> Optimized | None:
    """Reads a dumped program; None if the dump is not complete."""
    try:
        fields = dict(_fields(dump))
        module, assignment = fields[_HLO_MODULE], fields[_BUFFER_ASSIGNMENT]
    except (EOFError, KeyError):
        return None
    header, _, rest = (
        _module_class().from_serialized_hlo_module_proto(module).to_string().partition("\n")
    )
    text = f"{header}, num_partitions={num_devices}\n{rest}"  # which the dump omits
    allocations = [dict(_fields(value)) for key, value in _fields(assignment) if key == _ALLOCATION]
    return Optimized(text, _memory(allocations))


def _memory(allocations: list[dict[int, Any]]) -> Memory:
    total = arguments = outputs = aliased = 0
    for allocation in allocations:
        if allocation.get(_COLOR, _MAIN_MEMORY) == _MAIN_MEMORY:
            size, argument = allocation.get(_SIZE, 0), allocation.get(_PARAMETER, 0)
            output = allocation.get(_LIVE_OUT, 0)
            total += size
            arguments += size * argument
            outputs += size * output
            aliased += size * argument * output
    temporaries = total - arguments - (outputs - aliased)
    return Memory(arguments, outputs, aliased, temporaries, code=0, peak=None)


def _module_class() -> Any:
    """Returns the class of HLO modules, which has no public name."""
    executable: Any = jax.jit(lambda: 0).lower().compile().runtime_executable()
    (module,) = executable.hlo_modules()
    return type(module)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields numbers and values of a protocol buffer's fields.

    Raises:
      EOFError: the message ends within a field.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        match key % 8:
            case 0:
                value, position = _varint(message, position)
                yield key // 8, value
                continue
            case 2:
                size, position = _varint(message, position)
            case wire_type:
                size = {1: 8, 5: 4}[wire_type]
        if position + size > len(message):
            raise EOFError
        yield key // 8, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns an integer of seven bits per byte, least significant first, and where it ends."""
    value = shift = 0
    while True:
        if position >= len(message):
            raise EOFError
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
