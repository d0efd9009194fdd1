"""Peak FLOP/s, memory and bandwidths of accelerator chips, by their JAX device kind.

All figures are per JAX device, which is a chip or, for TPU7x, one of its two cores.
"""

import dataclasses
import functools
import time
from typing import Literal

import jax
import numpy as np

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip whose peak FLOP/s are known.

    Attributes:
      device_kind: `jax.Device.device_kind`, or a substring of it.
      other_names: other substrings of the device kind.
      peak_flops: peak FLOP/s of dense bfloat16 matrix products, from the vendor's data sheet.
    """

    device_kind: str
    other_names: tuple[str, ...] = ()
    peak_flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedChip(Chip):
    """A chip that programs can be planned for.

    Attributes:
      platform: JAX platform.
      dimensions: number of torus dimensions, which is that of sizes in a topology's name; 1 for a
        switched network.
      devices: number of JAX devices per chip.
      memory_bytes: device memory available to one program.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that a device can receive over all of its links together.
      flops_per_cycle: FLOPs per cycle of the matrix units, which with the peak gives the clock
        rate; None if not needed.
      source: source of the figures.
    """

    platform: Literal["tpu", "cuda"]
    dimensions: int
    devices: int
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    flops_per_cycle: int | None
    source: str


_TPU_SOURCE = (
    "bandwidths: docs.cloud.google.com/tpu/docs/{page} (links: half of the bidirectional figure);"
    " memory: what the compiler of libtpu 0.0.51 calls available; matrix units: four of {unit}"
)
# `chip_of` returns the first match, so the order matters: the device kind of a v5p is "TPU v5".
CHIPS: dict[str, Chip] = {
    "v4": Chip(device_kind="TPU v4", peak_flops=275e12),
    "v5e": PlannedChip(
        platform="tpu",
        device_kind="TPU v5 lite",
        other_names=("TPU v5e",),
        peak_flops=197e12,
        dimensions=2,
        devices=1,
        memory_bytes=int(15.75 * _GIB),
        memory_bandwidth=819e9,
        link_bandwidth=400e9 / 2,
        flops_per_cycle=4 * 2 * 128**2,
        source=_TPU_SOURCE.format(page="v5e", unit="128 x 128"),
    ),
    "v5p": PlannedChip(
        platform="tpu",
        device_kind="TPU v5",
        peak_flops=459e12,
        dimensions=3,
        devices=1,
        memory_bytes=int(95.73 * _GIB),
        memory_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2,
        flops_per_cycle=2 * 4 * 2 * 128**2,
        source=_TPU_SOURCE.format(page="v5p", unit="128 x 128 in each of two cores"),
    ),
    "v6e": PlannedChip(
        platform="tpu",
        device_kind="TPU v6 lite",
        other_names=("TPU v6",),
        peak_flops=918e12,
        dimensions=2,
        devices=1,
        memory_bytes=int(31.24 * _GIB),
        memory_bandwidth=1638e9,
        link_bandwidth=800e9 / 2,
        flops_per_cycle=4 * 2 * 256**2,
        source=_TPU_SOURCE.format(page="v6e", unit="256 x 256"),
    ),
    "tpu7x": PlannedChip(
        platform="tpu",
        device_kind="TPU7x",
        peak_flops=2307e12 / 2,
        dimensions=3,
        devices=2,
        memory_bytes=int(94.74 * _GIB),
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=1200e9 / 2 / 2,
        flops_per_cycle=4 * 2 * 256**2,
        source=_TPU_SOURCE.format(page="tpu7x", unit="256 x 256"),
    ),
    "a100": Chip(device_kind="A100", peak_flops=312e12),
    "h100_pcie": Chip(device_kind="H100 PCIe", peak_flops=756e12),
    "h100": Chip(device_kind="H100", peak_flops=989.4e12),
    "h200": PlannedChip(
        platform="cuda",
        device_kind="NVIDIA H200",
        other_names=("H200",),
        peak_flops=989.4e12,
        dimensions=1,
        devices=1,
        # CUDA and NCCL need the rest; by default JAX preallocates only 75 %.
        memory_bytes=int(0.95 * 151397597184),
        memory_bandwidth=4.8e12,
        link_bandwidth=900e9 / 2,
        flops_per_cycle=None,
        source="nvidia.com/h200 (links: half of the bidirectional figure of NVLink); memory: 95 %"
        " of the 141 GiB of XLA's description, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95",
    ),
    "gb200": Chip(device_kind="GB200", peak_flops=2500e12),
    "b200": Chip(device_kind="B200", peak_flops=2250e12),
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak FLOP/s of a device, or None if unknown.

    For TPUs and GPUs, this is the dense bfloat16 peak in the table. For a CPU, it is the throughput
    of a float32 numpy matrix product on all cores, measured once; it is the same for all devices of
    a process, which share the cores.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops()
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.peak_flops


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this device kind, or None if unknown."""
    for chip in CHIPS.values():
        if any(name in device_kind for name in (chip.device_kind, *chip.other_names)):
            return chip
    return None


@functools.cache
def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    matrix = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def mesh_peak_flops() -> float | None:
    """Returns the total peak FLOP/s of the current mesh, or None if unknown."""
    mesh = jax.sharding.get_mesh()
    devices = jax.devices()[:1] if mesh.empty else list(mesh.devices.flat)
    if devices[0].platform == "cpu":  # count one per process, since the others share its cores
        devices = list({device.process_index: device for device in devices}.values())
    peaks = [peak_flops(device) for device in devices]
    return None if None in peaks else sum(filter(None, peaks))
