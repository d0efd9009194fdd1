"""Faults of programs, by hand."""

import dataclasses

import pytest

from umv2.planning.hlo import faults

TABLE = (1000, 16)  # rows and columns on a device
LENGTH = 64
_LOOP = "jit(train_step)/transpose(jvp(layers))/while"
_REMATERIALISED = f"{_LOOP}/body/checkpoint/rematted_computation/memory/product_keys"
HEADS, MASK = "f32[2,3,64,64]{3,2,1,0}", "f32[1,64,64]{2,1,0}"

PROGRAM = """HloModule m

%slice () -> () {
  %p = f32[4,1000,16]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1000,16]{2,1,0} dynamic-slice(%p, %j, %zero, %zero)
  ROOT %layer = f32[1000,16]{1,0} bitcast(%row)
}

%with_kernel () -> () {
  %q.0 = s32[] parameter(0)
  ROOT %q.1 = f32[8]{0} custom-call(%q.0), custom_call_target="mosaic_gpu_v2"
}

%body () -> () {
  %s = (s32[], f32[4,1000,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,1000,16]{2,1,0} get-tuple-element(%s), index=1
BODY
  ROOT %t = (s32[], f32[4,1000,16]{2,1,0}) tuple(%i, %x)
}

%condition () -> () {
  %s.1 = (s32[], f32[4,1000,16]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main () -> () {
  %n = s32[] parameter(0)
  %tables = f32[4,1000,16]{2,1,0} parameter(1)
  %start = (s32[], f32[4,1000,16]{2,1,0}) tuple(%n, %tables)
OUTSIDE
  ROOT %loop = (s32[], f32[4,1000,16]{2,1,0}) while(%start), condition=%condition, body=%body,\
 backend_config={"known_trip_count":{"n":"4"}}, metadata={op_name="LOOP"}
}
""".replace("LOOP", _LOOP)


def found(body: str = "", outside: str = "") -> dict[str, list[str]]:
    """Returns the names of the instructions that are faults, without empty lists."""
    text = PROGRAM.replace("BODY", body).replace("OUTSIDE", outside)
    result = dataclasses.asdict(faults.find(text, sequence_length=LENGTH, table=TABLE))
    return {name: [one.split(":")[0] for one in each] for name, each in result.items() if each}


def test_a_program_without_faults() -> None:
    assert found() == {}


@pytest.mark.parametrize(("array", "expected"), [(HEADS, {"scores": ["y"]}), (MASK, {})])
def test_scores_have_an_axis_of_queries_and_one_of_keys(
    array: str, expected: dict[str, list[str]]
) -> None:
    assert found(f"  %y = {array} custom-call(%i)") == expected


def test_whole_tables_are_sliced_in_the_layer_loop() -> None:
    fusion = "%y = f32[1000,16]{1,0} fusion(TABLES, INDEX), kind=kLoop, calls=%slice"
    inside = fusion.replace("TABLES", "%x").replace("INDEX", "%i")
    assert found(f"  {inside}") == {"table_slices": ["y"]}
    outside = fusion.replace("TABLES", "%tables").replace("INDEX", "%n")
    scope = 'metadata={op_name="jit(train_step)/jvp(layers)/slice"}'
    assert found("", f"  {outside}, {scope}") == {}


def test_counters_with_an_entry_per_row_are_no_tables() -> None:
    assert found("  %y = s32[1000]{0} copy(%i)") == {}


@pytest.mark.parametrize("opcode", ["all-reduce", "reduce-scatter", "all-reduce-start"])
def test_whole_tables_are_reduced_in_the_layer_loop(opcode: str) -> None:
    reduction = f"%y = f32[1000,16]{{1,0}} {opcode}(%z), channel_id=1, to_apply=%add"
    operand = "%z = f32[1000,16]{1,0} custom-call()"
    small = reduction.replace("1000", "10"), operand.replace("1000", "10")
    scope = f', metadata={{op_name="{_LOOP}/body/memory/psum"}}'
    assert found(f"  {operand}{scope}\n  {reduction}{scope}") == {"table_reductions": ["y"]}
    assert found(f"  {small[1]}{scope}\n  {small[0]}{scope}") == {}
    assert found("", f"  {operand}{scope}\n  {reduction}{scope}") == {}


def test_sorts_and_kernels_should_not_be_rematerialised() -> None:
    kernel = '%k = f32[8]{0} custom-call(%i), custom_call_target="tpu_custom_call"'
    top_k = '%l = f32[8]{0} custom-call(%i), custom_call_target="__gpu$TopK"'
    product = '%m = f32[8]{0} custom-call(%i), custom_call_target="__cublas$lt$matmul"'
    fused = "%q = f32[8]{0} fusion(%i), kind=kCustom, calls=%with_kernel"
    sort = "%o = f32[8]{0} sort(%i)"

    def body(path: str) -> str:
        lines = (kernel, top_k, product, sort, fused)
        return "\n".join(f'  {line}, metadata={{op_name="{path}/f"}}' for line in lines)

    assert found(body(_REMATERIALISED)) == {
        "rematerialised_sorts": ["l", "o"],
        "rematerialised_kernels": ["k", "q"],
    }
    assert found(body(_REMATERIALISED.replace("rematted_computation/", ""))) == {}
