"""Parameters, each declared once: how it is initialised, sharded, optimised and served.

A module declares an array where it creates it:

    self.query = init.normal(
        "query", (hidden, width), std=std, axes=("hidden", None), group="matrices"
    )

Sharding, optimizer groups, inspection, accounting and inference dtypes are all derived from this
declaration (`declarations`); there is no second table of names. An array has the same name
everywhere, its path: "params/blocks/attention/query", "buffers/memory/shuffle", "store/values".
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from umv2.model import random

# Logical axes of parameters; `umv2.sharding.rules` maps them to mesh axes.
Axis = Literal[
    "vocabulary",
    "hidden",
    "heads",
    "ffn",
    "key",
    "expert_hidden",
    "expert",
    "table",
    "row",
    "column",
]
# Optimizer groups. Each has its own weight decay (`optimizer.weight_decay`), and "values" also its
# own learning rate.
Group = Literal["embeddings", "norms", "matrices", "keys", "values"]
# Dtype at inference: the compute dtype of the model, or always float32.
Served = Literal["compute", "float32"]

# A standard deviation, or a function that computes it when values are drawn, if that is slow.
Std = float | Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """Declaration of one array.

    Attributes:
      axes: logical axis of each dimension; None for a dimension that is never sharded.
      group: optimizer group; None for buffers, which have no gradient.
      served: dtype at inference.
    """

    axes: tuple[Axis | None, ...]
    group: Group | None
    served: Served

    def __post_init__(self) -> None:
        for axis in self.axes:
            if axis is not None and axis not in get_args(Axis):
                raise ValueError(f"axis {axis!r}: must be one of {', '.join(get_args(Axis))}")
        if self.group is not None and self.group not in get_args(Group):
            raise ValueError(f"group {self.group!r}: must be one of {', '.join(get_args(Group))}")
        if self.served not in get_args(Served):
            raise ValueError(
                f"served {self.served!r}: must be one of {', '.join(get_args(Served))}"
            )

    def stacked(self, rank: int) -> "Declaration":
        """Returns the declaration with unsharded leading axes added, up to the given rank."""
        return dataclasses.replace(self, axes=(None,) * (rank - len(self.axes)) + self.axes)


class Parameter(nnx.Param):
    """A trainable array with its declaration.

    Raises:
      ValueError: the number of axes is not the rank of the array, or an axis, group or dtype is
        unknown.
    """

    def __init__(
        self,
        value: Any,
        *,
        axes: tuple[Axis | None, ...],
        group: Group,
        served: Served = "compute",
    ):
        declaration = Declaration(axes, group, served)
        if len(axes) != len(value.shape):
            raise ValueError(f"axes {axes}: must be one for each dimension of {value.shape}")
        super().__init__(value, declaration=declaration)


class Buffer(nnx.Variable):
    """Saved state without a gradient; replicated, and served in its own dtype."""


@dataclasses.dataclass(frozen=True)
class Initializer:
    """Creates the parameters of a module, concrete or abstract.

    Attributes:
      key: random key; None creates `jax.ShapeDtypeStruct`s and computes nothing. Every draw depends
        only on the key and on names, so that adding a parameter does not change the values of the
        others.
    """

    key: Key[Array, ""] | None

    def child(self, name: str) -> "Initializer":
        """Returns the initializer of a submodule."""
        return Initializer(None if self.key is None else named_key(self.key, name))

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: Std,
        axes: tuple[Axis | None, ...],
        group: Group,
        served: Served = "compute",
    ) -> Parameter:
        """Returns a float32 parameter drawn from a normal distribution with mean 0."""

        def draw(key: Key[Array, ""]) -> Array:
            deviation = std if isinstance(std, int | float) else std()
            return deviation * random.normal(key, shape)

        value = self.value(name, shape, draw)
        return Parameter(value, axes=axes, group=group, served=served)

    def uniform(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        axes: tuple[Axis | None, ...],
        group: Group,
        served: Served = "compute",
    ) -> Parameter:
        """Returns a float32 parameter drawn uniformly from [0, 1)."""
        value = self.value(name, shape, lambda key: jax.random.uniform(key, shape, jnp.float32))
        return Parameter(value, axes=axes, group=group, served=served)

    def constant(
        self, size: int, value: Std, *, group: Group = "norms", served: Served = "float32"
    ) -> Parameter:
        """Returns a float32 vector filled with one value, such as a norm's weight or a bias."""

        def fill(_: Key[Array, ""]) -> Array:
            number = value if isinstance(value, int | float) else value()
            return jnp.full((size,), number, jnp.float32)

        return Parameter(self.value("", (size,), fill), axes=(None,), group=group, served=served)

    def value(
        self,
        name: str,
        shape: tuple[int, ...],
        draw: Callable[[Key[Array, ""]], Array],
        dtype: DTypeLike = jnp.float32,
    ) -> Any:
        """Returns `draw(key)` for the key of this name, or its shape and dtype if abstract."""
        if self.key is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        return draw(named_key(self.key, name))

    def stack[M](self, name: str, count: int, create: Callable[["Initializer"], M]) -> M:
        """Returns `count` modules as one, with arrays stacked along a new leading axis."""
        if self.key is None:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), create(self)
            )
        keys = jax.random.split(named_key(self.key, name), count)
        return jax.vmap(lambda key: create(Initializer(key)))(keys)


ABSTRACT = Initializer(None)


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Folds a name into a key, so that adding a name does not change the keys of the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def path_name(path: Any) -> str:
    """Returns the name of a `jax.tree_util` key path, such as "blocks/attention/query"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def declarations(module: nnx.Module, prefix: str) -> dict[str, Declaration]:
    """Returns the declarations of all parameters and buffers of a module, by name.

    Args:
      module: concrete or abstract; the leading axes of stacked arrays are not sharded.
      prefix: prefix of the names of parameters, such as "params".

    Raises:
      ValueError: a parameter without a declaration.
    """
    declared_by_name: dict[str, Declaration] = {}
    variables = jax.tree_util.tree_leaves_with_path(
        module, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for path, variable in variables:
        match variable:
            case Parameter():
                name = f"{prefix}/{path_name(path)}"
                declared: Declaration = variable.get_metadata()["declaration"]
            case Buffer():
                name = f"buffers/{path_name(path)}"
                declared = Declaration((), None, "compute")
            case _:
                raise ValueError(
                    f"{path_name(path)}: a {type(variable).__name__} without a declaration;"
                    " create it with an Initializer, or as a Buffer"
                )
        declared_by_name[name] = declared.stacked(len(variable.get_value().shape))
    return declared_by_name
