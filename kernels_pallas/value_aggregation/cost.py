"""What a kernel of value aggregation costs; how many bytes it moves, each backend counts itself."""

from jax.experimental import pallas as pl

from kernels_pallas.tuned import Pass
from kernels_pallas.value_aggregation.call import AggregationCall


def cost_estimate(pass_name: Pass, call: AggregationCall, bytes_accessed: int) -> pl.CostEstimate:
    """Counts two FLOPs for each column that a selection multiplies and adds.

    The forward pass does so with the columns of both rows. The backward pass, which excludes the
    gradients of the tables, does so again with those of the pre-values, for the gradient of the
    pre-input. Per selection and not per column, and not counted: scores, gates and their slopes.

    Args:
        pass_name: forward or backward.
        call: the call of the kernel.
        bytes_accessed: bytes that the kernel reads from and writes to device memory.
    """
    sizes = call.sizes
    selections = sizes["num_tokens"] * sizes["num_selected"]
    pre_value_dim = sizes["pre_value_dim"] * (1 if pass_name == "forward" else 2)
    has_gates = sizes["pre_value_dim"] > 0 and call.activation in ("gelu", "silu")
    return pl.CostEstimate(
        flops=2 * selections * (sizes["value_dim"] + pre_value_dim),
        transcendentals=selections if has_gates else 0,
        bytes_accessed=bytes_accessed,
    )
