"""Collectives and trip counts read from programs of the CPU, TPU and H200 compilers.

The texts in hlo/ were printed by libtpu 0.0.51 and the CUDA 13 compiler of jax 0.12.0.1 for
`layers` and for loops like those of `every_kind`, then reduced to the instructions that lead to a
collective: a computation whose operands were removed is written as a custom call.
"""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.kernels_pallas import aot
from tests.planning import collective_programs
from tests.planning.collective_programs import (
    AXES,
    DATA_AXES,
    HIDDEN,
    INNER,
    LAYERS,
    argument,
    compiled,
    make_mesh,
)
from umv2.planning.hlo import collectives
from umv2.planning.program import estimate, memory

HLO = Path(__file__).parent / "hlo"
SIZES = {"replica": 2, "fsdp": 2, "memory": 2, "tensor": 1}
SIZES_OF_FOUR = SIZES | {"replica": 1}

SOME_AXES = [
    axes for number in (1, 2, 3) for axes in itertools.combinations(AXES, number) if axes != AXES
]


def stored(name: str) -> str:
    return (HLO / f"{name}.txt").read_text()


def text_of_program(program: jax.stages.Compiled) -> str:
    text = program.as_text()
    assert text is not None
    return text


def mapped(mesh: Any, function: Callable[[jax.Array], Any], shape: tuple[int, ...]) -> str:
    """Returns the compiled text of a function mapped over the shards of an array."""
    spec = PartitionSpec(AXES)
    program = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = argument(mesh, (shape[0] * mesh.size, *shape[1:]), jnp.float32, AXES)
    return text_of_program(compiled(mesh, program, x))


@pytest.mark.parametrize("axes", SOME_AXES, ids="-".join)
def test_every_kind_along_every_axis_once_and_in_loops(axes: tuple[str, ...]) -> None:
    shape = (1, 2, 2, 2) if "tensor" in axes else (2, 2, 2, 1)
    if "replica" in axes and "tensor" in axes:
        shape = (2, 1, 2, 2) if "fsdp" not in axes else (2, 2, 1, 2)
    mesh = make_mesh(shape)
    program, expected = collective_programs.every_kind(mesh, axes)
    named = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    expected = {(kind, named): num_bytes for (kind, _), num_bytes in expected.items()}
    text = text_of_program(program)
    received = collectives.read(text, mesh)
    assert collectives.totals(received) == expected
    assert all(collective.dtype == "float32" for collective in received)
    # The same without the trip counts noted by the compiler: on TPUs it notes none.
    text, replaced = re.subn(r'"known_trip_count":\{[^}]*\}', '"x":{}', text)
    assert replaced
    assert collectives.read(text, mesh) == received


def test_a_training_step_gathers_weights_twice_and_reduces_gradients() -> None:
    mesh = make_mesh((2, 2, 2, 1))
    received = collectives.read(collective_programs.layers(mesh, jnp.float32).as_text(), mesh)
    weights = LAYERS * 2 * HIDDEN * INNER * 4
    loss = 7  # 2 * 7/8 of 4 bytes
    assert collectives.totals(received) == {
        ("all-gather", ("fsdp", "memory")): 2 * weights * 3 // 4,
        # The CPU compiler all-reduces gradients, and slices each device's part from them.
        ("all-reduce", DATA_AXES): 2 * weights * 7 // 8 + loss,
    }


@pytest.mark.parametrize(
    ("start", "stop", "step", "rounds"),
    [(0, 7, 1, 7), (10, 0, -3, 4), (3, 3, 1, 0), (0, 99, 7, 15)],
)
def test_trip_counts_are_read_from_the_loop_condition(
    start: int, stop: int, step: int, rounds: int
) -> None:
    mesh = make_mesh((1, 2, 2, 2))

    def program(x: jax.Array) -> jax.Array:
        def condition(state: Any) -> Any:
            return state[0] < stop if step > 0 else state[0] > stop

        def body(state: Any) -> Any:
            return state[0] + step, jnp.sin(jax.lax.psum(state[1], "memory"))

        return jax.lax.while_loop(condition, body, (jnp.int32(start), x))[1]

    text = re.sub(r'"known_trip_count":\{[^}]*\}', '"x":{}', mapped(mesh, program, (8, 8)))
    expected = {("all-reduce", ("memory",)): rounds * 256} if rounds else {}
    assert collectives.totals(collectives.read(text, mesh)) == expected


def test_data_dependent_loops_are_marked_and_not_in_the_totals() -> None:
    mesh = make_mesh((1, 2, 2, 2))

    def program(x: jax.Array) -> jax.Array:
        def condition(x: jax.Array) -> jax.Array:
            return jax.lax.pmax(jnp.max(x), "fsdp") < 100.0

        def body(x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, _: (jax.lax.psum(x, "memory"), None), x, length=3)[0]

        return jax.lax.while_loop(condition, body, jax.lax.all_gather(x, "tensor", tiled=True))[:8]

    received = collectives.read(mapped(mesh, program, (8, 8)), mesh)
    once, dynamic = ([c for c in received if c.dynamic == marked] for marked in (False, True))
    # The condition is evaluated at least once.
    assert [(c.kind, c.axes, c.count) for c in once] == [
        ("all-gather", ("tensor",), 1),
        ("all-reduce", ("fsdp",), 1),
    ]
    assert {(c.axes, c.count) for c in dynamic} == {(("fsdp",), 1), (("memory",), 3)}
    assert set(collectives.totals(received)) == {
        ("all-gather", ("tensor",)),
        ("all-reduce", ("fsdp",)),
    }
    table = collectives.as_text(received)
    assert table.index("total") < table.index("depend on data") < table.index("(memory)")


def test_the_larger_branch_of_a_conditional_counts() -> None:
    mesh = make_mesh((1, 2, 2, 2))

    def program(x: jax.Array) -> jax.Array:
        large = jax.lax.pmax(jnp.max(x), AXES) > 3.0
        return jax.lax.cond(
            large,
            lambda x: jax.lax.psum(jnp.sin(jax.lax.psum(x, "fsdp")), "fsdp"),
            lambda x: jax.lax.ppermute(x, "memory", [(0, 1), (1, 0)]),
            x,
        )

    totals = collectives.totals(collectives.read(mapped(mesh, program, (8, 8)), mesh))
    assert totals == {("all-reduce", ("fsdp",)): 512, ("all-reduce", AXES[1:]): 7}


def test_a_tpu_collective_spread_over_fusions_counts_once() -> None:
    text = stored("v5e_async")
    # One all-gather spans four fusions: started, continued twice, done.
    assert len(re.findall(r" all-gather\(.*channel_id=3,", text)) == 4
    weights = LAYERS * 2 * HIDDEN * INNER * 2  # bfloat16
    assert collectives.totals(collectives.read(text, SIZES)) == {
        ("all-gather", ("fsdp", "memory")): 2 * weights * 3 // 4,
        ("all-reduce", DATA_AXES): 2 * weights * 7 // 8 + 7,
    }


def test_an_all_reduce_that_a_tpu_fuses_with_a_slice_is_a_reduce_scatter() -> None:
    received = collectives.read(stored("v5p_layers"), SIZES_OF_FOUR)
    layers, hidden, padded, inner = 4, 2048, 2112, 8192
    both = ("fsdp", "memory")
    assert collectives.totals(received) == {
        ("all-gather", both): 2 * layers * 2 * hidden * inner * 2 * 3 // 4,
        # Rows of one of the two are padded to a multiple of 16 per device; a collective-permute
        # then moves the rows that are on the wrong side of a boundary.
        ("reduce-scatter", both): layers * (hidden + padded) * inner * 2 * 3 // 4,
        ("collective-permute", both): layers * 48 * inner * 2,
        ("all-reduce", both): 6,
    }


@pytest.mark.parametrize(
    ("name", "sizes"), [("v5p_sparsecore", SIZES_OF_FOUR), ("h200_loops", SIZES)]
)
def test_loops_and_calls_of_other_compilers(name: str, sizes: dict[str, int]) -> None:
    received = collectives.read(stored(name), sizes)
    block = 256 * 128 * 2
    data_axes = tuple(axis for axis in DATA_AXES if sizes[axis] > 1)
    expected = {
        ("all-to-all", ("memory",)): 15 * block // 2,
        ("collective-permute", ("memory",)): 16 * block,  # one of them is in a branch
        ("all-gather", ("fsdp", "memory")): 5 * block * 3,
        ("reduce-scatter", ("fsdp", "memory")): 5 * block * 3,
        ("all-reduce", data_axes): 7 if sizes["replica"] == 2 else 6,
    }
    if sizes["replica"] == 2:
        expected["all-reduce", ("replica",)] = block
    assert collectives.totals(received) == expected
    assert [(c.kind, c.axes) for c in received if c.dynamic] == [("collective-permute", ("fsdp",))]
    assert any("ppermute" in collective.source for collective in received)


def text_of(instruction: str, num_devices: int = 8) -> str:
    return (
        f"HloModule m, is_scheduled=true, num_partitions={num_devices}\n\n"
        "ENTRY %main (p: f32[16,4], q: bf16[32,4]) -> f32[16,4] {\n"
        "  %p = f32[16,4]{1,0:T(8,128)} parameter(0)\n"
        "  %q = bf16[32,4]{1,0:T(8,128)(2,1)S(1)} parameter(1)\n"
        f"  ROOT %r = {instruction}\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("memory",), 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("replica",), 2),
        ("{{0,1,2,3,4,5,6,7}}", DATA_AXES, 8),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("fsdp", "memory"), 2),
        ("{}", DATA_AXES, 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", None, 1),
        ("[4,2]<=[8]", ("memory",), 2),
        ("[4,2]<=[2,4]T(1,0)", ("replica",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("replica", "memory"), 4),
        ("[1,8]<=[8]", DATA_AXES, 8),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "memory"), 4),
        ("mesh['a'=2,'b'=4] {'a'}", ("replica",), 2),
        ("mesh['b'=8] {'b':(2)2}", ("fsdp",), 2),
        ("mesh['b'=8] {'b':(1)2,'b':(4)2}", ("replica", "memory"), 4),
        ("mesh[a=2,b=4] {a,b}", DATA_AXES, 8),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]<=[2,4]T(1,0)) {'a'}", ("fsdp",), 2),
        ("mesh['a'=4,'b'=2], device_ids=({{0,4},{1,5},{2,6},{3,7}}) {'b'}", ("replica",), 2),
    ],
)
def test_groups_in_every_form(groups: str, axes: tuple[str, ...] | None, size: int) -> None:
    instruction = (
        f"f32[16,4]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups},"
        " use_global_device_ids=true, to_apply=%add"
    )
    received = collectives.read(text_of(instruction), SIZES)
    expected = [] if axes is None else [(axes, 2 * 256 * (size - 1) // size)]
    assert [(collective.axes, collective.bytes) for collective in received] == expected


_GROUPS = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"
_PAIRS = "channel_id=1, source_target_pairs"


@pytest.mark.parametrize(
    ("instruction", "kind", "dtype", "num_bytes"),
    [
        # Without use_global_device_ids, groups consist of replicas, each with all devices.
        ("all-reduce(%p), channel_id=1, replica_groups={{0}}", "all-reduce", "float32", 448),
        ("all-reduce(%p), replica_groups={}", None, "", 0),  # over the only replica
        (f"all-to-all(%p), {_GROUPS}", "all-to-all", "float32", 128),
        (f"all-gather-start(%p, %q), {_GROUPS}, use_global_device_ids=true", "all-gather",
         "float32+bfloat16", 512),
        (f"all-gather-done(%p), {_GROUPS}, use_global_device_ids=true", None, "", 0),
        (f"ragged-all-to-all(%p, %q, %p, %p, %p, %p), {_GROUPS}", "ragged-all-to-all",
         "bfloat16", 128),
        (f"collective-broadcast(%p), {_GROUPS}", "collective-broadcast", "float32", 256),
        (f"collective-permute(%q), {_PAIRS}={{{{0,1}},{{3,3}}}}", "collective-permute",
         "bfloat16", 256),
        (f"collective-permute(%q), {_PAIRS}={{{{3,3}}}}", None, "", 0),
    ],
)  # fmt: skip
def test_each_kind_of_instruction(
    instruction: str, kind: str | None, dtype: str, num_bytes: int
) -> None:
    received = collectives.read(text_of(f"(f32[16,4]{{1,0}}, u32[]) {instruction}"), SIZES)
    expected = [(kind, dtype, num_bytes)] if kind else []
    assert [(c.kind, c.dtype, c.bytes) for c in received] == expected


def test_the_mesh_must_match_the_program() -> None:
    text = text_of("f32[16,4]{1,0} copy(%p)")
    assert collectives.read(text, SIZES) == ()
    with pytest.raises(ValueError, match=r"compiled for 8 devices, the mesh .* has 4"):
        collectives.read(text, SIZES_OF_FOUR)
    with pytest.raises(ValueError, match="not that of a compiled program"):
        collectives.read("module @jit_f {\n}\n", SIZES)
    with pytest.raises(ValueError, match="not that of a compiled program"):
        collectives.read(None, SIZES)


def test_the_table_is_aligned_and_sorted_by_bytes() -> None:
    rows = [
        collectives.Collective("all-gather", ("fsdp",), "bfloat16", 1_000_000, 3),
        collectives.Collective("all-reduce", ("replica", "fsdp"), "float32", 10_000_000, 1),
        collectives.Collective("all-gather", ("fsdp",), "bfloat16", 2_000_000, 1),
    ]
    assert collectives.as_text(rows) == (
        "received by one device                executions  MB each      MB\n"
        "  all-reduce (replica, fsdp) float32           1   10.000  10.000\n"
        "  all-gather (fsdp) bfloat16                   4    1.250   5.000\n"
        "  total                                                    15.000"
    )


def test_memory_and_estimate_of_a_program() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda w, _: (jnp.tanh(w @ x), None), w, length=10)[0]

    w = jnp.zeros((64, 64))
    program = jax.jit(step, donate_argnums=0).lower(w, w).compile()
    stats = memory(program)
    assert stats is not None
    assert (stats.arguments, stats.outputs, stats.aliased) == (2 * 16384, 16384, 16384)
    assert stats.total == 2 * 16384 + stats.temporaries + stats.code
    work = estimate(program)
    # A loop body counts once: 10 trips are not 10 times the work.
    assert work.flops == pytest.approx(2 * 64**3, rel=0.05)
    assert work.seconds is None


@pytest.mark.slow
def test_a_program_for_a_tpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[compile]'")
    script = Path(__file__).with_name("collectives_compile.py")
    command = [sys.executable, str(script), "v5e:2x4", json.dumps([*SIZES.values()])]
    with aot.environment("tpu") as variables:
        process = subprocess.run(
            command, capture_output=True, text=True, env=variables, check=False
        )
    assert process.returncode == 0, process.stderr[-4000:]
    answer = json.loads(process.stdout)
    weights = LAYERS * 2 * HIDDEN * INNER
    totals = collectives.totals(collectives.read(answer["text"], SIZES))
    assert totals["all-gather", ("fsdp", "memory")] == 2 * weights * 2 * 3 // 4
    # Gradients are all-reduced or reduce-scattered: at least the shard that each device keeps.
    reduced = sum(b for (kind, _), b in totals.items() if kind in ("all-reduce", "reduce-scatter"))
    assert weights * 2 * 3 // 4 <= reduced <= 2 * weights * 2 * 7 // 8 + 7
    assert answer["memory"]["arguments"] >= weights * 4 // 4
    assert answer["memory"]["code"] > 0
    assert answer["estimate"]["flops"] > 0
