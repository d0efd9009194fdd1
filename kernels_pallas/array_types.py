"""Shape and dtype annotations in jaxtyping syntax: `Float[Array, "t d"]`.

Type checkers and the tests use them. jaxtyping itself is optional: without it, an annotation
evaluates to the plain array type.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

__all__ = ["AbstractArray", "AnyArray", "Array", "Float", "Int32", "Integer", "UInt32"]

try:
    from jaxtyping import Float, Int32, Integer, UInt32
except ImportError:
    if not TYPE_CHECKING:

        class _Unchecked:
            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Float = Int32 = Integer = UInt32 = _Unchecked

# The public operators accept an AnyArray, which is Any to type checkers. Backends get JAX arrays,
# or an AbstractArray where only shapes and dtypes matter.
if TYPE_CHECKING:
    AnyArray = Any
    AbstractArray = Array
else:
    AnyArray = Array | np.ndarray
    AbstractArray = Array | jax.ShapeDtypeStruct
