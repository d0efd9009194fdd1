"""Memory+ with the output gate of its published code: one scalar per token.

Memory(y) = sigmoid(w . y + b) MemoryPlus(y)   (arXiv 2412.09764; `mem_gated` in its code)
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from umv2.config import ModelConfig
from umv2.model import layers
from umv2.model.memory.layer import MemoryLayer
from umv2.model.parameter import Initializer
from umv2.model.slots import LayerCost
from umv2.types import accumulation_dtype


class GatedMemory(MemoryLayer):
    """A memory layer whose output is multiplied by a scalar sigmoid gate per token."""

    def __init__(self, config: ModelConfig, *, init: Initializer):
        super().__init__(config, init=init)
        self.gate = init.normal(
            "gate",
            (config.hidden_size, 1),
            std=layers.linear_std(config.hidden_size),
            axes=("hidden", None),
            group="matrices",
        )
        self.gate_bias = init.constant(1, 0.0)

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns the cost of one layer."""
        cost = super().cost(config)
        return dataclasses.replace(
            cost, projections=cost.projections + config.hidden_size, biases=cost.biases + 1
        )

    def project(
        self, x: Float[Array, "b t d"], pooled: Float[Array, "b t e"]
    ) -> Float[Array, "b t d"]:
        """Projects the pooled values to the gated output."""
        gate = layers.linear(x, self.gate[...], self.gate_bias[...])
        # In float32, since the gradient of the gate is a sum over columns.
        dtype = accumulation_dtype(x.dtype)
        output = super().project(x, pooled)
        return (output.astype(dtype) * jax.nn.sigmoid(gate).astype(dtype)).astype(output.dtype)
