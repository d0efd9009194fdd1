import jax
import pytest
from jax.sharding import AxisType

from umv2 import hardware


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_of_known_devices(kind: str, expected: float | None) -> None:
    chip = hardware.chip_of(kind)
    assert (None if chip is None else chip.peak_flops) == expected


def test_devices_of_one_cpu_share_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_measured_cpu_flops", lambda: 7.0)
    cpu = jax.devices("cpu")[0]
    assert hardware.peak_flops(cpu) == 7.0
    mesh = jax.make_mesh((8,), ("replica",), (AxisType.Explicit,), devices=jax.devices("cpu"))
    with jax.set_mesh(mesh):
        assert hardware.mesh_peak_flops() == 7.0


def test_a_cpu_is_measured() -> None:
    assert 1e8 < hardware._measured_cpu_flops(size=64, repeats=2) < 1e15
