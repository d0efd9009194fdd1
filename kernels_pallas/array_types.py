"""Shapes and dtypes in annotations, as jaxtyping writes them: `Float[Array, "t d"]`.

Type checkers and the tests read them. jaxtyping itself is optional: without it the same annotation
is the plain array type.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

__all__ = ["AnyArray", "Array", "Float", "Int32", "Integer"]

try:
    from jaxtyping import Float, Int32, Integer
except ImportError:
    if not TYPE_CHECKING:

        class _Unchecked:
            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Float = Int32 = Integer = _Unchecked

# What the operators take; type checkers need not tell them apart. Backends get arrays of JAX.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = Array | np.ndarray
