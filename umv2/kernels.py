"""The typed gate to `kernels_pallas`: nothing else in this package imports it."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Array, Float, Int

import kernels_pallas
from kernels_pallas import UnsupportedError, common
from umv2.config import ConfigError

Activation = Literal["gelu", "silu", "relu"]


def vary_alike[T](arrays: T, axes: tuple[str, ...] = ()) -> T:
    """Makes arrays vary, in one device's code, over `axes` and every axis that one varies over.

    JAX then sums their gradients over the devices; a custom derivative must leave that to it.
    """
    return common.vary_alike(arrays, axes=axes)


def fix_signs(
    u: Float[Array, "*heads r"],
    v: Float[Array, "*heads r"],
    previous_u: Float[Array, "*heads r"],
    previous_v: Float[Array, "*heads r"],
) -> tuple[Float[Array, "*heads r"], Float[Array, "*heads r"]]:
    """Returns u and v with the sign that `product_key_top_k` needs: see `kernels_pallas`."""
    return kernels_pallas.fix_signs(u, v, previous_u, previous_v)


def product_key_top_k(
    query: Float[Array, "query_heads 2 query_ranks t q"],
    keys: Float[Array, "h 2 r n q"],
    u: Float[Array, "h r"] | None,
    v: Float[Array, "h r"] | None,
    cores: Float[Array, "c h r r"] | None,
    *,
    top_m: int,
    shortlist: int,
    implementation: str = "auto",
) -> tuple[Float[Array, "t h*{top_m} cores"], Int[Array, "t h*{top_m}"]]:
    """Returns the scores by core, and the addresses, of the best pairs of keys of one device.

    See `kernels_pallas.product_key_top_k`. The sign of u and v matters: (-u, -v) selects others.

    Args:
      query: of each head, side, rank and token; heads or ranks that share a query have size 1.
      keys: of each head, side (row, column) and rank.
      u: the first left singular vector of each head's summed cores; None for additive scores.
      v: the first right singular vector; None as u is.
      cores: Tucker cores; None as u is.
      top_m: pairs for each token and head.
      shortlist: candidates a side.
      implementation: "auto", or a name of `kernels_pallas`.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    with _refusals("product_key_top_k", implementation):
        return kernels_pallas.product_key_top_k(
            query,
            keys,
            u,
            v,
            cores,
            top_m=top_m,
            shortlist=shortlist,
            implementation=_named(implementation),
        )


def value_aggregation(
    values: Float[Array, "n v"],
    rows: Int[Array, "t k"],
    weights: Float[Array, "t k c"],
    *,
    pre_values: Float[Array, "n p"] | None = None,
    pre_inputs: Float[Array, "t p"] | None = None,
    activation: Activation | None = None,
    slots: Int[Array, "t k"] | None = None,
    num_slots: int = 1,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "t {num_slots}*v"]:
    """Returns the weighted sums of each token's rows of one device's tables.

    See `kernels_pallas.value_aggregation`.

    Args:
      values: the table.
      rows: ids of the selected rows.
      weights: of each selection, for each of the c equal slices of a row.
      pre_values: rows that decide, with `pre_inputs`, how much each selection counts.
      pre_inputs: what each token brings to `pre_values`; both or neither.
      activation: of the pre-score.
      slots: where in its token's output each selection is added, in [0, num_slots).
      num_slots: outputs a token; 1 without `slots`.
      chunk_size: tokens whose rows are fetched at once; None: chosen by their size.
      implementation: "auto", or a name of `kernels_pallas`.

    Raises:
      ConfigError: the implementation that was named cannot take the call; "auto" always can.
    """
    with _refusals("value_aggregation", implementation):
        return kernels_pallas.value_aggregation(
            values,
            rows,
            weights,
            pre_values=pre_values,
            pre_inputs=pre_inputs,
            activation=activation,
            slots=slots,
            num_slots=num_slots,
            chunk_size=chunk_size,
            implementation=_named(implementation),
        )


def row_products(
    table: Float[Array, "n d"],
    rows: Int[Array, "t k"],
    inputs: Float[Array, "t d"],
    *,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "t k"]:
    """Returns the inner products of each token's input with its rows of one device's table.

    See `kernels_pallas.row_products`.

    Args:
      table: the table, or some of its columns.
      rows: ids of the selected rows.
      inputs: what each token brings.
      chunk_size: tokens whose rows are fetched at once; None: chosen by their size.
      implementation: that of `value_aggregation`.

    Raises:
      ConfigError: as `value_aggregation`, whose implementation it takes.
    """
    with _refusals("value_aggregation", implementation):
        return kernels_pallas.row_products(
            table, rows, inputs, chunk_size=chunk_size, implementation=_named(implementation)
        )


def activate(x: Float[Array, "*shape"], activation: Activation | None) -> Float[Array, "*shape"]:
    """Returns the activation of pre-scores, exactly as `value_aggregation` applies it."""
    return kernels_pallas.activate(x, activation)


def _named(implementation: str) -> Any:
    """What `kernels_pallas` calls an implementation of the configuration."""
    return None if implementation == "auto" else implementation


@contextlib.contextmanager
def _refusals(field: str, implementation: str) -> Iterator[None]:
    """Names the field of the configuration where an implementation cannot take the call."""
    try:
        yield
    except UnsupportedError as error:
        raise ConfigError(f"model.memory.{field}={implementation!r}: {error}") from error
