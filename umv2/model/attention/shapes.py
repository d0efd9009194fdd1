"""What the choice of an implementation of attention depends on."""

from typing import NamedTuple

import jax.numpy as jnp


class Shapes(NamedTuple):
    """The static facts of a call, for the heads of one device.

    Attributes:
      length: number of positions.
      head_dim: width of a head.
      dtype: of queries, keys and values.
      window: number of positions a query attends to, its own included; 0: all.
      packed: whether positions attend only to their own document.
      platform: what the call is compiled for: "cpu", "gpu" or "tpu".
      compute_capability: of the attached GPU, such as "9.0"; None if it is not known.
    """

    length: int
    head_dim: int
    dtype: jnp.dtype
    window: int
    packed: bool
    platform: str
    compute_capability: str | None
