"""Value aggregation over sharded tables: per-device computation and communication.

Every function acts on per-device arrays inside `jax.shard_map`. Each device along the mesh axis
`memory` has its own t tokens and, depending on the layout, of every table

    replicated  all rows and columns; no communication
    columns     some columns of every row (columns.py)
    rows        some rows (rows.py)

Floating-point arrays are communicated in the compute dtype; sums within a device accumulate in
float32 (float64 for float64). JAX differentiates the collectives.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from umv2 import kernels, sharding
from umv2.model.memory.exchange.columns import pool_columns
from umv2.model.memory.exchange.local import Activation, Masters, Options, pool
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
    masters: Masters | None = None,
    axis: str = sharding.MEMORY,
) -> Float[Array, "t e"]:
    """Returns the weighted sums of each token's rows: `value_aggregation` over sharded tables.

    Args:
      layout: how the tables are sharded over `axis`, of size M.
      values: this device's shard of all tables, [l, n, v]: n is 1/M of the N rows of a table
        ("rows"), or v is 1/M of its columns ("columns"). With "rows", device m owns rows
        [m N/M, (m + 1) N/M) of every table.
      rows: the selected rows, numbered table * N + row.
      weights: weight of each selection, for each of the c equal slices of a row.
      pre_values: this device's shard of the pre-value tables, sharded like `values`.
      pre_inputs: input of each token to the pre-scores, with all columns; given with `pre_values`.
      activation: activation of the pre-scores.
      slots: slot of its token's output to which each selection is added, in [0, num_slots).
      num_slots: output slots per token; 1 without `slots`.
      chunk_size: number of tokens whose rows are fetched at once; None: chosen from their size.
      implementation: implementation of the per-device operators.
      dtype: dtype of communicated floating-point arrays.
      masters: the trained tables, if `values` and `pre_values` are copies of them.
      axis: the mesh axis over which the tables are sharded.

    Returns:
      [t, num_slots * D_v], in the accumulation dtype of `value_aggregation`.
    """
    options = Options(axis, activation, num_slots, chunk_size, implementation, dtype)
    arrays = (values, pre_values, rows, weights, pre_inputs, slots, masters)
    if layout == "replicated":
        return pool(*arrays, options)
    floats = (values, weights, pre_values, pre_inputs)
    accumulation = jnp.result_type(jnp.float32, *(x for x in floats if x is not None))
    exchange: Callable[..., Array] = pool_columns if layout == "columns" else pool_rows
    with jax.named_scope("exchange"):
        return exchange(*kernels.match_vma(arrays, (axis,)), options).astype(accumulation)
