"""The two slots of a block, and what a layer in one of them answers for.

A block has an FFN (`model.ffn`: dense | moe | none) and, where placed, a memory beside it
(`model.memory.layer`): two independent choices. Nothing outside this package asks which it is. A
layer itself says what it adds to the loss, what to watch of it, what it costs and how it is served.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from umv2.config import LossConfig, ModelConfig
from umv2.config.schema import named, reject
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import Initializer
from umv2.types import struct


@dataclasses.dataclass(frozen=True)
class Observe:
    """What a forward pass reports beside its result; what is not asked for is not computed.

    Attributes:
      health: how often rows and experts are selected, scores, variances, all of the router.
      key_balance: the balance loss of memory keys, a softmax over all of them.
    """

    health: bool = False
    key_balance: bool = False

    @classmethod
    def training(cls, loss: LossConfig) -> "Observe":
        """Returns what a training step needs."""
        return cls(health=True, key_balance=loss.balance_loss > 0)


@struct
class MemoryStats:
    """What one memory layer reports of one batch; a scan over layers stacks it along axis 0.

    Means and variances are over tokens (and widths), in float32. A score is what weights a value,
    summed over cores. None is not asked for, or does not exist in this layer.
    """

    # Of keys (Eq. 18-20).
    balance_loss: Float[Array, "*l"] | None
    output_variance: Float[Array, "*l"] | None
    top_score: Float[Array, "*l"] | None
    last_score: Float[Array, "*l"] | None
    # How often each visible row was selected.
    hits: Int[Array, "*l rows"] | None


@struct
class RouterStats:
    """What one mixture of experts reports of one batch; alike. Scores are probabilities."""

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
    """What one layer holds, computes and reads.

    Attributes:
      projections: weights of linear maps that every token goes through.
      biases: of those maps.
      routing: weights that choose: keys, or a router. Each is multiplied once a token.
      norms: weights of norms, and cores.
      values: entries of its tables, or experts: each token reads `selected` of them.
      selected: entries of `values` that a token reads.
      selection_flops: FLOPs of a token for choosing, beside `routing`.
      num_choices: rows, or experts, that a draw chooses from.
      num_picked: different ones that a draw takes.
      num_draws: draws of a token from the same choices: heads.
      copies: addresses of each choice.
      counters: hits that training counts, one of each row or expert.
      shared_reads: what several tokens of a step choose is read once, whatever the implementation.
      buffer_bytes: of small buffers, all of which every step reads.
      address_bytes: of buffers that a token reads a few entries of.
      stored_bytes: of all buffers.
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
    """A layer for the memory slot. It reads what the FFN reads; its output is added beside it.

    Subclasses declare their parameters in `__init__` and say what they cost; the rest of what
    follows they may leave as it is. Layers of all blocks are stacked: `losses` and `health` see the
    arrays of all, along a first axis.
    """

    def __init__(self, config: ModelConfig, *, init: Initializer):
        """Declares the parameters of one layer."""

    def __call__(
        self, x: Float[Array, "b t d"], *, window: StoreWindow | None, observe: Observe
    ) -> tuple[Float[Array, "b t d"], MemoryStats]:
        """Returns the output for normalised inputs, and what is asked for of the way there.

        Args:
          x: normalised input, the same that the FFN reads.
          window: the part of the value tables that this layer sees; None: it has none.
          observe: what to report.
        """
        raise TypeError(f"{type(self).__name__} must define __call__")

    @classmethod
    def validate(cls, config: ModelConfig) -> None:
        """Raises ConfigError for fields of `model.memory` that this layer cannot follow."""

    @classmethod
    def table_rows(cls, config: ModelConfig) -> int:
        """Returns the rows of the table that each layer owns; 0 where there are none."""
        del config
        return 0

    @classmethod
    def create_store(cls, config: ModelConfig, *, init: Initializer) -> ValueStore | None:
        """Returns the value tables of all layers together, None where there are none."""
        del config, init
        return None

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns what one layer costs."""
        raise TypeError(f"{cls.__name__} must define cost")

    def refresh(self) -> None:
        """Recomputes buffers that follow the parameters, once an optimizer step."""

    def serve(self) -> None:
        """Does in place what inference need not repeat for every token."""

    def losses(self, stats: MemoryStats, config: LossConfig) -> dict[str, Float[Array, ""]]:
        """Returns what the layers add to the loss, by the name of the coefficient that weights it.

        Those whose coefficient is 0 are not computed.
        """
        del stats, config
        return {}

    def health(self) -> dict[str, Float[Array, " l"]]:
        """Returns what to watch of each layer beside its statistics."""
        return {}


def memory_layer(config: ModelConfig) -> type[MemorySlot]:
    """Returns the class of the layer in the memory slot.

    Raises:
      ConfigError: a name that there is not, or that cannot be imported, or is no such class; or
        fields that the layer cannot follow.
    """
    layer = _named(config.memory.layer)
    layer.validate(config)
    return layer


@functools.cache
def _named(name: str) -> type[MemorySlot]:
    from umv2.model.memory.layer import MemoryLayer  # a subclass: it comes after this module

    field, known = "model.memory.layer", {"product_key": MemoryLayer}
    found: Any = named(field, name, known, also=["none"])
    if not (isinstance(found, type) and issubclass(found, MemorySlot)):
        reject(field, name, "must be a subclass of umv2.model.slots.MemorySlot")
    return found
