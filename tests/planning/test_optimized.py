"""Programs that compilers dump before they generate code."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from tests.extras import needs_libtpu
from umv2.config import from_config_dict
from umv2.planning import ahead_of_time, hlo, optimized, topology


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + varint(rest)


def number(field: int, value: int) -> bytes:
    return varint(8 * field) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(8 * field + 2) + varint(len(content)) + content


def dump() -> bytes:
    """A dump of a small program, with hand-written buffers."""
    executable: Any = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))).compile()
    (module,) = executable.runtime_executable().hlo_modules()
    allocations = (
        number(2, 1000) + number(5, 1),  # an argument
        number(2, 300) + number(5, 1) + number(7, 1),  # a donated argument
        number(2, 7) + number(7, 1),  # an output
        number(2, 2**33),  # temporaries
        number(2, 50) + number(8, 1),  # in another memory space
    )
    assignment = b"".join(message(3, allocation) for allocation in allocations)
    return message(1, module.as_serialized_hlo_module_proto()) + message(3, assignment)


def test_a_dump_is_read_with_the_memory_of_its_buffers() -> None:
    program = optimized._read(dump(), num_devices=6)
    assert program is not None
    assert hlo.parse(program.text).num_devices == 6
    memory = program.memory
    assert (memory.arguments, memory.outputs, memory.aliased) == (1300, 307, 300)
    assert memory.temporaries == 2**33
    assert memory.total == 1300 + 7 + 2**33


def test_a_dump_that_is_still_being_written_is_not_read() -> None:
    whole = dump()
    for length in (*range(40), *range(40, len(whole), 97), *range(len(whole) - 40, len(whole))):
        assert optimized._read(whole[:length], num_devices=1) is None


@pytest.mark.slow
@needs_libtpu  # the extra that installs it has the compiler for GPUs too
@pytest.mark.parametrize("place", ["v5e:2x2", "h200:8"])
def test_a_plan_without_code_has_the_figures_of_one_with_code(place: str) -> None:
    values = tiny.get_config()
    values.model.num_layers = 2
    values.mesh.memory = 2
    config, target = from_config_dict(values), topology.parse(place)
    without, complete = (
        ahead_of_time.measure(config, target, "train", code=code) for code in (False, True)
    )
    assert without.program is not None
    assert complete.program is not None
    if target.chip.platform == "tpu":  # which shows that one compiled to the end
        assert without.program.cycles is None
        assert complete.program.cycles is not None

    def figures(measured: ahead_of_time.Measurement) -> dict[str, Any]:
        assert measured.program is not None
        program = dataclasses.replace(measured.program, cycles=None)
        same = dataclasses.replace(measured, program=program, seconds=0.0, process_bytes=0)
        return dataclasses.asdict(same)

    assert figures(without) == figures(complete)
