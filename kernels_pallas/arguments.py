"""What the operators take: checks of arguments, checks of ids on demand, meshes with explicit axes.

Ids are values, which a trace does not see. With the environment variable KERNELS_PALLAS_CHECK_IDS=1
the programs traced from then on check them as they run, and a wrong one is an error that names it.
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
    """Returns a call's arrays as arrays of JAX (None for the absent), ranks and dtypes checked.

    NumPy's ids may have any integer dtype; JAX would cut those off that int32 does not hold.

    Args:
        call_type: declares the arrays; `given` has an entry for each.
        given: what was passed, by name.

    Raises:
        ValueError: an argument is no array, or has another rank, dtype or range.
    """
    return {
        name: None if given[name] is None and spec.optional else as_array(name, given[name], spec)
        for name, spec in call_type.specs().items()
    }


def as_array(name: str, array: Any, spec: ArraySpec) -> Array:
    """Returns one argument as an array of JAX; see `as_arrays`."""
    axes = spec.axes
    is_array = isinstance(getattr(array, "dtype", None), np.dtype)
    check(is_array, name, type(array).__name__, f"an array of JAX or NumPy, {axes}")
    check(array.ndim == axes.count(",") + 1, f"{name}.shape", array.shape, axes)
    dtype = array.dtype
    if spec.kind == "floats":
        # Narrower types have no common type with float32, wider ones none in JAX.
        floating = jnp.issubdtype(dtype, jnp.floating) and 2 <= dtype.itemsize <= 8
        check(floating, f"{name}.dtype", dtype, "a floating-point dtype of 16 to 64 bits")
        native = array if dtype.isnative else array.astype(dtype.newbyteorder("="))
        return jnp.asarray(native)
    if isinstance(array, np.ndarray) and np.issubdtype(dtype, np.integer):
        ends = (int(array.min()), int(array.max())) if array.size else (0, 0)
        fits = _INT32.min <= ends[0] and ends[1] <= _INT32.max
        check(fits, name, f"ids from {ends[0]} to {ends[1]}", "within int32")
        array = array.astype(np.int32)
    check(array.dtype == np.int32, f"{name}.dtype", dtype, "int32")
    return jnp.asarray(array)


def whole_number(name: str, value: Any) -> int:
    """Returns a size or a count as a Python number.

    Raises:
        ValueError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, must be a whole number") from None


def chunk_tokens(value: Any) -> int | None:
    """Returns the argument `chunk_size`, checked."""
    if value is None:
        return None
    size = whole_number("chunk_size", value)
    check(size >= 1, "chunk_size", size, "at least 1")
    return size


def check_ids(name: str, ids: Array, size: int) -> None:
    """Has ids checked when they are known, if KERNELS_PALLAS_CHECK_IDS asks for it.

    Called eagerly it checks at once, and a traced program does when it runs.

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
    """Whether KERNELS_PALLAS_CHECK_IDS asks for it.

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

    There each device works on its shard of the tokens and replicas of everything else. Inside
    `jax.shard_map`, and where no axis is explicit, this is a plain call.

    Args:
        operator_name: for messages.
        function: of arrays of one device; the first axis of its results is that of tokens.
        call: the operator's arguments. Arrays may be sharded over their token axis.
        *static: what else the function takes; hashable.
        others: arrays by name that the function takes beside the call; never sharded.
        tokens_may_be_sharded: False where every array must be replicated.

    Raises:
        ValueError: another axis is sharded, or tokens of one argument unlike those of another.
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
    """The function mapped over devices: one object for equal calls, so that JAX compiles once."""

    def local(*arrays: Array) -> Any:
        return function(*jax.tree.unflatten(structure, arrays), *static)

    axes = frozenset(mesh.explicit_axes)
    return jax.jit(jax.shard_map(local, mesh=mesh, out_specs=out_spec, axis_names=axes))
