"""The two slots of a block, and the interface of the layers in them.

A block has an FFN (`model.ffn`: dense | moe | none) and, in some blocks, a memory layer parallel to
it (`model.memory.layer`): two independent choices. No code outside this package depends on which
layer is in a slot: each layer defines its own auxiliary losses, health metrics, cost and inference
layout.
"""

import dataclasses
import functools
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from umv2.config import LossConfig, ModelConfig
from umv2.config.schema import reject, require, resolve_name
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import Initializer
from umv2.types import struct


@dataclasses.dataclass(frozen=True)
class Observe:
    """The statistics to compute in a forward pass; those not requested are not computed.

    Attributes:
      health: selection counts of rows and experts, scores, variances, all router statistics.
      key_balance: the balance loss of memory keys, which takes a softmax over all keys.
    """

    health: bool = False
    key_balance: bool = False

    @classmethod
    def training(cls, loss: LossConfig) -> "Observe":
        """Returns the statistics that a training step needs."""
        return cls(health=True, key_balance=loss.balance_loss > 0)


@struct
class MemoryStats:
    """Statistics of one memory layer on one batch; a scan over layers stacks them on axis 0.

    Means and variances are over tokens (and features), in float32. A score is the weight of a
    value, summed over cores. A field is None if it was not requested or this layer does not have
    it.
    """

    # Balance loss of the keys (Eq. 18-20).
    balance_loss: Float[Array, "*l"] | None
    output_variance: Float[Array, "*l"] | None
    top_score: Float[Array, "*l"] | None
    last_score: Float[Array, "*l"] | None
    # How often each visible row was selected.
    hits: Int[Array, "*l rows"] | None


@struct
class RouterStats:
    """The same for one mixture of experts; its scores are router probabilities."""

    # E sum_i f_i p_i (OLMoE, arXiv 2409.02060, equation 4).
    balance_loss: Float[Array, "*l"]
    # Mean squared log-partition (equation 5).
    z_loss: Float[Array, "*l"]
    # Mean probability of each expert.
    probability: Float[Array, "*l experts"]
    output_variance: Float[Array, "*l"]
    top_score: Float[Array, "*l"]
    last_score: Float[Array, "*l"]
    # How often each expert was selected.
    hits: Int[Array, "*l choices"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Parameters, FLOPs and memory traffic of one layer.

    Attributes:
      projections: number of weights in linear maps that are applied to every token.
      biases: number of entries in the biases of those maps.
      routing: number of weights in the keys or the router, each multiplied once per token.
      norms: number of entries in norm weights and Tucker cores.
      values: number of entries in the value tables or the experts.
      selected: number of entries of `values` that one token reads.
      selection_flops: FLOPs per token for selection, in addition to those of `routing`.
      num_choices: number of rows or experts that one head selects from.
      num_picked: number of distinct rows or experts that one head selects.
      num_draws: number of heads that select independently from the same choices.
      copies: number of addresses of each choice.
      counters: number of selection counters in training, one per row or expert.
      shared_reads: whether every implementation reads a row or expert only once per step, however
        many tokens select it.
      buffer_bytes: bytes of the small buffers, which every step reads completely.
      address_bytes: bytes that one token reads of the large buffers.
      stored_bytes: bytes of all buffers.
    """

    projections: int = 0
    biases: int = 0
    routing: int = 0
    norms: int = 0
    values: int = 0
    selected: int = 0
    selection_flops: int = 0
    num_choices: int = 0
    num_picked: int = 0
    num_draws: int = 1
    copies: int = 1
    counters: int = 0
    shared_reads: bool = False
    buffer_bytes: int = 0
    address_bytes: int = 0
    stored_bytes: int = 0


class MemorySlot(nnx.Module):
    """Base class of layers in the memory slot, which are parallel to the FFN and read its input.

    Subclasses must declare their parameters in `__init__` and define `__call__` and `cost`; the
    other methods have defaults. The layers of all blocks are stacked: in `losses` and `health`,
    every array has a leading layer axis.

    Attributes:
      reads_copy: whether the layer gives gradients to `StoreWindow.masters`. In training, its
        window is then of a copy of all tables (`store.read_copy`), which gets none; otherwise the
        window is of the tables themselves.
    """

    reads_copy: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, *, init: Initializer):
        """Declares the parameters of one layer."""

    def __call__(
        self, x: Float[Array, "b t d"], *, window: StoreWindow | None, observe: Observe
    ) -> tuple[Float[Array, "b t d"], MemoryStats]:
        """Returns the layer's output and the requested statistics.

        Args:
          x: normalised input, the same as the FFN's.
          window: the rows of the value tables that this layer can read; None if it has none.
          observe: the statistics to compute.
        """
        raise TypeError(f"{type(self).__name__} must define __call__")

    @classmethod
    def validate(cls, config: ModelConfig) -> None:
        """Raises ConfigError for values of `model.memory` that this layer does not support."""

    @classmethod
    def table_rows(cls, config: ModelConfig) -> int:
        """Returns the number of table rows that each layer owns; 0 if it has no table."""
        del config
        return 0

    @classmethod
    def create_store(cls, config: ModelConfig, *, init: Initializer) -> ValueStore | None:
        """Returns the value tables of all layers, or None if they have none."""
        del config, init
        return None

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns the cost of one layer."""
        raise TypeError(f"{cls.__name__} must define cost")

    def refresh(self) -> None:
        """Recomputes the buffers derived from parameters; called after each optimizer step."""

    def serve(self) -> None:
        """Prepares the layer for inference, in place: does once what is the same for all tokens."""

    def losses(self, stats: MemoryStats, config: LossConfig) -> dict[str, Float[Array, ""]]:
        """Returns the weighted auxiliary losses, by the name of their coefficient.

        Losses with coefficient 0 are not computed.
        """
        del stats, config
        return {}

    def health(self) -> dict[str, Float[Array, " l"]]:
        """Returns the health metrics of each layer that are not in its statistics."""
        return {}


def memory_layer(config: ModelConfig) -> type[MemorySlot]:
    """Returns the class of the layer in the memory slot.

    Raises:
      ConfigError: the name is unknown, cannot be imported or is not a `MemorySlot`, or the layer
        does not support the configuration.
    """
    layer = _layer_class(config.memory.layer)
    require(
        layer.reads_copy or config.memory.read_dtype == "float32",
        "model.memory.read_dtype",
        config.memory.read_dtype,
        f"must be 'float32' with model.memory.layer={config.memory.layer!r}, which does not read a"
        " copy of its tables",
    )
    layer.validate(config)
    return layer


@functools.cache
def _layer_class(name: str) -> type[MemorySlot]:
    from umv2.model.memory.layer import MemoryLayer  # a subclass, so its module imports this one

    field, known = "model.memory.layer", {"product_key": MemoryLayer}
    layer: Any = resolve_name(field, name, known, also=["none"])
    if not (isinstance(layer, type) and issubclass(layer, MemorySlot)):
        reject(field, name, "must be a subclass of umv2.model.slots.MemorySlot")
    return layer
