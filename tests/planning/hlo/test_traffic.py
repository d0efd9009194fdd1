"""Bytes of instructions, by hand, for programs as compilers print them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernels_pallas import aot
from tests.planning.hlo import hand_counted
from umv2.planning.hlo import array_types, collectives, workload

ROW = 128 * 4  # bytes of a row of the tables below


def program(entry: str, called: str = "") -> str:
    """Returns the text of a program with these instructions."""
    called = "\n".join(line if line.endswith("{") else f"  {line}" for line in _lines(called))
    called = called.replace("\n  }", "\n}")
    body = "\n".join(f"  {line}" for line in _lines(entry))
    return f"HloModule m\n\n{called}\n\nENTRY %main () -> () {{\n{body}\n}}\n"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def padded_and_unpadded(text: str) -> tuple[float, float | None]:
    work = workload.read(text)
    return work.bytes, work.unpadded_bytes


# The scatter stands in a fusion within the fusion, as TPU compilers nest them; so do its updates.
NESTED_SCATTER = """
%combine () -> () {
%old = f32[] parameter(0)
%new = f32[] parameter(1)
ROOT %sum = f32[] COMBINE
}

%inner () -> () {
%target = f32[1000,128]{1,0} parameter(0)
%ids = s32[8]{0} parameter(1)
%rows = f32[8,128]{1,0} parameter(2)
ROOT %scatter = f32[1000,128]{1,0} scatter(%target, %ids, %rows), to_apply=%combine
}

%view () -> () {
%taken = f32[8,128]{1,0} parameter(0)
ROOT %same = f32[8,128]{1,0} bitcast(%taken)
}

%outer () -> () {
%p.0 = f32[1000,128]{1,0} parameter(0)
%p.1 = s32[8]{0} parameter(1)
%p.2 = f32[8,128]{1,0} parameter(2)
%viewed = f32[8,128]{1,0} fusion(%p.2), kind=kLoop, calls=%view
ROOT %nested = f32[1000,128]{1,0} fusion(TARGET, %p.1, %viewed), kind=kCustom, calls=%inner
}
"""


def nested_scatter(combine: str, target: str = "%p.0", zeros: str = "") -> str:
    called = NESTED_SCATTER.replace("COMBINE", combine).replace("TARGET", target)
    called = called.replace("%viewed =", f"{zeros}\n%viewed =")
    return program(
        """
        %table = f32[1000,128]{1,0} parameter(0)
        %ids = s32[8]{0} parameter(1)
        %rows = f32[8,128]{1,0} parameter(2)
        ROOT %f = f32[1000,128]{1,0} fusion(%table, %ids, %rows), kind=kCustom, calls=%outer
        """,
        called,
    )


def test_a_nested_scatter_moves_its_updates_and_the_rows_that_it_adds_to() -> None:
    # Reads ids, updates and rows, and writes rows.
    expected = 8 * 4 + 8 * ROW + 8 * ROW + 8 * ROW
    assert workload.read(nested_scatter("add(%old, %new)")).bytes == expected


def test_a_scatter_that_overwrites_does_not_read_the_rows() -> None:
    only_new = nested_scatter("add(%old, %new)").replace("ROOT %sum = f32[] add(%old, %new)", "")
    only_new = only_new.replace("%new = f32[]", "ROOT %new = f32[]")
    assert workload.read(only_new).bytes == 8 * 4 + 8 * ROW + 8 * ROW


def test_a_scatter_into_zeros_writes_the_whole_table() -> None:
    zeros = "%zero = f32[] constant(0)\n%zeros = f32[1000,128]{1,0} broadcast(%zero), dimensions={}"
    text = nested_scatter("add(%old, %new)", "%zeros", zeros)
    assert workload.read(text).bytes == 8 * 4 + 8 * ROW + 1000 * ROW


def test_a_scatter_outside_of_fusions_counts_the_same() -> None:
    text = program(
        """
        %table = f32[1000,128]{1,0} parameter(0)
        %ids = s32[8]{0} parameter(1)
        %rows = f32[8,128]{1,0} parameter(2)
        ROOT %s = f32[1000,128]{1,0} scatter(%table, %ids, %rows), to_apply=%combine
        """,
        """
        %combine () -> () {
        %old = f32[] parameter(0)
        %new = f32[] parameter(1)
        ROOT %sum = f32[] add(%old, %new)
        }
        """,
    )
    assert workload.read(text).bytes == 8 * 4 + 3 * 8 * ROW


def test_views_in_nested_fusions_are_read() -> None:
    text = program(
        """
        %x = bf16[64,32]{1,0} parameter(0)
        %w = bf16[32,16]{1,0} parameter(1)
        ROOT %f = bf16[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%outer
        """,
        """
        %views () -> () {
        %a = bf16[64,32]{1,0} parameter(0)
        %b = bf16[32,16]{1,0} parameter(1)
        %c = bf16[64,32]{1,0} bitcast(%a)
        ROOT %both = (bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%c, %b)
        }

        %outer () -> () {
        %p = bf16[64,32]{1,0} parameter(0)
        %q = bf16[32,16]{1,0} parameter(1)
        %both = (bf16[64,32]{1,0}, bf16[32,16]{1,0}) fusion(%p, %q), kind=kLoop, calls=%views
        %left = bf16[64,32]{1,0} get-tuple-element(%both), index=0
        %right = bf16[32,16]{1,0} get-tuple-element(%both), index=1
        ROOT %y = bf16[64,16]{1,0} convolution(%left, %right), dim_labels=bf_io->bf
        }
        """,
    )
    work = workload.read(text)
    assert work.flops == 2 * 64 * 32 * 16
    assert work.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)


def test_a_fused_conversion_reads_its_operand() -> None:
    text = program(
        """
        %x = f32[64,32]{1,0} parameter(0)
        ROOT %f = bf16[64,32]{1,0} fusion(%x), kind=kLoop, calls=%convert
        """,
        """
        %convert () -> () {
        %p = f32[64,32]{1,0} parameter(0)
        ROOT %y = bf16[64,32]{1,0} convert(%p)
        }
        """,
    )
    assert workload.read(text).bytes == (4 + 2) * 64 * 32


@pytest.mark.parametrize(("space", "times"), [("S(1)", 1), ("", 2)])
def test_a_started_slice_moves_only_the_slice(space: str, times: int) -> None:
    text = program(
        f"""
        %x = f32[1000,128]{{1,0:T(8,128)}} parameter(0)
        %start = ((f32[1000,128]{{1,0:T(8,128)}}), f32[16,128]{{1,0:T(8,128){space}}},\
 s32[]{{:S(2)}}) slice-start(%x), slice={{[0:16], [0:128]}}
        ROOT %done = f32[16,128]{{1,0:T(8,128){space}}} slice-done(%start)
        """
    )
    assert workload.read(text).bytes == times * 16 * ROW


def test_started_copies_and_collectives_count_operands_and_results() -> None:
    text = program(
        """
        %x = f32[1000,128]{1,0} parameter(0)
        %copy = (f32[1000,128]{1,0:S(1)}, f32[1000,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
        %copied = f32[1000,128]{1,0:S(1)} copy-done(%copy)
        %sum = f32[1000,128]{1,0} all-reduce-start(%x), channel_id=1, to_apply=%add
        %summed = f32[1000,128]{1,0} all-reduce-done(%sum)
        ROOT %t = (f32[1000,128]{1,0:S(1)}, f32[1000,128]{1,0}) tuple(%copied, %summed)
        """
    )
    assert workload.read(text).bytes == 1000 * ROW + 2 * 1000 * ROW


def test_an_update_in_place_writes_only_the_update() -> None:
    text = program(
        """
        %stack = f32[6,10,128]{2,1,0} parameter(0)
        %new = f32[10,128]{1,0} parameter(1)
        %i = s32[] parameter(2)
        ROOT %f = f32[6,10,128]{2,1,0} fusion(%stack, %new, %i), kind=kLoop, calls=%update
        """,
        """
        %update () -> () {
        %p = f32[6,10,128]{2,1,0} parameter(0)
        %q = f32[10,128]{1,0} parameter(1)
        %j = s32[] parameter(2)
        %zero = s32[] constant(0)
        %row = f32[1,10,128]{2,1,0} bitcast(%q)
        ROOT %d = f32[6,10,128]{2,1,0} dynamic-update-slice(%p, %row, %j, %zero, %zero)
        }
        """,
    )
    assert workload.read(text).bytes == 2 * 10 * ROW + 4


def test_a_collective_spread_over_fusions_moves_its_arrays_once() -> None:
    spread = 'backend_config={"async_collective_fusion_config":{}}'
    text = program(
        """
        %x = bf16[64,32]{1,0} parameter(0)
        %other = bf16[8,8]{1,0} parameter(1)
        %s = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) fusion(%x), kind=kLoop, calls=%start
        %y = bf16[128,32]{1,0} get-tuple-element(%s), index=1
        %c = (bf16[8,8]{1,0}, bf16[128,32]{1,0}) fusion(%x, %other, %y), calls=%goes_on
        ROOT %z = bf16[8,8]{1,0} get-tuple-element(%c), index=0
        """,
        f"""
        %start () -> () {{
        %p = bf16[64,32]{{1,0}} parameter(0)
        %g = bf16[128,32]{{1,0}} all-gather(%p), channel_id=1, {spread}
        ROOT %r = (bf16[64,32]{{1,0}}, bf16[128,32]{{1,0}}) custom-call(%g),\
 custom_call_target="AsyncCollectiveStart"
        }}

        %goes_on () -> () {{
        %p.1 = bf16[64,32]{{1,0}} parameter(0)
        %q = bf16[8,8]{{1,0}} parameter(1)
        %gathered = bf16[128,32]{{1,0}} parameter(2)
        %g.1 = bf16[128,32]{{1,0}} all-gather(%p.1), channel_id=1, {spread}
        %n = bf16[8,8]{{1,0}} negate(%q)
        ROOT %t = (bf16[8,8]{{1,0}}, bf16[128,32]{{1,0}}) tuple(%n, %gathered)
        }}
        """,
    )
    assert workload.read(text).bytes == 2 * (64 * 32 + 64 * 32 + 128 * 32) + 2 * (2 * 8 * 8)


@pytest.mark.parametrize(
    ("array", "padded", "unpadded"),
    [
        ("f32[8,96]{1,0:T(8,128)}", 8 * 128 * 4, 8 * 96 * 4),
        ("f32[8,96]{0,1:T(8,128)}", 96 * 128 * 4, 8 * 96 * 4),
        ("bf16[5,130]{1,0:T(8,128)(2,1)}", 8 * 256 * 2, 5 * 130 * 2),
        # Minor to major: axes 0, 2 and 1.
        ("f32[2,3,90]{0,2,1:T(8,128)}", 3 * 96 * 128 * 4, 2 * 3 * 90 * 4),
        ("f32[4096,32,2,96]{3,2,1,0:T(2,128)}", 4096 * 32 * 2 * 128 * 4, 4096 * 32 * 2 * 96 * 4),
        ("s32[5]{0:T(1024)}", 1024 * 4, 5 * 4),
        ("s32[]{:T(128)}", 128 * 4, 4),
        ("pred[33,100]{0,1:T(8,128)(4,1)}", 104 * 128, 33 * 100),
        ("f32[8,96]{1,0}", 8 * 96 * 4, 8 * 96 * 4),
    ],
)
def test_arrays_are_padded_to_whole_tiles(array: str, padded: int, unpadded: int) -> None:
    (parsed,) = array_types(array)
    assert (parsed.padded_bytes, parsed.num_bytes) == (padded, unpadded)
    text = program(f"%x = {array} parameter(0)\nROOT %y = {array} copy(%x)")
    assert padded_and_unpadded(text) == (2 * padded, 2 * unpadded)


CHOICE = """
%small () -> () {
%a = f32[10,128]{1,0} parameter(0)
ROOT %b = f32[10,128]{1,0} copy(%a), metadata={op_name="f/cond/branch_0_fun/copy"}
}

%middle () -> () {
%a.1 = f32[10,128]{1,0} parameter(0)
%b.1 = f32[10,128]{1,0} copy(%a.1), metadata={op_name="f/cond/branch_1_fun/copy"}
ROOT %c.1 = f32[10,128]{1,0} copy(%b.1), metadata={op_name="f/cond/branch_1_fun/copy"}
}

%large () -> () {
%a.2 = f32[10,128]{1,0} parameter(0)
%b.2 = f32[10,128]{1,0} copy(%a.2), metadata={op_name="f/cond/branch_2_fun/SCOPEcopy"}
%c.2 = f32[10,128]{1,0} copy(%b.2), metadata={op_name="f/cond/branch_2_fun/SCOPEcopy"}
ROOT %d.2 = f32[10,128]{1,0} negate(%c.2)
}
"""


@pytest.mark.parametrize(("scope", "copies"), [("", 3), ("rarely_runs/", 2)])
def test_a_branch_that_rarely_runs_does_not_count(scope: str, copies: int) -> None:
    text = program(
        """
        %x = f32[10,128]{1,0} parameter(0)
        %i = s32[] parameter(1)
        ROOT %y = f32[10,128]{1,0} conditional(%i, %x, %x, %x),\
 branch_computations={%small, %middle, %large}, metadata={op_name="f/cond"}
        """,
        CHOICE.replace("SCOPE", scope),
    )
    assert workload.read(text).bytes == copies * 2 * 10 * ROW


@pytest.mark.parametrize(("scope", "times"), [("", 1), ("rarely_runs/", 0)])
def test_a_loop_that_rarely_runs_does_not_count(scope: str, times: int) -> None:
    text = program(
        f"""
        %x = f32[10,128]{{1,0}} parameter(0)
        %n = s32[] parameter(1)
        %t = (s32[], f32[10,128]{{1,0}}) tuple(%n, %x)
        ROOT %w = (s32[], f32[10,128]{{1,0}}) while(%t), condition=%condition, body=%body,\
 metadata={{op_name="jit(f)/jvp({scope}exchange)/while"}}
        """,
        """
        %body () -> () {
        %s = (s32[], f32[10,128]{1,0}) parameter(0)
        %i = s32[] get-tuple-element(%s), index=0
        %a = f32[10,128]{1,0} get-tuple-element(%s), index=1
        %b = f32[10,128]{1,0} copy(%a)
        ROOT %r = (s32[], f32[10,128]{1,0}) tuple(%i, %b)
        }

        %condition () -> () {
        %s.1 = (s32[], f32[10,128]{1,0}) parameter(0)
        %i.1 = s32[] get-tuple-element(%s.1), index=0
        %n.1 = s32[] custom-call()
        ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
        }
        """,
    )
    assert workload.read(text).bytes == times * 2 * 10 * ROW


TPU_KERNEL = (
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"abc",'
    '"cost_estimate":{"flops":"1300","transcendentals":"7","bytes_accessed":"999"}}}'
)
GPU_KERNEL = (
    'custom_call_target="mosaic_gpu_v2", backend_config={cost_estimate_json = "{'
    r"\22flops\22: 1300, \22transcendentals\22: 7, \22bytes_accessed\22: 999,"
    r' \22remote_bytes_transferred\22: 0}", kernel_hash = "T\FA{\0A"}'
)
OLD_GPU_KERNEL = (
    'custom_call_target="mosaic_gpu_v2", frontend_attributes={cost_estimate_json={"flops": 1300,'
    ' "transcendentals": 7, "bytes_accessed": 999}}'
)


def kernel(attributes: str) -> str:
    return program(
        f"""
        %table = f32[1000,128]{{1,0}} parameter(0)
        %ids = s32[8]{{0}} parameter(1)
        ROOT %rows = f32[8,128]{{1,0}} custom-call(%table, %ids), {attributes}
        """
    )


@pytest.mark.parametrize("attributes", [TPU_KERNEL, GPU_KERNEL, OLD_GPU_KERNEL])
def test_a_kernel_counts_what_it_declares(attributes: str) -> None:
    work = workload.read(kernel(attributes))
    assert (work.flops, work.bytes) == (1300, 999)


def test_a_kernel_that_declares_nothing_counts_operands_and_results() -> None:
    work = workload.read(kernel('custom_call_target="tpu_custom_call"'))
    assert (work.flops, work.bytes) == (0, 1000 * ROW + 8 * 4 + 8 * ROW)


def test_reserved_memory_is_not_traffic() -> None:
    assert workload.read(kernel('custom_call_target="AllocateBuffer"')).bytes == 0


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [
        ("NO_MASK", 0, 512 * 512),
        ("CAUSAL", 0, 512 * 513 // 2),
        ("CAUSAL", 100, 100 * 101 // 2 + 412 * 100),
    ],
)
@pytest.mark.parametrize(("name", "products"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_attention_by_cudnn(mask: str, window: int, pairs: int, name: str, products: int) -> None:
    heads = "bf16[2,512,12,64]{3,2,1,0}"
    results = f"({heads}, f32[2,12,512]{{2,1,0}}, u8[0]{{0}})"
    config = {
        "cudnn_fmha_backend_config": {
            "algorithm": {"algo_id": "0"},
            "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": _TEXT_SIZES},
            "mask_type": mask,
            "sliding_window_length": window,
        }
    }
    text = program(
        f"""
        %q = {heads} parameter(0)
        %k = {heads} parameter(1)
        %v = {heads} parameter(2)
        ROOT %a = {results} custom-call(%q, %k, %v), custom_call_target="__cudnn$fmha{name}",\
 backend_config={json.dumps(config)}
        """
    )
    work = workload.read(text)
    assert work.flops == 2 * products * 2 * 12 * pairs * 64
    assert work.bytes == 4 * 2 * 512 * 12 * 64 * 2 + 2 * 12 * 512 * 4


@pytest.mark.parametrize(
    ("name", "mask", "block", "blocks", "products"),
    [
        # Blocks of 128 queries and 128 keys: on and below the diagonal.
        ("fwd", "s8[1,4,4]", "block_kv", (128, 128, 1 + 2 + 3 + 4), 2),
        # Of 128 queries and 256 keys.
        ("dkv", "s8[1,4,2]", "block_kv_dkv", (128, 256, 1 + 1 + 2 + 2), 5),
        # A window, so that queries see at most two blocks.
        ("fwd", "s8[1,4,2]", "block_kv", (128, 128, 1 + 2 + 2 + 2), 2),
    ],
)
def test_splash_attention(
    name: str, mask: str, block: str, blocks: tuple[int, int, int], products: int
) -> None:
    # Its attributes have line breaks, before those by which instructions are counted.
    queries, keys, count = blocks
    text = program(
        f"""
        %next = {mask} parameter(0)
        %mask = {mask} parameter(1)
        %q = bf16[3,64,512]{{2,1,0}} parameter(2)
        ROOT %a = bf16[3,512,64]{{2,1,0}} custom-call(%next, %mask, %q),\
 custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": {queries}, \\"{block}\\": {keys}}}"
}}}}, metadata={{op_name="jit(f)/jvp(attention)/splash_mha_{name}_residuals/pallas_call"}}
        """
    )
    work = workload.read(text)
    assert work.flops == 2 * products * 3 * 64 * queries * keys * count
    assert work.bytes == 2 * 2 * 3 * 64 * 512 + 2 * int(mask[7]) * int(mask[5])
    assert [source.source for source in work.sources] == ["attention"]


_TEXT_SIZES = ["2", "12", "512", "512"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:2x2", "h200:1"])
def test_compiled_programs_move_what_their_shapes_say(chip: str) -> None:
    compiler: aot.Compiler = "h200" if chip.startswith("h200") else "tpu"
    texts: dict[str, Any] = aot.run(Path(hand_counted.__file__), chip, compiler)
    assert set(texts) == set(hand_counted.CASES)
    for name, case in hand_counted.CASES.items():
        work = workload.read(texts[name])
        assert work.flops == case.flops, name
        assert case.bytes <= work.bytes <= 1.001 * case.bytes, name


def test_a_computation_that_runs_on_a_sparsecore_counts() -> None:
    # Its closing brace names its thread.
    text = """HloModule m, num_partitions=1

%offloaded (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %doubled = f32[8,128]{1,0:T(8,128)} add(%a, %a)
}, execution_thread="sparsecore"

ENTRY %main () -> () {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]) call-start(%x), \
async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %done = f32[8,128]{1,0:T(8,128)} call-done(%start)
}
"""
    assert workload.read(text).bytes == 3 * 8 * ROW
    assert collectives.read(text, {"replica": 1}) == ()
