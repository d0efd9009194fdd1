"""Chooses the implementation of an operator: the one requested, or the first supported one.

An implementation states in words why it does not support a call. If it was requested by name, that
reason is raised; there is no silent fallback. Without a name, the choice follows a fixed table and
is logged, with the reasons that ruled out the earlier entries.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast, get_args

import jax

from kernels_pallas.protocol import Backend, Call

logger = logging.getLogger(__name__)

Platform = Literal["cpu", "gpu", "tpu"]


class UnsupportedError(ValueError):
    """The requested implementation does not support this call; the message says why."""


class Backends[B: Backend[Any, Any]](Mapping[str, B]):
    """The modules that implement an operator, by name. Each is imported on first use.

    Importing the Pallas compilers up front would double the import time of programs that only use
    plain XLA.
    """

    def __init__(self, package: str, modules: Mapping[str, str]) -> None:
        """Maps names to modules of a package: `{"pallas_tpu": "tpu.backend"}`."""
        self._modules = {name: f"{package}.{module}" for name, module in modules.items()}

    def __getitem__(self, name: str) -> B:
        return cast(B, importlib.import_module(self._modules[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def unsupported_reasons(self, call: Call, platform: str) -> dict[str, Callable[[], str | None]]:
        """Returns, for each backend, a function that evaluates its `unsupported_reason`."""

        def reason(name: str) -> str | None:
            return self[name].unsupported_reason(call, platform)

        return {name: functools.partial(reason, name) for name in self}


def lowering_platform(platform: Platform | None = None) -> str:
    """The platform that a call will be compiled for, which tracing cannot know for certain.

    It is `platform` if the caller names one; else the platform of the mesh in context
    (`jax.set_mesh`, also over a topology that is not attached); else `jax.default_backend()`. So
    callers only need to name it for ahead-of-time compilation without a mesh, for a platform other
    than the default.

    Raises:
        ValueError: `platform` is not "cpu", "gpu" or "tpu".
    """
    if platform is None:
        device = jax.sharding.get_abstract_mesh().abstract_device
        return jax.default_backend() if device is None else device.platform
    if platform not in get_args(Platform):
        raise ValueError(f"platform: got {platform!r}, must be one of {get_args(Platform)}")
    return platform


def compute_capability() -> str | None:
    """The compute capability of the attached GPU, or None if the call may target another device."""
    if jax.default_backend() != "gpu":
        return None
    device: Any = jax.local_devices()[0]
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.device_kind != device.device_kind:
        return None
    return getattr(device, "compute_capability", None)


def choose(
    operator: str,
    implementation: str | None,
    platform: str,
    automatic: Mapping[str, tuple[str, ...]],
    unsupported_reasons: Mapping[str, Callable[[], str | None]],
) -> str:
    """Returns the name of the implementation to use for a call.

    Args:
        operator: its name, for messages.
        implementation: the requested one, or None for an automatic choice.
        platform: what the call is compiled for.
        automatic: for each platform, the implementations in the order in which they are tried. A
            platform that is not listed gets the last entry of "cpu".
        unsupported_reasons: for each implementation, why it does not support the call, or None.

    Raises:
        ValueError: there is no implementation of that name.
        UnsupportedError: the requested implementation, or every one listed for the platform, does
            not support the call.
    """
    if implementation is not None:
        if implementation not in list(unsupported_reasons):
            known = ", ".join(unsupported_reasons)
            raise ValueError(
                f"implementation: got {implementation!r}, must be None or one of {known}"
            )
        reason = unsupported_reasons[implementation]()
        if reason is not None:
            raise UnsupportedError(f"{operator}, implementation {implementation!r}: {reason}")
        return implementation

    refused: list[str] = []
    for name in automatic.get(platform, automatic["cpu"][-1:]):
        reason = unsupported_reasons[name]()
        if reason is None:
            _log_choice(operator, platform, name, "; ".join(refused))
            return name
        refused.append(f"not {name}: {reason}")
    raise UnsupportedError(f"{operator} on {platform}: {'; '.join(refused)}")


@functools.cache
def _log_choice(operator: str, platform: str, name: str, refused: str) -> None:
    """Logs each distinct choice once."""
    suffix = f" ({refused})" if refused else ""
    logger.info("%s on %s: implementation %s%s", operator, platform, name, suffix)
