"""The gate to `kernels_pallas`: nothing else in this package imports it."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int

import kernels_pallas
from kernels_pallas import UnsupportedError, common
from umv2.config import ConfigError


def vary_alike[T](arrays: T, axes: tuple[str, ...] = ()) -> T:
    """Makes arrays vary, in one device's code, over `axes` and every axis that one varies over.

    JAX then sums their gradients over the devices; a custom derivative must leave that to it.
    """
    return common.vary_alike(arrays, axes=axes)


def product_key_top_k(
    *arrays: Array | None, implementation: str = "auto", **options: Any
) -> tuple[Float[Array, "t hk c"], Int[Array, "t hk"]]:
    """Calls `kernels_pallas.product_key_top_k` on the arrays of one device.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    operator = kernels_pallas.product_key_top_k
    return _call(operator, arrays, implementation, options)


def value_aggregation(
    *arrays: Array, implementation: str = "auto", **options: Any
) -> Float[Array, "t e"]:
    """Calls `kernels_pallas.value_aggregation` on the arrays of one device.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    operator = kernels_pallas.value_aggregation
    return _call(operator, arrays, implementation, options)


def row_products(
    *arrays: Array, implementation: str = "auto", **options: Any
) -> Float[Array, "t k"]:
    """Calls `kernels_pallas.row_products` on the arrays of one device.

    Raises:
      ConfigError: as `value_aggregation`, whose implementation it takes.
    """
    operator = kernels_pallas.row_products
    return _call(operator, arrays, implementation, options, "value_aggregation")


def activate(
    x: Float[Array, "*shape"], activation: Literal["gelu", "silu", "relu"] | None
) -> Float[Array, "*shape"]:
    """Returns the activation of pre-scores, exactly as `value_aggregation` applies it."""
    return kernels_pallas.activate(x, activation)


def _call(
    operator: Callable[..., Any],
    arrays: tuple[Array | None, ...],
    implementation: str,
    options: dict[str, Any],
    field: str | None = None,
) -> Any:
    name = None if implementation == "auto" else implementation
    try:
        return operator(*arrays, implementation=name, **options)
    except UnsupportedError as error:
        field = f"model.memory.{field or operator.__name__}={implementation!r}"
        raise ConfigError(f"{field}: {error}") from error
