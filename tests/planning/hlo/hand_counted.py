"""Compiles small programs whose work is known for argv[1], such as v5e:2x2; prints JSON.

Each program's traffic and FLOPs follow from its shapes: its arrays exceed the memory of a core, and
nothing can be left out. `test_compiled.py` runs this in a separate process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from umv2.planning import topology

NUM_ROWS, NUM_UPDATES = 2**20, 2**15
WIDE, LAYERS = 8192, 6  # both sides of square matrices, and their number in a stack
F32, BF16 = jnp.float32, jnp.bfloat16


class Case(NamedTuple):
    """A function of arrays of these shapes, and what one call reads and writes."""

    function: Callable[..., Any]
    shapes: list[tuple[tuple[int, ...], Any]]
    bytes: int
    flops: int = 0
    donated: tuple[int, ...] = ()


def _sum_of_layers(layers: Any) -> Any:
    return jax.lax.scan(lambda total, layer: (total + layer.sum(), None), 0.0, layers)[0]


_IDS = ((NUM_UPDATES,), jnp.int32)
_TABLE = ((NUM_ROWS, 128), F32)
_ID_BYTES, _ROWS_BYTES = NUM_UPDATES * 4, NUM_UPDATES * 128 * 4

CASES = {
    "take": Case(
        lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
        [_TABLE, _IDS],
        2 * _ROWS_BYTES + _ID_BYTES,
    ),
    "add to rows": Case(
        lambda table, ids, rows: table.at[ids].add(rows, mode="promise_in_bounds"),
        [_TABLE, _IDS, ((NUM_UPDATES, 128), F32)],
        3 * _ROWS_BYTES + _ID_BYTES,
        donated=(0,),
    ),
    "sum of layers": Case(_sum_of_layers, [((LAYERS, WIDE, WIDE), F32)], LAYERS * WIDE * WIDE * 4),
    "product": Case(
        lambda left, right: jnp.dot(left, right, preferred_element_type=F32).astype(BF16),
        [((2 * WIDE, WIDE), BF16), ((WIDE, WIDE), BF16)],
        5 * WIDE * WIDE * 2,
        flops=2 * 2 * WIDE**3,
    ),
}


def _compiled(case: Case, device: Any) -> str | None:
    place = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in case.shapes]
    return jax.jit(case.function, donate_argnums=case.donated).lower(*arrays).compile().as_text()


if __name__ == "__main__":
    (chip, *_) = topology.parse(sys.argv[1]).devices()
    sys.stdout.write(json.dumps({name: _compiled(case, chip) for name, case in CASES.items()}))
