"""The arguments of an operator as one object, and the interface of its backends.

An operator declares its arguments once, as a subclass of `Call` in its `call.py`:

    @protocol.call
    class RowProductsCall(Call):
        table: Float[AbstractArray, "num_values dim"] = array("[num_values, dim]")
        indices: Int32[...] = array("[num_tokens, num_selected]", kind="ids", token_axis=0)
        inputs: Float[...] = array("[num_tokens, dim]", token_axis=0)
        chunk_size: int

`array` marks an array argument; every other field is static. `arguments.py` uses the declaration to
check ranks and dtypes and to place arrays on a mesh. To JAX, a call is a pytree that passes through
`jax.custom_vjp`, `jax.jit` and `jax.shard_map` as one argument. Adding an argument therefore takes
a field here, a parameter of the public function in `api.py` and its use in the backends; the
functions in between do not change.

A backend is a module, listed in the `BACKENDS` of its operator's `api.py`. It has the functions of
`Backend` and those that the operator's own protocol, next to its `Call`, adds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, dataclass_transform, runtime_checkable

import jax
from jax import Array

from kernels_pallas.array_types import AbstractArray

_SPEC = "array"  # key in the metadata of a field


class ArraySpec(NamedTuple):
    """Requirements on an array argument of an operator.

    Attributes:
        axes: names of the axes, for messages: "[num_tokens, dim]".
        kind: floating-point numbers, int32 ids, or uint32 words.
        optional: whether None is allowed.
        token_axis: the axis that may be sharded over tokens, or None.
    """

    axes: str
    kind: Literal["floats", "ids", "words"]
    optional: bool
    token_axis: int | None


def array(
    axes: str,
    *,
    kind: Literal["floats", "ids", "words"] = "floats",
    token_axis: int | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declares an array field of a `Call`; see `ArraySpec`.

    Args:
        axes: names of the axes, for messages.
        kind: floating-point numbers, ids or words.
        token_axis: the axis that may be sharded over tokens.
        default: None if the argument is optional.
    """
    optional = default is not dataclasses.MISSING
    spec = ArraySpec(axes, kind, optional, token_axis)
    if optional:
        return dataclasses.field(default=default, metadata={_SPEC: spec})
    return dataclasses.field(metadata={_SPEC: spec})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The validated arguments of an operator: a pytree of its arrays.

    Fields that are not arrays are static: hashable, and part of the pytree's structure. Where only
    shapes and dtypes matter, arrays may be `jax.ShapeDtypeStruct`.
    """

    @classmethod
    def specs(cls) -> dict[str, ArraySpec]:
        """Returns the requirements on each array, in the order of declaration."""
        fields = dataclasses.fields(cls)
        return {f.name: f.metadata[_SPEC] for f in fields if _SPEC in f.metadata}

    @property
    def arrays(self) -> dict[str, AbstractArray]:
        """The arrays by name, without those that are None."""
        values = {name: getattr(self, name) for name in self.specs()}
        return {name: array for name, array in values.items() if array is not None}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(array,))
def call[C: Call](cls: type[C]) -> type[C]:
    """Makes a subclass of `Call` a frozen dataclass and a pytree."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    names = tuple(cls.specs())
    others = tuple(f.name for f in dataclasses.fields(cls) if f.name not in names)

    def flatten(of: C) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(of, n) for n in names), tuple(getattr(of, n) for n in others)

    def flatten_with_keys(of: C) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        arrays, static = flatten(of)
        keys = map(jax.tree_util.GetAttrKey, names)
        return tuple(zip(keys, arrays, strict=True)), static

    def unflatten(static: tuple[Any, ...], arrays: Any) -> C:
        return _assembled(cls, dict(zip((*names, *others), (*arrays, *static), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def cotangents[C: Call](call: C, gradients: Mapping[str, Array]) -> C:
    """Returns the pytree of gradients that a `jax.custom_vjp` backward rule returns for a call.

    Args:
        call: the call that was differentiated.
        gradients: by name; arrays without an entry get a gradient of zero.
    """
    unknown = gradients.keys() - call.arrays.keys()
    if unknown:
        raise ValueError(f"gradients of unknown arguments: {sorted(unknown)}")
    fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return _assembled(type(call), fields | {name: gradients.get(name) for name in call.specs()})


def _assembled[C: Call](cls: type[C], fields: Mapping[str, Any]) -> C:
    """Builds a call without its constructor, whose type checks would reject JAX's placeholders."""
    new = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


@runtime_checkable
class Backend[C, Output](Protocol):
    """A module that implements an operator that maps a C to an Output."""

    def unsupported_reason(self, call: C, platform: str) -> str | None:
        """Returns why the backend does not support these shapes and dtypes, in words, or None.

        Args:
            call: may hold shapes and dtypes instead of arrays.
            platform: what the call is compiled for.
        """

    def forward(self, call: C) -> Output:
        """Computes the result of the operator on the arrays of one device."""
