"""Sources of instructions: paths by hand, programs by hand, and the scopes that the model sets."""

import dataclasses
import json
import re
from typing import Any

import jax
import pytest

from configs import tiny
from umv2 import sharding
from umv2.config import Config, from_config_dict
from umv2.cost import exchange
from umv2.planning import ahead_of_time
from umv2.planning.hlo import breakdown, sources, workload

_STEP = "jit(train_step)/accumulation/while/body/"
_BACKWARD = f"{_STEP}transpose(jvp(layers))/while/body/checkpoint/"


@pytest.mark.parametrize(
    ("path", "name", "phase"),
    [
        (f"{_STEP}jvp(layers)/while/body/attention_block/dot_general",
         "QKV, output, norms, RoPE", "forward"),
        (f"{_STEP}jvp(layers)/while/body/attention_block/shard_map/attention/vmap()/exp",
         "attention", "forward"),
        (f"{_BACKWARD}rematted_computation/memory/product_keys/sort", "product keys", "remat"),
        (f"{_BACKWARD}memory/shard_map/exchange/value_aggregation/gather",
         "value gather", "backward"),
        (f"{_BACKWARD}memory/value_aggregation/table_gradient/scatter-add",
         "table gradient", "backward"),
        (f"{_STEP}transpose(jvp(head))/btd,vd->btv/dot_general", "head and loss", "backward"),
        (f"{_STEP}jvp(layers)/while/body/dynamic_slice", "slices of the layer stack", "forward"),
        (f"{_STEP}add", "accumulation, copies of tables", ""),
        ("jit(train_step)/optimizer/mul", "optimizer", ""),
    ],
)  # fmt: skip
def test_the_innermost_scope_of_a_path_counts(path: str, name: str, phase: str) -> None:
    assert sources.source(path) == (name, phase)


@pytest.mark.parametrize("path", ["", "jit(train_step)/add", "jit(headless)/attention_mask/mul"])
def test_paths_without_a_scope_have_no_source(path: str) -> None:
    assert sources.source(path) is None


PROGRAM = """HloModule m

%fused () -> () {
  %p = f32[10]{0} parameter(0)
  %a = f32[10]{0} exponential(%p), metadata={op_name="jit(f)/jvp(experts)/exp"}
  %b = f32[10]{0} negate(%a), metadata={op_name="jit(f)/jvp(experts)/neg"}
  ROOT %c = f32[10]{0} multiply(%b, %b), metadata={op_name="jit(f)/jvp(feed_forward)/mul"}
}

%body () -> () {
  %s = (s32[], f32[20]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[20]{0} get-tuple-element(%s), index=1
  %copied = f32[20]{0} copy(%x)
  ROOT %t = (s32[], f32[20]{0}) tuple(%i, %copied)
}

%condition () -> () {
  %s.1 = (s32[], f32[20]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main () -> () {
  %one = f32[10]{0} constant({...}), metadata={op_name="jit(f)/jvp(head)/constant"}
  %input = f32[10]{0} parameter(0)
  %before = f32[10]{0} copy(%input)
  %fusion = f32[10]{0} fusion(%before), kind=kLoop, calls=%fused
  %after = f32[40]{0} pad(%fusion, %one)
  %apart = f32[30]{0} broadcast(%one)
  %start = (s32[], f32[20]{0}) tuple(%input, %input)
  ROOT %loop = (s32[], f32[20]{0}) while(%start), condition=%condition, body=%body,\
 backend_config={"known_trip_count":{"n":"3"}},\
 metadata={op_name="jit(f)/transpose(jvp(layers))/while"}
}
"""


def test_instructions_without_metadata_take_the_source_of_what_they_touch() -> None:
    work = {source.source: source.bytes for source in workload.read(PROGRAM).sources}
    assert work == {
        # The fusion by most of its instructions, and the copies before and after it.
        "experts": {"forward": 4 * (2 * 10 + 2 * 10 + (10 + 10 + 40))},
        "slices of the layer stack": {"backward": 4 * 3 * 2 * 20},
        "other": {"": 4 * (10 + 30)},  # a constant has many users, which its scope does not tell
    }


def test_a_fusion_of_a_kernel_and_its_slices_is_of_the_source_of_the_kernel() -> None:
    text = """HloModule m

%fused () -> () {
  %p = f32[4,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,10]{1,0} custom-call(%i), custom_call_target="mosaic_gpu_v2",\
 metadata={op_name="transpose(jvp(memory))/table_gradient/mpmd_map"}
  ROOT %d = f32[4,10]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

ENTRY %main () -> () {
  %stack = f32[4,10]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %f = f32[4,10]{1,0} fusion(%stack, %i.1), kind=kCustom, calls=%fused,\
 metadata={op_name="transpose(jvp(layers))/while/body/dynamic_update_slice"}
}
"""
    (work,) = workload.read(text).sources
    assert (work.source, work.bytes) == ("table gradient", {"backward": 4 * 10 + 4})


def test_the_breakdown_adds_up() -> None:
    work = workload.read(PROGRAM)
    assert sum(source.total_bytes for source in work.sources) == work.bytes
    lines = breakdown.as_text(work, 100).splitlines()
    assert re.split(r" {2,}", lines[0]) == [
        "MB of HBM", "forward", "remat", "backward", "sum", "share", "FLOPs"
    ]  # fmt: skip
    assert len(lines) == 1 + len(work.sources) + 1
    assert lines[-1].startswith("total")
    assert "100.0%" in lines[-1]


def test_stored_measurements_are_read_back() -> None:
    measured = ahead_of_time.Measurement(
        mesh={"memory": 1},
        table_sharding="rows",
        device_kind="TPU v5 lite",
        arguments=1,
        parts={"dense": 1},
        needed=2,
        available=None,
        refusal=None,
        program=workload.read(PROGRAM),
        collectives=(ahead_of_time.CollectiveTotal("all-gather", ("memory",), 5, "f", 3),),
        seconds=1.0,
        process_bytes=6,
        faults={"scores": 1},
    )
    values = json.loads(json.dumps(dataclasses.asdict(measured)))
    assert ahead_of_time.from_dict(values) == measured
    # As stored before sources, padding, overlap and faults were measured.
    del values["faults"], values["collectives"][0]["overlapped"]
    del values["program"]["sources"], values["program"]["unpadded_bytes"]
    earlier = ahead_of_time.from_dict(values)
    assert measured.program is not None
    assert earlier.program == dataclasses.replace(measured.program, sources=(), unpadded_bytes=None)
    assert (earlier.faults, earlier.collectives[0].overlapped) == ({}, 0)


def config(**changes: Any) -> Config:
    values = tiny.get_config(changes.pop("family", "ultramem_v2"))
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(values)


def lowered(configured: Config) -> jax.stages.Lowered:
    """Lowers a training step for CPU devices."""
    train = configured.train
    batch_size = train.batch_size // train.gradient_accumulation
    mesh = sharding.create_mesh(configured.mesh, batch_size, devices=jax.devices()[:2])
    num_tokens = batch_size * configured.data.sequence_length
    resolved = exchange.resolve_mesh(configured, mesh.shape, num_tokens, capacity=None)
    return ahead_of_time.lower(resolved, mesh, "train")


SHARDED = {
    "mesh__memory": 2,
    "mesh__table_sharding": "rows",
    "train__gradient_accumulation": 2,
    "train__batch_size": 4,
    "model__remat": "full",
}


@pytest.mark.slow
def test_the_model_sets_every_scope() -> None:
    text = lowered(config(**SHARDED, model__ffn="moe")).as_text(debug_info=True)
    paths = re.findall(r'loc\("([^"]*)"', text)
    assert {scope for path in paths for scope in sources.scopes(path)} == set(sources.SCOPES)


@pytest.mark.slow
def test_nearly_everything_of_a_step_has_a_source() -> None:
    text = lowered(config(**SHARDED)).compile().as_text()
    assert text is not None
    work = workload.read(text)
    by_name = {source.source: source for source in work.sources}
    assert by_name["other"].total_bytes < 0.02 * work.bytes
    assert set(sources.SCOPES.values()) - {"experts"} <= set(by_name)
    for name in ("attention", "FFN", "product keys", "value gather"):
        assert all(by_name[name].bytes[phase] for phase in ("forward", "remat", "backward")), name
    assert set(by_name["optimizer"].bytes) == {""}
