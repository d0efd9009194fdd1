"""How many tokens a step of the TPU kernels takes, and the VMEM that it needs for them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kernels_pallas import tuned
from kernels_pallas.common import check, padded
from kernels_pallas.value_aggregation.call import AggregationCall

SUBLANES = 8
# The rows of a block are in flight together, and 12 MiB of them cover the latency of the memory
# several times over. Reasoned, not measured.
_RING_BYTES = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens a grid step: a power of two from 8 to 128, the lanes of a register."""

    tokens: int


def heuristic(call: AggregationCall, lanes: int) -> Blocks:
    """As many tokens as have their rows in the ring of buffers."""
    tokens = _RING_BYTES // _token_bytes(call, lanes)
    tokens = max(SUBLANES, min(lanes, tokens))
    return Blocks(1 << (tokens.bit_length() - 1))


def chosen(pass_name: tuned.Pass, call: AggregationCall, lanes: int) -> Blocks:
    """The blocks of a call: those that were measured for it, or the heuristic's."""
    blocks = heuristic(call, lanes)
    dtype = call.values.dtype
    key = tuned.Key.of("value_aggregation", "pallas_tpu/tokens", pass_name, call.sizes, dtype)
    blocks = tuned.lookup(blocks, key, platform="tpu") or blocks
    fits = blocks.tokens % SUBLANES == 0 and lanes % blocks.tokens == 0
    check(fits, "Blocks.tokens", blocks.tokens, f"a multiple of {SUBLANES} that divides {lanes}")
    return blocks


def vmem_bytes(blocks: Blocks, call: AggregationCall, lanes: int) -> int:
    """The ring, two buffers of every block of the backward kernel, and 4 MiB for temporaries."""
    _, num_selected, num_cores = call.scores.shape
    widths = [table.shape[1] for table in call.tables.values()]
    row_blocks = 4 * blocks.tokens * sum(padded(width, lanes) for width in widths)
    selection_blocks = 4 * padded(num_selected, SUBLANES) * lanes * (3 * num_cores + 2)
    ring = blocks.tokens * _token_bytes(call, lanes)
    return ring + 2 * (2 * row_blocks + selection_blocks) + 4 * 2**20


def _token_bytes(call: AggregationCall, lanes: int) -> int:
    """VMEM that the rows of a token take: sublanes and lanes padded to whole tiles of words."""
    widths = [table.shape[1] for table in call.tables.values()]
    num_selected = call.scores.shape[1]
    return 4 * padded(num_selected, SUBLANES) * sum(padded(width, lanes) for width in widths)


def rows_per_copy(table: Any) -> int:
    """bfloat16 rows share their words in pairs."""
    return 2 if table.dtype == jnp.bfloat16 else 1
