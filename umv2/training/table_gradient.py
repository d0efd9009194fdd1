"""Gradients of value tables.

Accumulation, norm, scaling and update are methods, so that the training step does not depend on the
representation. Gradients of microbatches are those of a device's own tokens until `reduce`, so that
a step has a single reduction over devices. `Dense` has an entry for every row of every table.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from umv2 import sharding
from umv2.model.memory.store import ValueStore
from umv2.types import struct


@struct
class Dense:
    """A gradient with an entry for each entry of the tables; None if there are no tables."""

    tables: ValueStore | None

    @classmethod
    def zeros_like(cls, store: ValueStore | None) -> "Dense":
        """Returns a zero gradient with respect to these tables, to start an accumulation with."""
        return cls(sharding.zero_gradients(store))

    def add(self, other: "Dense") -> "Dense":
        """Returns the sum of two gradients."""
        return Dense(jax.tree.map(jnp.add, self.tables, other.tables))

    def reduce(self, store: ValueStore | None) -> "Dense":
        """Returns the gradient of all devices' tokens, sharded like the tables."""
        return Dense(sharding.reduce_gradients(self.tables, store))

    def squares(self) -> list[Float[Array, ""]]:
        """Returns the sum of squared entries of every table."""
        return [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(self.tables)]

    def scale(self, factor: Float[Array, ""]) -> "Dense":
        """Returns the gradient times a scalar."""
        return Dense(jax.tree.map(lambda leaf: leaf * factor, self.tables))

    def apply(
        self,
        transformation: optax.GradientTransformation,
        state: optax.OptState,
        store: ValueStore | None,
    ) -> tuple[ValueStore | None, optax.OptState]:
        """Returns the tables and the optimizer state after one update."""
        update, state = transformation.update(self.tables, state, store)
        updated: Any = optax.apply_updates(store, update)
        return updated, state


TableGradient = Dense
