"""Which collectives run during other work, by hand."""

import pytest

from umv2.planning.hlo import collectives

_GROUPS = "channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true"
PROGRAM = """HloModule m, num_partitions=2

%fused () -> () {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%gather () -> () {
  %q = f32[8]{0} parameter(0)
  ROOT %g = f32[16]{0} all-gather(%q), dimensions={0}, GROUPS
}

ENTRY %main () -> () {
  %x = f32[8]{0} parameter(0)
BODY
}
""".replace("GROUPS", _GROUPS)
WORK = "%y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused"
START = f"%start = f32[8]{{0}} all-reduce-start(%x), to_apply=%add, {_GROUPS}"
DONE = "%done = f32[8]{0} all-reduce-done(%start)"
WRAPPED = "%start = ((f32[8]{0}), f32[16]{0}) async-start(%x), calls=%gather"
UPDATE = "%update = ((f32[8]{0}), f32[16]{0}) async-update(%start)"
WRAPPED_DONE = "%done = f32[16]{0} async-done(%update)"
VIEW = "%z = f32[8]{0} bitcast(%x)"


@pytest.mark.parametrize(
    ("lines", "overlapped"),
    [
        ([START, WORK, DONE], True),
        ([WORK, START, DONE], False),
        ([START, DONE, WORK], False),
        ([START, VIEW, DONE], False),
        ([WRAPPED, UPDATE, WORK, WRAPPED_DONE], True),
        ([WRAPPED, UPDATE, WRAPPED_DONE, WORK], False),
        ([f"%sum = f32[8]{{0}} all-reduce(%x), to_apply=%add, {_GROUPS}", WORK], False),
        ([f'%sum = f32[8]{{0}} all-reduce(%x), to_apply=%add, {_GROUPS},'
          ' backend_config={"async_collective_fusion_config":{}}',
          '%c = f32[8]{0} custom-call(%sum), custom_call_target="AsyncCollectiveStart"'], True),
    ],
)  # fmt: skip
def test_a_collective_overlaps_with_what_stands_between_start_and_end(
    lines: list[str], overlapped: bool
) -> None:
    text = PROGRAM.replace("BODY", "\n".join(f"  {line}" for line in lines))
    (found,) = collectives.read(text, {"memory": 2})
    assert found.overlapped == overlapped
