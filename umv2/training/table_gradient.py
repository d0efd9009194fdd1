"""Gradients of value tables: one type from the derivative to the optimizer.

A step never asks which representation it holds: accumulation, norm, clip and update are methods of
it. `Dense` has an entry for every row of every table.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from umv2.model.memory.store import ValueStore
from umv2.types import struct


@struct
class Dense:
    """A gradient with an entry for each entry of the tables, None where there are no tables."""

    tables: ValueStore | None

    @classmethod
    def zeros_like(cls, store: ValueStore | None) -> "Dense":
        """Returns the gradient to accumulate others on."""
        return cls(jax.tree.map(jnp.zeros_like, store))

    def add(self, other: "Dense") -> "Dense":
        """Returns the sum of two gradients."""
        return Dense(jax.tree.map(jnp.add, self.tables, other.tables))

    def squares(self) -> list[Float[Array, ""]]:
        """Returns the sum of squared entries of every table."""
        return [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(self.tables)]

    def scale(self, factor: Float[Array, ""]) -> "Dense":
        """Returns the gradient times a number."""
        return Dense(jax.tree.map(lambda leaf: leaf * factor, self.tables))

    def apply(
        self,
        transformation: optax.GradientTransformation,
        state: optax.OptState,
        store: ValueStore | None,
    ) -> tuple[ValueStore | None, optax.OptState]:
        """Returns the tables after a step of an optimizer, and its state."""
        update, state = transformation.update(self.tables, state, store)
        updated: Any = optax.apply_updates(store, update)
        return updated, state


TableGradient = Dense
