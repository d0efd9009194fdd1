"""Types used across modules.

Axis letters in jaxtyping annotations: `b` batch, `t` position or token, `d` hidden, `h` retrieval
head, `r` Tucker rank, `n` keys per side, `k` selected value, `c` core, `v` value width, `p`
pre-value width, `l` memory layer. The side axis (row, column) is a literal 2.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

# Batches are numpy arrays until they are put on devices; type checkers do not distinguish them.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = Array | np.ndarray


@dataclass_transform(frozen_default=True)
def struct[T](cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree whose children are its fields.

    Unlike with `jax.tree_util.register_dataclass`, unflattening does not call `__init__`: JAX
    unflattens trees with shapes, shardings or None instead of arrays, which would fail the run-time
    type checks.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]

    def flatten(instance: T) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(n), getattr(instance, n)) for n in names], None

    def unflatten(_: None, children: Iterable[Any]) -> T:
        instance = object.__new__(made)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which values of `dtype` are summed: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


@struct
class Batch:
    """Packed sequences. `targets[t]` is the token after `inputs[t]`."""

    inputs: Int[AnyArray, "b t"]
    targets: Int[AnyArray, "b t"]
    # Index of the document within its sequence, from 0.
    segment_ids: Int[AnyArray, "b t"]
    # 1 where the target counts in the loss, 0 where it is padding.
    weights: Float[AnyArray, "b t"]
