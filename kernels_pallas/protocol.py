"""What an operator takes, as one object, and what a module must have to implement an operator.

An operator declares its arguments once, as a subclass of `Call` in its `call.py`:

    @protocol.call
    class RowProductsCall(Call):
        table: Float[AbstractArray, "num_values dim"] = array("[num_values, dim]")
        indices: Int32[...] = array("[num_tokens, num_selected]", kind="ids", token_axis=0)
        inputs: Float[...] = array("[num_tokens, dim]", token_axis=0)
        chunk_size: int

`array` marks an argument that is an array; every other field is static. From the declaration
`arguments.py` checks ranks and dtypes and places arrays on a mesh, and JAX sees a pytree: a call
passes through `jax.custom_vjp`, `jax.jit` and `jax.shard_map` as one argument. So a new argument is
a field here, a parameter of the public function in `api.py`, and what the backends make of it; it
does not have to be passed on by the functions in between.

A backend is a module, named in the `BACKENDS` of its operator's `api.py`, with the functions of
`Backend` and what else the operator's own protocol, beside its `Call`, asks for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, dataclass_transform, runtime_checkable

import jax
from jax import Array

_SPEC = "array"  # the entry of a field's metadata


class ArraySpec(NamedTuple):
    """What an array among the arguments of an operator must be.

    Attributes:
        axes: as messages name them: "[num_tokens, dim]".
        kind: floating-point numbers, or ids in int32.
        optional: whether None will do.
        token_axis: the axis that may be sharded over tokens, or None.
    """

    axes: str
    kind: Literal["floats", "ids"]
    optional: bool
    token_axis: int | None


def array(
    axes: str,
    *,
    kind: Literal["floats", "ids"] = "floats",
    token_axis: int | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declares a field of a `Call` that is an array; see `ArraySpec`.

    Args:
        axes: as messages name them.
        kind: floating-point numbers or ids.
        token_axis: the axis that may be sharded over tokens.
        default: None where the argument is optional.
    """
    optional = default is not dataclasses.MISSING
    spec = ArraySpec(axes, kind, optional, token_axis)
    if optional:
        return dataclasses.field(default=default, metadata={_SPEC: spec})
    return dataclasses.field(metadata={_SPEC: spec})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of an operator, checked and complete: a pytree of its arrays.

    Fields that are not arrays are static: hashable, and part of the pytree's structure. Where only
    shapes and dtypes matter, arrays may be `jax.ShapeDtypeStruct`.
    """

    @classmethod
    def specs(cls) -> dict[str, ArraySpec]:
        """Returns what each array must be, in the order of declaration."""
        fields = dataclasses.fields(cls)
        return {f.name: f.metadata[_SPEC] for f in fields if _SPEC in f.metadata}

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name, without those that are absent."""
        found = {name: getattr(self, name) for name in self.specs()}
        return {name: array for name, array in found.items() if array is not None}


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
    """Returns the pytree that the rule of `jax.custom_vjp` returns for a call.

    Args:
        call: what was differentiated.
        gradients: by name; the gradient of an array that is left out is zero.
    """
    unknown = gradients.keys() - call.arrays.keys()
    if unknown:
        raise ValueError(f"gradients of no argument: {sorted(unknown)}")
    fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return _assembled(type(call), fields | {name: gradients.get(name) for name in call.specs()})


def _assembled[C: Call](cls: type[C], fields: Mapping[str, Any]) -> C:
    """A call without its constructor, whose checks of types JAX's placeholders would not pass."""
    new = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


@runtime_checkable
class Backend[C, Output](Protocol):
    """A module that implements an operator, whose arguments are a C and whose result an Output."""

    def unsupported_reason(self, call: C, platform: str) -> str | None:
        """Returns, in words, why it cannot take a call of these shapes and dtypes, or None.

        Args:
            call: may hold shapes and dtypes in place of arrays.
            platform: what the call is compiled for.
        """

    def forward(self, call: C) -> Output:
        """Computes the operator's result for the arrays of one device."""
