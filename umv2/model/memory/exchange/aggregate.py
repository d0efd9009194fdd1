"""Value aggregation over sharded tables: what one device computes, and what it exchanges.

Every function acts on the arrays of one device within `jax.shard_map`. The devices of the mesh axis
`memory` each have tokens of their own, t of them, and of every table

    replicated  all; nothing is exchanged
    columns     some columns of every row (columns.py)
    rows        some rows (rows.py)

Exchanged floating-point arrays have the compute dtype; sums within a device are accumulated in
float32 (float64 for float64). JAX differentiates the collectives.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from umv2 import kernels, sharding
from umv2.model.memory.exchange.columns import pool_columns
from umv2.model.memory.exchange.local import Activation, Options, pool
from umv2.model.memory.exchange.rows import pool_rows

Layout = Literal["replicated", "columns", "rows"]


def aggregate(
    layout: Layout,
    values: Float[Array, "l n v"],
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    *,
    pre_values: Float[Array, "l n p"] | None,
    pre_inputs: Float[Array, "t p_all"] | None,
    activation: Activation,
    slots: Int32[Array, "t k"] | None,
    num_slots: int,
    chunk_size: int | None,
    implementation: str,
    dtype: DTypeLike,
    axis: str = sharding.MEMORY,
) -> Float[Array, "t e"]:
    """Returns the weighted sums of each token's rows: `value_aggregation` over sharded tables.

    Args:
      layout: how the tables are sharded over `axis`.
      values: this device's shard of all tables: [L, N, v], whose N ("rows") or v ("columns") is
        1/M of all. In the layout "rows" device m owns rows m N/M and on of every table.
      rows: the selected rows as table * N + row, with N the rows of a table.
      weights: of each selection, for each of the c equal slices of a row.
      pre_values: rows that decide, with `pre_inputs`, how much each selection counts; alike.
      pre_inputs: what this device's tokens bring to pre-values, unsharded; both or neither.
      activation: of the pre-score.
      slots: where in its token's output each selection is added, in [0, num_slots).
      num_slots: outputs a token; 1 without `slots`.
      chunk_size: tokens whose rows are fetched at once; None: chosen by their size.
      implementation: of the operators on a device's rows.
      dtype: of the floating-point arrays that are exchanged.
      axis: the mesh axis over which the tables are sharded.

    Returns:
      [t, num_slots * D_v], in the accumulation dtype of `value_aggregation`.
    """
    options = Options(axis, activation, num_slots, chunk_size, implementation, dtype)
    arrays = (values, pre_values, rows, weights, pre_inputs, slots)
    if layout == "replicated":
        return pool(*arrays, options)
    accumulation = jnp.result_type(
        jnp.float32, *(x for x in (values, weights, pre_values, pre_inputs) if x is not None)
    )
    exchange: Callable[..., Array] = pool_columns if layout == "columns" else pool_rows
    return exchange(*kernels.vary_alike(arrays, (axis,)), options).astype(accumulation)
