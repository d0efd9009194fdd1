"""Topologies to plan for, by name: their devices, and the environment of their compiler.

A device is a JAX device: a chip, or one of the two cores of a TPU7x chip.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from umv2.config.schema import UserError
from umv2.hardware import CHIPS, PlannedChip

EXAMPLES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4", "h200:8")

_GIB = 2**30

# The Python module that contains each compiler.
_COMPILERS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
# JAX itself runs on the CPU. XLA reads these once, before its first use. There is no TPU host to
# query for metadata, and no GPU to autotune on.
_ENVIRONMENT = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise one process per machine
    },
    "cuda": {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
}

# XLA's description of the GPU, as `jaxlib` prints it on one. Missing fields are unknown.
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
    """Connected chips of one type; `shape` is that of the torus, or the number of GPUs."""

    name: str
    chip: PlannedChip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """The number of JAX devices."""
        return math.prod(self.shape) * self.chip.devices

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables to set before a process starts that compiles for this topology."""
        return _ENVIRONMENT[self.chip.platform]

    def devices(self) -> list[Any]:
        """Returns abstract devices, to build a mesh to compile for; loads the compiler.

        Raises:
          UserError: the compiler does not support the shape.
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
        except Exception as error:  # libtpu's errors for an unknown shape have no common type
            raise _unknown(self.name, f"libtpu rejects it: {str(error).splitlines()[0]}") from error
        return list(described.devices)


_GPUS_PER_HOST = 8


def parse(name: str) -> Topology:
    """Returns the topology of a name such as "v5p:4x4x8" (chips in each direction) or "h200:8".

    Raises:
      UserError: the name is unknown, or its compiler is not installed.
    """
    kind, _, sizes = name.partition(":")
    planned = {name: chip for name, chip in CHIPS.items() if isinstance(chip, PlannedChip)}
    if kind not in planned:
        raise _unknown(name, f"the chips are {', '.join(planned)}")
    chip = planned[kind]
    size = r"[1-9]\d*"
    if not re.fullmatch("x".join([size] * chip.dimensions), sizes):
        pattern = "AxBxC"[: 2 * chip.dimensions - 1]
        rule = (
            f"{kind}:{pattern}, chips in each direction" if chip.dimensions > 1 else f"{kind}:GPUs"
        )
        raise _unknown(name, f"must be {rule}")
    shape = tuple(int(size) for size in sizes.split("x"))
    if chip.platform == "cuda" and shape[0] > _GPUS_PER_HOST and shape[0] % _GPUS_PER_HOST:
        raise _unknown(name, f"hosts must be full: use a multiple of {_GPUS_PER_HOST} GPUs")
    if not _installed(_COMPILERS[chip.platform]):
        raise UserError(
            f"--topology={name}: its compiler, {_COMPILERS[chip.platform]}, is not installed;"
            " pip install -e '.[compile]'"
        )
    return Topology(name, chip, shape)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _unknown(name: str, reason: str) -> UserError:
    return UserError(f"--topology={name}: {reason}; examples: {', '.join(EXAMPLES)}")
