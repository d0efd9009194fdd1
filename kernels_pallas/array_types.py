"""Shapes and dtypes in annotations, as jaxtyping writes them: `Float[Array, "t d"]`.

Type checkers and the tests read them. jaxtyping itself is optional: without it the same annotation
is the plain array type.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

__all__ = ["AbstractArray", "AnyArray", "Array", "Float", "Int32", "Integer"]

try:
    from jaxtyping import Float, Int32, Integer
except ImportError:
    if not TYPE_CHECKING:

        class _Unchecked:
            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Float = Int32 = Integer = _Unchecked

# AnyArray is what the operators take, whose parts type checkers need not tell apart. Backends get
# arrays of JAX, or where nothing but shapes and dtypes matters an AbstractArray.
if TYPE_CHECKING:
    AnyArray = Any
    AbstractArray = Array
else:
    AnyArray = Array | np.ndarray
    AbstractArray = Array | jax.ShapeDtypeStruct
