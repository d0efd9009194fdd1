"""FLOPs and cycles of compiled programs, by hand, for instructions as compilers print them."""

import jax.numpy as jnp
import pytest

from tests.planning import collective_programs
from tests.planning.collective_programs import HIDDEN, INNER, LAYERS, TOKENS
from umv2.planning.hlo import workload
from umv2.planning.program import estimate


def test_products_in_loops_count_once_per_trip() -> None:
    mesh = collective_programs.make_mesh((2, 2, 2, 1))
    program = collective_programs.layers(mesh, jnp.float32)
    # Two forward products, the first one rematerialised in the backward pass, and four for
    # gradients.
    expected = LAYERS * (2 + 1 + 4) * 2 * (TOKENS // mesh.size) * HIDDEN * INNER
    text = program.as_text()
    assert text is not None
    work = workload.read(text)
    assert (work.flops, work.cycles) == (expected, None)  # CPU compilers estimate no cycles
    # The compiler counts one layer, and also operations that are not products.
    flops = estimate(program).flops
    assert flops is not None
    assert flops == pytest.approx(expected / LAYERS, rel=0.05)


def text_of(left: str, right: str, instruction: str) -> str:
    """Returns a loop of three trips over a fusion with one product."""
    result = instruction.partition(" ")[0] if instruction[0] != "(" else "f32[]"
    return f"""HloModule m

%fused (p: {left}, q: {right}) -> {result} {{
  %p = {left} parameter(0)
  %q = {right} parameter(1)
  ROOT %r = {instruction}
}}

%body (s: (s32[])) -> (s32[]) {{
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %left = {left} custom-call()
  %right = {right} custom-call()
  %f = {result} fusion(%left, %right), calls=%fused, backend_config={{"estimated_cycles":"100"}}
  %one = s32[] constant(1)
  %add = s32[] add(%i, %one)
  ROOT %t = (s32[]) tuple(%add)
}}

%condition (s: (s32[])) -> pred[] {{
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main () -> (s32[]) {{
  %zero = s32[] constant(0)
  %t = (s32[]) tuple(%zero)
  ROOT %while = (s32[]) while(%t), condition=%condition, body=%body
}}
"""


_BATCH = "window={size=8x16 stride=7x15 lhs_dilate=8x16}"
_GROUPED = "window={size=8x4x4 stride=7x3x1 pad=0_0x0_0x3_3 lhs_dilate=8x4x1 rhs_reversal=0x0x1}"
_CUBLAS = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
    '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
)


@pytest.mark.parametrize(
    ("left", "right", "instruction", "products"),
    [
        ("f32[64,32]{1,0}", "f32[32,16]{1,0}",
         "f32[64,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
         64 * 32 * 16),
        ("f32[8,512,64]{2,1,0}", "f32[8,64,32]{2,1,0}",
         f"(f32[8,512,32]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%p, %q), {_CUBLAS}",
         8 * 512 * 64 * 32),
        ("bf16[64,32]{1,0:T(8,128)(2,1)}", "bf16[32,16]{1,0:T(8,128)(2,1)}",
         "bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf",
         64 * 32 * 16),
        # einsum("bqhd,bkhd->bhqk") with 8 x 512 x 16 x 128
        ("bf16[8,512,16,128]{3,1,2,0}", "bf16[8,512,16,128]{3,1,2,0}",
         f"bf16[8,16,512,512]{{3,2,1,0}} convolution(%p, %q), {_BATCH}, dim_labels=0b1f_0o1i->01bf",
         8 * 16 * 512 * 512 * 128),
        # einsum("bqghd,bkgd->bghqk") with 8 x 512 x 4 x 4 x 128
        ("bf16[8,512,4,128,1]{3,1,4,2,0}", "bf16[8,512,4,4,128]{4,1,3,2,0}",
         f"bf16[8,4,512,512,4] convolution(%p, %q), {_GROUPED}, dim_labels=0b1f2_0o12i->01bf2",
         8 * 4 * 4 * 512 * 512 * 128),
        # A "SAME" convolution of width 5: at each end, 3 products are with padding.
        ("bf16[8,512,256]{2,0,1}", "bf16[5,256,64]{2,1,0}",
         "bf16[8,512,64]{2,0,1} convolution(%p, %q), window={size=5 pad=2_2},"
         " dim_labels=b0f_0io->b0f",
         8 * 256 * 64 * (5 * 512 - 6)),
    ],
)  # fmt: skip
def test_each_form_of_a_product(left: str, right: str, instruction: str, products: int) -> None:
    work = workload.read(text_of(left, right, instruction))
    assert (work.flops, work.cycles) == (3 * 2 * products, 300)


def test_text_that_is_not_a_program_is_rejected() -> None:
    with pytest.raises(ValueError, match="not that of a compiled program"):
        workload.read("module @jit_f {\n}\n")
