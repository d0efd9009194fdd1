"""How the TPU kernels read tables, the number of tokens per grid step, and the VMEM they need."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tuned
from kernels_pallas.common import check, padded, tiled_bytes
from kernels_pallas.tables import packed_width
from kernels_pallas.value_aggregation.call import AggregationCall

SUBLANES = 8
# The rows of a block are in flight at the same time; 12 MiB cover the memory latency several times
# over. Estimated, not measured.
_RING_BYTES = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens per grid step: a power of two from 8 to 128, the lanes of a register."""

    tokens: int


def heuristic(call: AggregationCall, lanes: int) -> Blocks:
    """As many tokens as fit their rows in the ring of buffers."""
    tokens = _RING_BYTES // _token_bytes(call, lanes)
    tokens = max(SUBLANES, min(lanes, tokens))
    return Blocks(1 << (tokens.bit_length() - 1))


def choose_blocks(pass_name: tuned.Pass, call: AggregationCall, lanes: int) -> Blocks:
    """The blocks of a call: the tuned ones if there are any, else those of `heuristic`."""
    blocks = heuristic(call, lanes)
    dtype = call.values.dtype
    key = tuned.Key.of("value_aggregation", "pallas_tpu/tokens", pass_name, call.sizes, dtype)
    blocks = tuned.lookup(blocks, key, platform="tpu") or blocks
    fits = blocks.tokens % SUBLANES == 0 and lanes % blocks.tokens == 0
    check(fits, "Blocks.tokens", blocks.tokens, f"a multiple of {SUBLANES} that divides {lanes}")
    return blocks


def vmem_bytes(blocks: Blocks, call: AggregationCall, lanes: int) -> int:
    """The ring, two buffers for every block of the backward kernel, and 4 MiB for temporaries."""
    _, num_selected, num_cores = call.scores.shape
    widths = [table.shape[1] for table in call.tables.values()]
    row_blocks = 4 * blocks.tokens * sum(padded(width, lanes) for width in widths)
    selection_blocks = 4 * padded(num_selected, SUBLANES) * lanes * (3 * num_cores + 2)
    ring = blocks.tokens * _token_bytes(call, lanes)
    return ring + 2 * (2 * row_blocks + selection_blocks) + 4 * 2**20


def _token_bytes(call: AggregationCall, lanes: int) -> int:
    """VMEM for the rows of a token, with sublanes and lanes padded to full 32-bit tiles."""
    words = 0
    for name, table in call.tables.items():
        width = packed_width if is_packed(name, call) else padded
        words += width(table.shape[1], lanes)
    return 4 * padded(call.scores.shape[1], SUBLANES) * words


def rows_per_copy(table: Any) -> int:
    """Rows per DMA: two for bfloat16, because a pair of rows shares 32-bit words."""
    return 2 if table.dtype == jnp.bfloat16 else 1


def is_packed(name: str, call: AggregationCall) -> bool:
    """Whether a call reads a packed copy of a table, because that moves fewer bytes in total.

    A packed row has half the bytes of a pair if it is wider than a register, but unless a packed
    copy was given, packing reads and writes the table once.
    """
    table = call.tables[name]
    if table.dtype != jnp.bfloat16 or name in call.packed:
        return name in call.packed
    num_rows, dim = table.shape
    width = packed_width(table.shape[1])
    pair = jax.ShapeDtypeStruct((2, dim), table.dtype)
    row, packed = (jax.ShapeDtypeStruct((rows, width), jnp.uint32) for rows in (1, num_rows))
    saved = tiled_bytes(pair) - tiled_bytes(row)
    return call.indices.size * saved > tiled_bytes(table, packed)
