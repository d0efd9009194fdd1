"""Machines to plan for, by name: what one of their devices has, and how its compiler is started.

A device is what JAX calls one: a whole chip, or one of the two cores of a TPU7x chip.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any, Literal

from umv2.schema import UserError
from umv2.training import metrics

EXAMPLES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4", "h200:8")

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind has.

    Attributes:
      platform: as JAX names it.
      device_kind: as JAX names it.
      dimensions: of the torus, which a topology's name gives the sizes of; 1: a switch.
      devices: that JAX makes of a chip.
      memory_bytes: that one program may fill.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that a device can receive over all of its links together.
      flops_per_cycle: of the matrix units, so that the peak gives the clock; None: not needed.
      source: of the figures.
    """

    platform: Literal["tpu", "cuda"]
    device_kind: str
    dimensions: int
    devices: int
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    flops_per_cycle: int | None
    source: str

    @property
    def peak_flops(self) -> float:
        """FLOP/s of dense bfloat16 matrix products."""
        return next(flops for kind, flops in metrics.PEAK_FLOPS if kind in self.device_kind)


_TPU_SOURCE = (
    "bandwidths: docs.cloud.google.com/tpu/docs/{page} (links: half of the bidirectional figure);"
    " memory: what the compiler of libtpu 0.0.51 calls available; matrix units: four of {unit}"
)
CHIPS = {
    "v5e": Chip(
        platform="tpu",
        device_kind="TPU v5 lite",
        dimensions=2,
        devices=1,
        memory_bytes=int(15.75 * _GIB),
        memory_bandwidth=819e9,
        link_bandwidth=400e9 / 2,
        flops_per_cycle=4 * 2 * 128**2,
        source=_TPU_SOURCE.format(page="v5e", unit="128 x 128"),
    ),
    "v5p": Chip(
        platform="tpu",
        device_kind="TPU v5",
        dimensions=3,
        devices=1,
        memory_bytes=int(95.73 * _GIB),
        memory_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2,
        flops_per_cycle=2 * 4 * 2 * 128**2,
        source=_TPU_SOURCE.format(page="v5p", unit="128 x 128 in each of two cores"),
    ),
    "v6e": Chip(
        platform="tpu",
        device_kind="TPU v6 lite",
        dimensions=2,
        devices=1,
        memory_bytes=int(31.24 * _GIB),
        memory_bandwidth=1638e9,
        link_bandwidth=800e9 / 2,
        flops_per_cycle=4 * 2 * 256**2,
        source=_TPU_SOURCE.format(page="v6e", unit="256 x 256"),
    ),
    "tpu7x": Chip(
        platform="tpu",
        device_kind="TPU7x",
        dimensions=3,
        devices=2,
        memory_bytes=int(94.74 * _GIB),
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=1200e9 / 2 / 2,
        flops_per_cycle=4 * 2 * 256**2,
        source=_TPU_SOURCE.format(page="tpu7x", unit="256 x 256"),
    ),
    "h200": Chip(
        platform="cuda",
        device_kind="NVIDIA H200",
        dimensions=1,
        devices=1,
        # CUDA and NCCL hold the rest; JAX takes 75 % where nothing else is said.
        memory_bytes=int(0.95 * 151397597184),
        memory_bandwidth=4.8e12,
        link_bandwidth=900e9 / 2,
        flops_per_cycle=None,
        source="nvidia.com/h200 (links: half of the bidirectional figure of NVLink); memory: 95 %"
        " of the 141 GiB of XLA's description, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95",
    ),
}

# Modules that come with each compiler.
_COMPILERS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
# JAX itself stays on the CPU. Flags are read once, before the first use: TPUs have no host here
# that could be asked about them, and on GPUs there is nothing to tune on.
_ENVIRONMENT = {
    "tpu": {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1"},
    "cuda": {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
}

# How XLA describes the card, as `jaxlib` prints it on one. Fields that are not named are unknown.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind, wired together; `shape` is the torus, or the number of GPUs."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices that JAX sees."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def environment(self) -> dict[str, str]:
        """What has to stand in the environment of a process before it compiles for this."""
        return _ENVIRONMENT[self.chip.platform]

    def devices(self) -> list[Any]:
        """Returns descriptions of the devices, for a mesh to compile for; loads the compiler.

        Raises:
          UserError: the compiler knows no such shape.
        """
        from jax.experimental import topologies

        if self.chip.platform == "cuda":
            hosts, per_host = (
                max(1, self.shape[0] // _GPUS_PER_HOST),
                min(_GPUS_PER_HOST, *self.shape),
            )
            described = topologies.get_topology_desc(
                self.name.split(":")[0],
                platform="cuda",
                topology=f"1x{hosts}x{per_host}",
                target_config=H200,
            )
            return list(described.devices)
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
        except Exception as error:  # whatever libtpu raises for a shape that it does not know
            raise _unknown(self.name, f"libtpu refuses it: {str(error).splitlines()[0]}") from error
        return list(described.devices)


_GPUS_PER_HOST = 8


def parse(name: str) -> Topology:
    """Returns the topology of a name such as "v5p:4x4x8" (chips in each direction) or "h200:8".

    Raises:
      UserError: an unknown name, or one whose compiler is not installed.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS:
        raise _unknown(name, f"the chips are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    size = r"[1-9]\d*"
    if not re.fullmatch("x".join([size] * chip.dimensions), sizes):
        wanted = "AxBxC"[: 2 * chip.dimensions - 1]
        rule = (
            f"{kind}:{wanted}, chips in each direction" if chip.dimensions > 1 else f"{kind}:GPUs"
        )
        raise _unknown(name, f"must be {rule}")
    shape = tuple(int(size) for size in sizes.split("x"))
    if chip.platform == "cuda" and shape[0] > _GPUS_PER_HOST and shape[0] % _GPUS_PER_HOST:
        raise _unknown(name, f"more than one host must be full: a multiple of {_GPUS_PER_HOST}")
    if not _installed(_COMPILERS[chip.platform]):
        raise UserError(
            f"--topology={name}: its compiler, {_COMPILERS[chip.platform]}, is not installed;"
            " pip install -e '.[compile]'"
        )
    return Topology(name, chip, shape)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _unknown(name: str, reason: str) -> UserError:
    return UserError(f"--topology={name}: {reason}; examples: {', '.join(EXAMPLES)}")
