"""Row products on a TPU: value aggregation's backward kernel, without pre-values."""

import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float
from kernels_pallas.row_products.call import RowProductsCall
from kernels_pallas.value_aggregation.tpu import backend as pallas_tpu


def unsupported_reason(call: RowProductsCall, platform: str) -> str | None:
    """Returns why value aggregation does not support the table ("values" there), or None."""
    return pallas_tpu.unsupported_reason(call.aggregation(), platform)


def forward(call: RowProductsCall) -> Float[Array, "num_tokens num_selected"]:
    """Computes the output of `row_products`: the scores' gradient, which no score affects."""
    aggregation = call.aggregation(jnp.zeros_like(call.indices, jnp.float32))
    return pallas_tpu.token_gradients(aggregation, call.inputs).scores[:, :, 0]
