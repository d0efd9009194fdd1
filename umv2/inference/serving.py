"""A model as decoding reads it fastest."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from umv2 import sharding
from umv2.model.memory.layer import MemoryLayer
from umv2.model.memory.store import ValueStore
from umv2.model.transformer import Stores, Transformer, layer_of

# Small, and used in float32 whatever the compute dtype.
_KEPT = re.compile(r"norm|bias|\b(router|cores|core_u|core_v)\b")


@jax.tree_util.register_pytree_node_class
class ServedModel:
    """A model and its value tables, laid out for inference; a pytree of one node.

    Every layer has arrays of its own, so that no program copies one out of a stack; matrices and
    tables are in the compute dtype, so that none is converted at every step; memory keys are
    normalised already, and on one device experts hold gate and up as one matrix. Modules are put
    together where a program is traced (`parts`), and not at every call.
    """

    def __init__(self, arrays: tuple[Any, ...], structure: "_Structure"):
        self._arrays, self._structure = arrays, structure

    def parts(self) -> tuple[Transformer, Stores]:
        """Returns the model and its tables: one store of each memory layer where none is shared."""
        model, store = jax.tree.unflatten(self._structure.tree, self._arrays)
        return model, store

    def tree_flatten(self) -> tuple[tuple[Any, ...], "_Structure"]:
        """Tells JAX the arrays."""
        return self._arrays, self._structure

    @classmethod
    def tree_unflatten(cls, structure: "_Structure", arrays: Any) -> "ServedModel":
        """Puts other leaves in place of the arrays."""
        return cls(tuple(arrays), structure)


class _Structure:
    """What belongs to what, compared by identity first: programs look it up at every call."""

    def __init__(self, tree: Any):
        self.tree, self._hash = tree, hash(tree)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)

    def __hash__(self) -> int:
        return self._hash


def served_dtype(name: str, leaf: Any, compute_dtype: Any) -> jnp.dtype:
    """Returns what an array, named by its path, is held in for inference."""
    if _KEPT.search(name) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.dtype
    return jnp.dtype(compute_dtype)


def serve(model: Transformer, store: ValueStore | None) -> ServedModel:
    """Lays out a trained model for inference; the arrays given stay as they are.

    Divided over a mesh as they are, if one is in use. Trace it (jit, eval_shape); it is not light.
    """
    config = model.config
    dtype = jnp.dtype(config.compute_dtype)
    model = jax.tree.map(lambda leaf: leaf, model)  # what follows changes it in place
    model.unstack()
    for layer in model.sparse if config.placements else ():
        if isinstance(layer, MemoryLayer):
            layer.normalise_keys()
        elif not sharding.on_mesh():
            layer.join_gate_and_up()

    def narrowed(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.astype(served_dtype(name, leaf, dtype))

    model, store = jax.tree_util.tree_map_with_path(narrowed, (model, store))
    stores: Stores = store
    if store is not None and config.memory.sharing == "none":
        stores = [layer_of(store, i) for i in range(len(config.placements))]
    arrays, tree = jax.tree.flatten((model, stores))
    return ServedModel(tuple(arrays), _Structure(tree))
