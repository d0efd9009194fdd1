"""Plans for machines that are not attached: parsing, conclusions and errors."""

import importlib.util
import json
import math
import re
from typing import Any

import pytest

from configs import paper_2b5_120b_top256, tiny
from tests.extras import needs_libtpu
from umv2.config import Config, ConfigError, from_config_dict
from umv2.config.schema import UserError
from umv2.cost import accounting
from umv2.planning import ahead_of_time, plan, search, search_space, topology
from umv2.planning.hlo import workload

# A loop of five trips with a bfloat16 matrix product, as printed by three compilers.
PRODUCT = {
    "tpu": "convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf",
    "h200": "dot(%x, %w), lhs_contracting_dims={2}, rhs_contracting_dims={0}",
}
LOOP = """HloModule jit_f, num_partitions=1

%body (arg: (s32[], bf16[1,8,16])) -> (s32[], bf16[1,8,16]) {{
  %arg = (s32[], bf16[1,8,16]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[1,8,16]{{2,1,0}} get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[16,16,1]{{2,1,0:T(8,128)S(1)}} constant({{...}})
  %y = bf16[1,8,16]{{2,1,0}} {product}, backend_config={{"estimated_cycles":"70"}}
  ROOT %out = (s32[], bf16[1,8,16]) tuple(%next, %y)
}}

%condition (arg.1: (s32[], bf16[1,8,16])) -> pred[] {{
  %arg.1 = (s32[], bf16[1,8,16]) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}}

ENTRY %main (p: bf16[1,8,16]) -> bf16[1,8,16] {{
  %p = bf16[1,8,16]{{2,1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1,8,16]) tuple(%zero, %p)
  %loop = (s32[], bf16[1,8,16]) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[1,8,16]{{2,1,0}} get-tuple-element(%loop), index=1
}}
"""
# Two heads as a dilated spatial dimension: each is multiplied only with its half of the kernel.
BATCHED = """HloModule jit_g, num_partitions=1

ENTRY %main (q: f32[2,8,16], k: f32[2,16,8]) -> f32[2,8,8] {
  %q = f32[2,8,16]{2,1,0} parameter(0)
  %k = f32[2,16,8]{2,1,0} parameter(1)
  ROOT %s = f32[2,8,8]{2,1,0} convolution(%q, %k), window={size=2 stride=1 lhs_dilate=2},\
 dim_labels=0bf_0io->0bf
}
"""
SLICED = """HloModule jit_h, num_partitions=1

%fused (stack: f32[9,4,8], i: s32[]) -> f32[4,8] {
  %stack = f32[9,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero)
  ROOT %layer = f32[4,8]{1,0} bitcast(%slice)
}

ENTRY %main (stack.1: f32[9,4,8], i.1: s32[]) -> f32[4,8] {
  %stack.1 = f32[9,4,8]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %fusion = f32[4,8]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%fused
}
"""


def config(**changes: Any) -> Config:
    """Returns tiny with changes by path, with __ for a dot."""
    values = tiny.get_config()
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(values)


@pytest.mark.parametrize("compiler", PRODUCT)
def test_the_work_of_a_loop_counts_once_per_trip(compiler: str) -> None:
    work = workload.read(LOOP.format(product=PRODUCT[compiler]))
    assert work.flops == 5 * 2 * 8 * 16 * 16
    # Main memory traffic of the product, without the weights; and the counter.
    assert work.bytes == 5 * (2 * 2 * 8 * 16 + 3 * 4)
    assert work.cycles == 5 * 70


def test_batched_products_are_counted_without_dilation_gaps() -> None:
    assert workload.read(BATCHED).flops == 2 * (2 * 8 * 8 * 16)


def test_a_fusion_that_slices_reads_only_the_slice() -> None:
    work = workload.read(SLICED)
    assert work.bytes == 4 * (4 * 8 + 4 * 8) + 4
    assert work.heaviest == (("fusion", work.bytes),)
    assert work.flops == 0
    assert work.cycles is None


def test_text_that_is_not_a_program_is_rejected() -> None:
    with pytest.raises(ValueError, match="compiled program"):
        workload.read("module @jit_f {}")


@pytest.mark.parametrize(
    ("name", "devices", "peak"),
    [
        ("v5e:16x16", 256, 197e12),
        ("v5p:4x4x8", 128, 459e12),
        ("v6e:8x8", 64, 918e12),
        ("tpu7x:4x4x4", 128, 2307e12 / 2),
        ("h200:8", 8, 989.4e12),
    ],
)
def test_topologies_are_parsed_by_name(
    name: str, devices: int, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "_installed", lambda module: True)
    place = topology.parse(name)
    assert place.num_devices == devices
    assert place.chip.peak_flops == peak
    assert place.environment["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:2x2x2", "v5p:4x4", "v5e:0x2", "h200", "h200:12"])
def test_the_error_for_an_unknown_topology_has_examples(name: str) -> None:
    with pytest.raises(UserError, match=f"--topology={name}: .*examples: v5e:16x16"):
        topology.parse(name)


@pytest.mark.parametrize("name", ["v5e:2x2", "h200:8"])
def test_a_missing_compiler_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '\.\[compile\]'"):
        topology.parse(name)


def test_meshes_use_all_devices_and_divide_the_batch() -> None:
    meshes = list(search_space.meshes(config(), 8))
    assert len(meshes) == len(set(meshes)) > 20
    for candidate in meshes:
        sizes = search_space.mesh_sizes(candidate, 8)
        assert math.prod(sizes.values()) == 8
        assert 8 % (8 // sizes["tensor"]) == 0
        assert candidate.model == config().model
    assert {c.mesh.table_sharding for c in meshes} == {"auto", "columns", "rows"}
    assert {c.mesh.tensor for c in meshes} == {1, 2, 4}  # four heads


def test_arguments_are_counted_without_a_compiler() -> None:
    replicated = {"replica": 8, "fsdp": 1, "memory": 1, "tensor": 1}
    counts = accounting.parameter_counts(config().model)
    parts = ahead_of_time.argument_bytes(config(), replicated, "train")
    tables = 4 * counts.sparse_values
    assert parts["sparse"] == 3 * tables
    assert parts["dense"] == 3 * 4 * (counts.total - counts.sparse_values)
    sharded = config(mesh__memory=4, mesh__fsdp=2)
    sizes = search_space.mesh_sizes(sharded, 8)
    quarter = ahead_of_time.argument_bytes(sharded, sizes, "train")["sparse"]
    assert quarter == 3 * tables / 4
    served = ahead_of_time.argument_bytes(config(), replicated, "decode")
    assert served["sparse"] == tables


@needs_libtpu
def test_more_rematerialisation_needs_less_memory_and_more_time() -> None:
    sizes = search_space.mesh_sizes(config(), 4)
    parts = ahead_of_time.argument_bytes(config(), sizes, "train")
    place = topology.parse("v5e:2x2")
    candidates = [
        config(model__remat=remat, train__batch_size=1024) for remat in search_space.REMAT
    ]
    least = [search_space.least_temporaries(c, sizes, parts, place) for c in candidates]
    seconds = [search_space.predicted_seconds(c, sizes, place) for c in candidates]
    assert least == sorted(least, reverse=True)
    assert seconds == sorted(seconds)
    assert least[0] > least[-1]
    assert seconds[0] < seconds[-1]


def test_the_nearest_mesh_with_small_enough_arguments_is_found() -> None:
    one = config(mesh__replica=4)
    replicated = ahead_of_time.argument_bytes(one, search_space.mesh_sizes(one, 4), "train")
    limit = sum(replicated.values()) - replicated["sparse"] // 2
    nearest = search_space.smaller_arguments(one, 4, "train", limit=limit)
    assert nearest is not None
    changed, size = nearest
    assert size <= limit
    assert (changed.mesh.replica, changed.mesh.memory, changed.mesh.tensor) == (2, 2, 1)
    assert search_space.smaller_arguments(one, 4, "train", limit=1000) is None


@pytest.fixture(scope="module")
def planned() -> plan.Plan:
    """A plan of tiny on four chips, with sharded tables."""
    return plan.plan("tiny", config(mesh__memory=2, model__attention="xla"), "v5e:2x2")


@pytest.mark.slow
@needs_libtpu
def test_a_plan_reports_the_needs_of_a_step_and_that_it_fits(planned: plan.Plan) -> None:
    measured = planned.measured
    assert planned.fits
    assert measured.device_kind == planned.target.chip.device_kind
    assert measured.mesh == {"replica": 2, "fsdp": 1, "memory": 2, "tensor": 1}
    assert measured.table_sharding in ("columns", "rows")
    assert sum(measured.parts.values()) <= measured.arguments < 2 * sum(measured.parts.values())
    assert measured.needed is not None
    assert measured.arguments < measured.needed < planned.capacity
    assert measured.program is not None
    # Nothing is rematerialised, but masked positions of attention are computed, and some
    # statistics.
    assert 1 < measured.program.flops / planned.model_flops < 1.3
    over_memory = [part for part in measured.collectives if part.axes == ("memory",)]
    assert over_memory
    assert planned.bound_seconds == max(planned.seconds.values()) > 0
    assert planned.estimated_seconds is None  # code was not generated


@pytest.mark.slow
@needs_libtpu
def test_a_plan_is_printed_as_text_and_as_json(planned: plan.Plan) -> None:
    text, values = planned.as_text(), json.loads(planned.as_json())
    assert re.search(r"^verdict +fits: ", text, re.MULTILINE)
    assert "v5e:2x2: 4 x TPU v5 lite" in text
    assert "replica 2 x fsdp 1 x memory 2 x tensor 1" in " ".join(text.split())
    assert ahead_of_time.from_dict(values["measured"]) == planned.measured


@pytest.mark.slow
@needs_libtpu
def test_a_plan_that_does_not_fit_suggests_a_mesh_that_would() -> None:
    planned = plan.plan("tiny", config(model__memory__num_keys=2048, mesh__replica=4), "v5e:2x2")
    assert not planned.fits
    assert re.match(r"does not fit: \d+\.\d+ of 15\.75 GiB; [\w ]+ take \d", planned.verdict)
    assert "mesh.memory=" in planned.advice()[0]
    assert "does not fit" in planned.as_text()


@needs_libtpu
def test_a_mesh_with_too_many_devices_is_rejected() -> None:
    with pytest.raises(UserError, match=r"mesh\.memory=8.*needs 8 devices, but only 4"):
        plan.plan("tiny", config(mesh__memory=8), "v5e:2x2")


def test_a_mesh_that_does_not_divide_the_model_is_rejected_before_compiling() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.tensor"):
        config(mesh__tensor=3)


@needs_libtpu
@pytest.mark.slow
def test_a_decode_step_can_be_planned() -> None:
    planned = plan.plan("tiny", config(mesh__memory=2), "v5e:2x2", "decode")
    assert planned.fits
    assert planned.measured.parts["data"] > planned.measured.parts["dense"]  # the cache
    assert planned.model_flops < 1e9


@needs_libtpu
@pytest.mark.slow
def test_a_search_ranks_plans_that_fit() -> None:
    result = search.search("tiny", config(), "v5e:2x2", limit=2)
    assert len(result.plans) == 2 < result.num_candidates
    bounds = [each.bound_seconds for each in result.plans if each.bound_seconds is not None]
    assert bounds == sorted(bounds)
    assert "\n--config.mesh.replica=" in result.as_text()


@needs_libtpu
@pytest.mark.slow
def test_120_billion_parameters_fit_128_chips() -> None:
    values = paper_2b5_120b_top256.get_config()
    values.mesh.memory = 128
    values.mesh.parameters = "fsdp_and_memory"
    values.mesh.table_sharding = "rows"
    values.train.gradient_accumulation = 8
    planned = plan.plan("120b", from_config_dict(values), "v5p:4x4x8", timeout_seconds=600.0)
    assert planned.fits, planned.verdict
