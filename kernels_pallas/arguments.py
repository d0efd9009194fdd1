"""Argument handling of the operators: validation, optional id checks, meshes with explicit axes.

Tracing does not see the values of ids. With the environment variable KERNELS_PALLAS_CHECK_IDS=1,
programs traced from then on check ids at run time and raise an error that names any id out of
range.
"""

import functools
import operator
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from kernels_pallas.common import check
from kernels_pallas.protocol import ArraySpec, Call

_INT32 = np.iinfo(np.int32)


def as_arrays(call_type: type[Call], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks ranks and dtypes, and returns a call's arrays as JAX arrays (None where absent).

    NumPy ids may have any integer dtype. Their range is checked here because JAX would silently
    truncate ids that do not fit int32.

    Args:
        call_type: declares the arrays; `given` has an entry for each of them.
        given: the arguments as passed, by name.

    Raises:
        ValueError: an argument is not an array, or has the wrong rank, dtype or range.
    """
    return {
        name: None if given[name] is None and spec.optional else as_array(name, given[name], spec)
        for name, spec in call_type.specs().items()
    }


def as_array(name: str, array: Any, spec: ArraySpec) -> Array:
    """Returns one argument as a JAX array; see `as_arrays`."""
    axes = spec.axes
    is_array = isinstance(getattr(array, "dtype", None), np.dtype)
    check(is_array, name, type(array).__name__, f"a JAX or NumPy array, {axes}")
    check(array.ndim == axes.count(",") + 1, f"{name}.shape", array.shape, axes)
    dtype = array.dtype
    if spec.kind == "floats":
        # Narrower dtypes do not promote to float32, and JAX does not support wider ones.
        floating = jnp.issubdtype(dtype, jnp.floating) and 2 <= dtype.itemsize <= 8
        check(floating, f"{name}.dtype", dtype, "a floating-point dtype of 16 to 64 bits")
        native = array if dtype.isnative else array.astype(dtype.newbyteorder("="))
        return jnp.asarray(native)
    if spec.kind == "words":
        check(dtype == np.uint32, f"{name}.dtype", dtype, "uint32")
        return jnp.asarray(array)
    if isinstance(array, np.ndarray) and np.issubdtype(dtype, np.integer):
        ends = (int(array.min()), int(array.max())) if array.size else (0, 0)
        fits = _INT32.min <= ends[0] and ends[1] <= _INT32.max
        check(fits, name, f"ids from {ends[0]} to {ends[1]}", "within int32")
        array = array.astype(np.int32)
    check(array.dtype == np.int32, f"{name}.dtype", dtype, "int32")
    return jnp.asarray(array)


def as_integer(name: str, value: Any) -> int:
    """Returns a size or a count as a Python int.

    Raises:
        ValueError: the value is not an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, must be an integer") from None


def chunk_tokens(value: Any) -> int | None:
    """Validates the argument `chunk_size`; None stays None."""
    if value is None:
        return None
    size = as_integer("chunk_size", value)
    check(size >= 1, "chunk_size", size, "at least 1")
    return size


def check_ids(name: str, ids: Array, size: int) -> None:
    """Checks that ids are in [0, size), if KERNELS_PALLAS_CHECK_IDS is 1.

    An eager call checks immediately; a traced program checks when it runs.

    Raises:
        ValueError: an id is not in [0, size).
    """
    if not ids_are_checked() or ids.size == 0:
        return
    require = functools.partial(_require_ids, name, size)
    if isinstance(ids, jax.core.Tracer):
        jax.debug.callback(require, ids.min(), ids.max())
    else:
        require(ids.min(), ids.max())


def ids_are_checked() -> bool:
    """Whether KERNELS_PALLAS_CHECK_IDS enables the checks of ids.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    variable = "KERNELS_PALLAS_CHECK_IDS"
    wanted = os.environ.get(variable) or "0"
    check(wanted in ("0", "1"), variable, repr(wanted), "0 or 1")
    return wanted == "1"


def _require_ids(name: str, size: int, least: Any, greatest: Any) -> None:
    within = 0 <= int(least) and int(greatest) < size
    check(within, name, f"ids from {least} to {greatest}", f"in [0, {size})")


def per_device(
    operator_name: str,
    function: Callable[..., Any],
    call: Call,
    *static: Any,
    others: Mapping[str, Array] = MappingProxyType({}),
    tokens_may_be_sharded: bool = True,
) -> Any:
    """Calls `function(call, *others, *static)`, once per device on a mesh with explicit axes.

    On such a mesh, each device gets its shard of the tokens and replicas of everything else. Inside
    `jax.shard_map`, and where no axis is explicit, this is a plain call.

    Args:
        operator_name: for error messages.
        function: works on the arrays of one device; the first axis of its results is tokens.
        call: the operator's arguments. Arrays may be sharded over their token axis.
        *static: further, hashable arguments of the function.
        others: further arrays that the function takes, by name; they must be replicated.
        tokens_may_be_sharded: False if every array must be replicated.

    Raises:
        ValueError: an axis other than tokens is sharded, or two arguments shard tokens differently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return function(call, *others.values(), *static)
    arrays = call.arrays | dict(others)
    token_axes = {
        name: spec.token_axis
        for name, spec in call.specs().items()
        if spec.token_axis is not None and tokens_may_be_sharded
    }
    specs = {name: jax.typeof(array).sharding.spec for name, array in arrays.items()}
    entries = {specs[name][axis] for name, axis in token_axes.items() if name in specs} - {None}
    tokens = entries.pop() if entries else None
    or_tokens = ", or sharded over tokens like the other arguments," if token_axes else ""
    rule = f"replicated{or_tokens} unless {operator_name} is called inside jax.shard_map"
    for name, spec in specs.items():
        remaining = [entry for axis, entry in enumerate(spec) if axis != token_axes.get(name)]
        check(not entries and not any(remaining), f"{name}.sharding", spec, rule)

    def placed(name: str, array: Array) -> Array:
        axis = token_axes.get(name)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, tokens)
        return jax.sharding.reshard(array, spec)

    out_spec = PartitionSpec(tokens) if tokens else PartitionSpec()
    structure = jax.tree.structure((call, *others.values()))
    mapped = _mapped(function, structure, static, out_spec, mesh)
    return mapped(*(placed(name, array) for name, array in arrays.items()))


@functools.cache
def _mapped(
    function: Callable[..., Any],
    structure: Any,
    static: tuple[Any, ...],
    out_spec: PartitionSpec,
    mesh: AbstractMesh,
) -> Callable[..., Any]:
    """The function mapped over devices, cached so that JAX compiles equal calls only once."""

    def local(*arrays: Array) -> Any:
        return function(*jax.tree.unflatten(structure, arrays), *static)

    axes = frozenset(mesh.explicit_axes)
    return jax.jit(jax.shard_map(local, mesh=mesh, out_specs=out_spec, axis_names=axes))
