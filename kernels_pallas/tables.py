"""Helpers of the operators on tables: implementation names, limits, chunks of tokens."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas import arguments
from kernels_pallas.array_types import Float, UInt32
from kernels_pallas.common import check, chunk_tokens, padded

Implementation = Literal["xla", "pallas_tpu", "pallas_sparsecore", "pallas_gpu"]

# If no implementation is named, the first of these that supports the call runs. The rule: the one
# whose compiled program moves fewer bytes of HBM in forward and backward pass, unless a device was
# measured and says otherwise. None was, yet. Read from whole training steps, in TB per device:
#
#                                          value aggregation      product_key_top_k
#                                          "xla"    "pallas"      "xla"    "pallas"
#     227M/1.2B on v5p:2x2x1                17.2         4.2        4.9         0.2
#     1B/7B on h200:8                       33.5        21.4        7.2         0.6
AUTOMATIC = {"cpu": ("xla",), "gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")}

LANES = 128  # of a TPU's registers

MAX_NUM_VALUES = 2**31 - 1  # ids, and the bounds XLA compares them with, are int32

# Bytes of rows that one chunk of tokens fetches if the caller does not set a chunk size.
# Measured on CPU: forward + backward in milliseconds, best of 5 interleaved runs on 2 shared cores,
# float32, K = 32, 129,600 rows:
#
#     T, D_v = D_p    chunks of 32     64    128    256   1024 tokens   no chunks
#     2048, 192                174    161    176    156    181             360
#     2048, 384                385    375    372    404    488            1020
#     8192, 192                401    361    367    421    414             826
#
# Chunks of 3 to 13 MB of rows are equally fast within the noise; 8 MiB is in between.
_CPU_CHUNK_BYTES = 8 * 2**20
# On an accelerator every operation of a chunk costs a launch, so chunks are as large as memory
# comfortably allows. Estimated, not measured.
_ACCELERATOR_CHUNK_BYTES = 256 * 2**20


def default_chunk(num_selected: int, row_dim: int, dtype: Any, platform: str) -> int:
    """Returns how many tokens "xla" processes at once if neither set by the caller nor measured.

    Args:
        num_selected: rows that a token selects.
        row_dim: total row width of all tables.
        dtype: of accumulation.
        platform: what the call is compiled for.
    """
    chunk_bytes = _CPU_CHUNK_BYTES if platform == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return chunk_tokens(num_selected * row_dim * dtype.itemsize, chunk_bytes)


def packed_width(dim: int, lanes: int = LANES) -> int:
    """Returns the words of a packed row: half its columns, padded to full registers."""
    return padded(dim, 2 * lanes) // 2


def pack_rows(
    table: Float[Array, "num_values dim"], lanes: int = LANES
) -> UInt32[Array, "num_values words"]:
    """Packs each row of a bfloat16 table into 32-bit words.

    The first half of the columns, padded to multiples of 128, is in the lower half-words. On a TPU
    two bfloat16 rows share each word of memory, so a single one cannot be fetched; a packed one
    can.
    """
    width = packed_width(table.shape[1], lanes)
    columns = jnp.pad(table, ((0, 0), (0, 2 * width - table.shape[1])))

    def in_upper(part: Array) -> Array:
        # By way of float32: XLA then does all in one loop. In uint16, it stores intermediates.
        return lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32)

    return in_upper(columns[:, :width]) >> 16 | in_upper(columns[:, width:])


def check_packed(name: str, packed: Array | None, table: Array | None) -> None:
    """Checks that packed rows are those of a bfloat16 table.

    Raises:
        ValueError: they cannot be.
    """
    if packed is None:
        return
    check(table is not None and table.dtype == jnp.bfloat16, name, "given", "of a bfloat16 table")
    assert table is not None
    expected = (table.shape[0], packed_width(table.shape[1]))
    check(packed.shape == expected, f"{name}.shape", packed.shape, f"{expected}, as by pack_rows")


def fetch_rows(table: Array, indices: Array, dtype: Any) -> Array:
    """Gathers the selected rows of a table, [T, K, D], and casts them to a dtype."""
    # promise_in_bounds avoids a masked copy of the rows ("fill") and clamping of the ids ("clip").
    rows = table.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.astype(dtype)


def check_num_values(name: str, num_values: int, indices: Array) -> None:
    """Checks that a table is not empty if rows are selected, and that int32 ids can address it.

    Raises:
        ValueError: one of these does not hold.
    """
    check(num_values <= MAX_NUM_VALUES, f"{name} rows", num_values, f"at most {MAX_NUM_VALUES}")
    rule = f"at least 1, because indices of shape {indices.shape} select rows"
    check(num_values > 0 or indices.size == 0, f"{name} rows", num_values, rule)


def checked_capacity(max_rows: Any, indices: Array, num_values: int) -> int:
    """Returns the capacity of a row-sparse gradient; by default, it fits any set of selections.

    Raises:
        ValueError: `max_rows` is negative or not an integer.
    """
    if max_rows is None:
        max_rows = min(indices.size, num_values)
    max_rows = arguments.as_integer("max_rows", max_rows)
    check(max_rows >= 0, "max_rows", max_rows, "at least 0")
    return max_rows
