"""Shared by the tests of model import and export."""

from typing import Any

import jax
import numpy as np


def assert_same_bits(left: Any, right: Any) -> None:
    """Asserts that two trees have the same names, dtypes, shapes and bits."""
    lefts, rights = (jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right))
    for (left_path, a), (right_path, b) in zip(lefts, rights, strict=True):
        assert (left_path, a.dtype, a.shape) == (right_path, b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
