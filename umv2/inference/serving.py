"""A model in the layout that decodes fastest."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umv2.config import ModelConfig
from umv2.model.memory.store import TABLE, Stores
from umv2.model.parameter import Declaration, Parameter
from umv2.model.stack import layer_of
from umv2.model.transformer import Transformer
from umv2.model.weights import Weights


@jax.tree_util.register_pytree_node_class
class ServedModel:
    """A model and its value tables, laid out for inference; a pytree with a single node.

    Layers are unstacked, so that no program slices them out of a stack. Matrices and tables are in
    the compute dtype, so that no step converts them. Work that does not depend on the token is done
    once (`serve`). Modules are rebuilt when a program is traced (`parts`), not at every call.
    """

    def __init__(self, arrays: tuple[Any, ...], structure: "_Structure"):
        self._arrays, self._structure = arrays, structure

    def parts(self) -> tuple[Transformer, Stores]:
        """Returns the model and its tables: a list with one store per memory layer if unshared."""
        model, store = jax.tree.unflatten(self._structure.tree, self._arrays)
        return model, store

    def tree_flatten(self) -> tuple[tuple[Any, ...], "_Structure"]:
        """Returns the arrays as leaves, and the structure as static data."""
        return self._arrays, self._structure

    @classmethod
    def tree_unflatten(cls, structure: "_Structure", arrays: Any) -> "ServedModel":
        """Rebuilds the model from leaves."""
        return cls(tuple(arrays), structure)


class _Structure:
    """A treedef with a cached hash, compared by identity first: `jit` compares it at every call."""

    def __init__(self, tree: Any):
        self.tree, self._hash = tree, hash(tree)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)

    def __hash__(self) -> int:
        return self._hash


def served_dtype(declared: Declaration, dtype: DTypeLike, compute_dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype for inference of an array with this declaration and dtype."""
    if declared.served == "float32" or not jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(dtype)
    return jnp.dtype(compute_dtype)


def serve(config: ModelConfig, weights: Weights) -> ServedModel:
    """Lays out a trained model for inference; does not modify or donate the given arrays.

    Keeps the sharding of the arrays. Call it under `jax.jit` or `jax.eval_shape`: eagerly, it is
    slow.
    """
    model = weights.model(config)
    model.serve()
    dtype = jnp.dtype(config.compute_dtype)

    def narrowed(variable: Any) -> Any:
        if not isinstance(variable, Parameter):
            return variable  # buffers
        declared = variable.get_metadata()["declaration"]
        return jax.tree.map(
            lambda leaf: leaf.astype(served_dtype(declared, leaf.dtype, dtype)), variable
        )

    model = jax.tree.map(narrowed, model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    store: Stores = jax.tree.map(
        lambda leaf: leaf.astype(served_dtype(TABLE, leaf.dtype, dtype)), weights.store
    )
    if store is not None and config.memory.sharing == "none":
        store = [layer_of(store, i) for i in range(len(config.placements))]
    arrays, tree = jax.tree.flatten((model, store))
    return ServedModel(tuple(arrays), _Structure(tree))
