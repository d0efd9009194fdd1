"""Values that cross module boundaries: batches, what layers report, what a step reports.

Axis letters in jaxtyping annotations: `b` batch, `t` position or token, `d` hidden, `h` retrieval
head, `r` Tucker rank, `n` keys per side, `k` selected value, `c` core, `v` value width, `p`
pre-value width, `l` memory layer. Sides (row, column) are a literal axis of size 2.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

# Batches are numpy arrays until they reach the devices; type checkers need not tell them apart.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences. `targets[t]` is the token after `inputs[t]`."""

    inputs: Int[AnyArray, "b t"]
    targets: Int[AnyArray, "b t"]
    # Number of the document within its sequence, from 0.
    segment_ids: Int[AnyArray, "b t"]
    # 1 where the target counts in the loss, 0 where it is padding.
    weights: Float[AnyArray, "b t"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStats:
    """What one sparse layer reports of one batch; a scan over layers stacks it along axis 0.

    Means and standard deviations are over tokens (and widths). All are float32 scalars but
    `row_hits`, the number of times each visible row was selected.
    """

    balance_loss: Float[Array, "*l"]
    output_variance: Float[Array, "*l"]
    top_score: Float[Array, "*l"]
    last_score: Float[Array, "*l"]
    row_hits: Int[Array, "*l rows"]
