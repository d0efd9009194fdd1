"""Typed wrappers of `kernels_pallas`, which no other module of this package imports."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

import kernels_pallas
from kernels_pallas import UnsupportedError, common, dispatch
from umv2.config import ConfigError

Activation = Literal["gelu", "silu", "relu"]
RARE = common.RARE


def match_vma[T](arrays: T, axes: tuple[str, ...] = ()) -> T:
    """Makes all arrays varying over `axes` and every manual axis that one of them varies over.

    Call it inside `shard_map` before an operator with a custom VJP. JAX then all-reduces the
    gradients, which the custom VJP must not do itself.
    """
    return common.match_vma(arrays, axes=axes)


def fix_signs(
    u: Float[Array, "*heads r"],
    v: Float[Array, "*heads r"],
    previous_u: Float[Array, "*heads r"],
    previous_v: Float[Array, "*heads r"],
) -> tuple[Float[Array, "*heads r"], Float[Array, "*heads r"]]:
    """Fixes the common sign of u and v for `product_key_top_k`; see `kernels_pallas.fix_signs`."""
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
    """Selects the top key pairs; returns their per-core scores and their grid positions.

    See `kernels_pallas.product_key_top_k`. The common sign of u and v matters: (-u, -v) selects
    other pairs.

    Args:
      query: queries per head, side, rank and token; the axis of heads or ranks that share a query
        has size 1.
      keys: keys per head, side (row, column) and rank.
      u: leading left singular vector of each head's summed cores; None for additive scores.
      v: leading right singular vector; None for additive scores.
      cores: Tucker cores; None for additive scores.
      top_m: number of pairs to select per token and head.
      shortlist: number of candidate keys per side.
      implementation: "auto", or the name of an implementation in `kernels_pallas`.

    Raises:
      ConfigError: the named implementation does not support the call; "auto" always does.
    """
    with _config_errors("product_key_top_k", implementation):
        return kernels_pallas.product_key_top_k(
            query,
            keys,
            u,
            v,
            cores,
            top_m=top_m,
            shortlist=shortlist,
            implementation=_implementation(implementation),
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
    master_values: Float[Array, "m v"] | None = None,
    master_pre_values: Float[Array, "m p"] | None = None,
    first_master: Int[Array, "1"] | None = None,
    packed_values: UInt32[Array, "n w"] | None = None,
    packed_pre_values: UInt32[Array, "n x"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "t {num_slots}*v"]:
    """Returns the weighted sum of each token's selected rows, on one device.

    See `kernels_pallas.value_aggregation`.

    Args:
      values: the value table.
      rows: ids of the selected rows.
      weights: weight of each selection, for each of the c equal slices of a row.
      pre_values: the pre-value table, whose products with `pre_inputs` gate the selections.
      pre_inputs: input of each token to the pre-scores; given with `pre_values`.
      activation: activation of the pre-scores.
      slots: slot of its token's output to which each selection is added, in [0, num_slots).
      num_slots: output slots per token; 1 without `slots`.
      master_values: the trained rows, if `values` is a copy of them, which get the gradient.
      master_pre_values: likewise for `pre_values`.
      first_master: the row of `values` that is row 0 of the masters.
      packed_values: `pack_rows(values)`, which is read where that is faster.
      packed_pre_values: likewise for `pre_values`.
      chunk_size: number of tokens whose rows are fetched at once; None: chosen from their size.
      implementation: "auto", or the name of an implementation in `kernels_pallas`.

    Raises:
      ConfigError: the named implementation does not support the call; "auto" always does.
    """
    with _config_errors("value_aggregation", implementation):
        return kernels_pallas.value_aggregation(
            values,
            rows,
            weights,
            pre_values=pre_values,
            pre_inputs=pre_inputs,
            activation=activation,
            slots=slots,
            num_slots=num_slots,
            master_values=master_values,
            master_pre_values=master_pre_values,
            first_master=first_master,
            packed_values=packed_values,
            packed_pre_values=packed_pre_values,
            chunk_size=chunk_size,
            implementation=_implementation(implementation),
        )


def row_products(
    table: Float[Array, "n d"],
    rows: Int[Array, "t k"],
    inputs: Float[Array, "t d"],
    *,
    master: Float[Array, "m d"] | None = None,
    first_master: Int[Array, "1"] | None = None,
    packed: UInt32[Array, "n w"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "t k"]:
    """Returns the inner products of each token's input with its selected rows, on one device.

    See `kernels_pallas.row_products`.

    Args:
      table: the table, or some of its columns.
      rows: ids of the selected rows.
      inputs: input of each token.
      master: the trained rows, if `table` is a copy of them, which get the gradient.
      first_master: the row of `table` that is row 0 of the masters.
      packed: `pack_rows(table)`, which is read where that is faster.
      chunk_size: number of tokens whose rows are fetched at once; None: chosen from their size.
      implementation: the implementation of `value_aggregation`.

    Raises:
      ConfigError: the implementation does not support the call, as in `value_aggregation`.
    """
    with _config_errors("value_aggregation", implementation):
        return kernels_pallas.row_products(
            table,
            rows,
            inputs,
            master=master,
            first_master=first_master,
            packed=packed,
            chunk_size=chunk_size,
            implementation=_implementation(implementation),
        )


def reads_packed_rows(table: Float[Array, "*l n d"]) -> bool:
    """Returns whether kernels read a packed copy of such a table faster: bfloat16 on a TPU."""
    return table.dtype == jnp.bfloat16 and platform() == "tpu"


def pack_rows(table: Float[Array, "n d"]) -> UInt32[Array, "n w"]:
    """Packs bfloat16 rows into 32-bit words; see `kernels_pallas.pack_rows`."""
    return kernels_pallas.pack_rows(table)


def activate(x: Float[Array, "*shape"], activation: Activation | None) -> Float[Array, "*shape"]:
    """Applies the activation of pre-scores, exactly as `value_aggregation` does."""
    return kernels_pallas.activate(x, activation)


def _implementation(implementation: str) -> Any:
    """Returns the `implementation` argument of `kernels_pallas`, where None means "auto"."""
    return None if implementation == "auto" else implementation


@contextlib.contextmanager
def _config_errors(field: str, implementation: str) -> Iterator[None]:
    """Turns UnsupportedError into a ConfigError that names the configuration field."""
    try:
        yield
    except UnsupportedError as error:
        raise ConfigError(f"model.memory.{field}={implementation!r}: {error}") from error


def platform() -> str:
    """Returns what the program that is being traced will run on: "cpu", "gpu" or "tpu"."""
    return dispatch.lowering_platform()


def compute_capability() -> str | None:
    """Returns the compute capability of the attached GPU; None for any other device."""
    return dispatch.compute_capability()


def choose(
    field: str,
    implementation: str,
    platform: str,
    automatic: Mapping[str, tuple[str, ...]],
    unsupported_reasons: Mapping[str, Callable[[], str | None]],
) -> str:
    """Returns the implementation of an operator to use, and logs each automatic choice once.

    Args:
      field: the configuration field that selects it.
      implementation: "auto", or the name of an implementation.
      platform: what the call is compiled for.
      automatic: for each platform, the implementations in the order in which they are tried.
      unsupported_reasons: for each implementation, why it does not support the call, or None.

    Raises:
      ConfigError: the named implementation does not support the call.
    """
    if implementation == "auto":
        return dispatch.choose(field, None, platform, automatic, unsupported_reasons)
    if reason := unsupported_reasons[implementation]():
        raise ConfigError(f"{field}={implementation!r}: {reason}")
    return implementation
