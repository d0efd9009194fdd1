"""Parameters, each declared once: how it is drawn, sharded, optimised and served.

A module declares an array where it creates it:

    self.query = init.normal(
        "query", (hidden, width), std=std, axes=("hidden", None), group="matrices"
    )

Sharding rules, optimizer groups, inspection, accounting and served dtypes all read this declaration
(`declarations`); there is no second table of names. An array has one name everywhere, its path:
"params/blocks/attention/query", "buffers/memory/shuffle", "store/values".
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

# What an axis of a parameter is; `umv2.sharding.rules` says which axes of the mesh shard it.
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
# Each group has a weight decay of its own (`optimizer.weight_decay`); "values" also has a learning
# rate of its own.
Group = Literal["embeddings", "norms", "matrices", "keys", "values"]
# The dtype in inference: that of matrix products, or float32 whatever that is.
Served = Literal["compute", "float32"]

# A standard deviation, or how to find it where that takes long: asked for when values are drawn.
Std = float | Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is declared of one array.

    Attributes:
      axes: of each dimension what it is; None: never sharded.
      group: of the optimizer; None for buffers, which no gradient reaches.
      served: the dtype in inference.
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
        """Returns the declaration of the array with axes in front of it, up to the given rank."""
        return dataclasses.replace(self, axes=(None,) * (rank - len(self.axes)) + self.axes)


class Parameter(nnx.Param):
    """A trained array with its declaration.

    Raises:
      ValueError: the declaration has another number of axes than the array, or names an axis, a
        group or a dtype that there is not.
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
    """Saved state that no gradient reaches; replicated, and served as it is."""


@dataclasses.dataclass(frozen=True)
class Initializer:
    """Creates the parameters of a module, drawn or abstract.

    Attributes:
      key: what values are drawn from; None: shapes and dtypes stand in their place, and nothing is
        computed. Every draw is a function of the key and of names, so that a new parameter does not
        change the values of the others.
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
        """Returns a parameter drawn from a normal distribution of mean 0, in float32."""

        def draw(key: Key[Array, ""]) -> Array:
            deviation = std if isinstance(std, int | float) else std()
            return deviation * jax.random.normal(key, shape, jnp.float32)

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
        """Returns a parameter drawn uniformly from [0, 1), in float32."""
        value = self.value(name, shape, lambda key: jax.random.uniform(key, shape, jnp.float32))
        return Parameter(value, axes=axes, group=group, served=served)

    def constant(
        self, size: int, value: Std, *, group: Group = "norms", served: Served = "float32"
    ) -> Parameter:
        """Returns a vector of one value in float32: the weight of a norm, a bias."""

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
        """Returns what `draw` makes of the key of a name, or its shape and dtype."""
        if self.key is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        return draw(named_key(self.key, name))

    def stack[M](self, name: str, count: int, create: Callable[["Initializer"], M]) -> M:
        """Returns `count` modules as one, whose arrays are stacked along a new first axis."""
        if self.key is None:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), create(self)
            )
        keys = jax.random.split(named_key(self.key, name), count)
        return jax.vmap(lambda key: create(Initializer(key)))(keys)


ABSTRACT = Initializer(None)


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Derives the key of a name, so that adding one does not reshuffle the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def path_name(path: Any) -> str:
    """Returns a path of `jax.tree_util` as a name: "blocks/attention/query"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def declarations(module: nnx.Module, prefix: str) -> dict[str, Declaration]:
    """Returns the declaration of every trained array of a module, and its buffers', by name.

    Args:
      module: abstract or not; where its arrays are stacked, stacked axes are never sharded.
      prefix: of the names of parameters, such as "params".

    Raises:
      ValueError: a parameter without a declaration.
    """
    found: dict[str, Declaration] = {}
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
                    " create it by an Initializer, or as a Buffer"
                )
        found[name] = declared.stacked(len(variable.get_value().shape))
    return found
