"""Row products in plain XLA operations, for every platform."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernels_pallas.array_types import Array, Float
from kernels_pallas.common import scan_chunks
from kernels_pallas.row_products.call import RowProductsCall
from kernels_pallas.tables import fetch_rows

# DEFAULT precision would round float32 operands to bfloat16 on TPU and to TF32 on GPU.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def unsupported_reason(call: RowProductsCall, platform: str) -> str | None:
    """Returns None: this implementation supports every call."""
    del call, platform
    return None


def forward(call: RowProductsCall) -> Float[Array, "num_tokens num_selected"]:
    """Computes the output of `row_products`, `chunk_size` tokens at a time."""

    def multiply(_: None, chunk: Any) -> tuple[None, Array]:
        indices, inputs = chunk
        rows = fetch_rows(call.table, indices, call.dtype)
        return None, _einsum("tkd,td->tk", rows, inputs.astype(call.dtype))

    return scan_chunks(multiply, None, (call.indices, call.inputs), call.chunk_size)[1]
