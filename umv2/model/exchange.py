"""Value tables divided over devices: what one device computes, and what it exchanges.

Every function acts on the arrays of one device within `jax.shard_map`. The devices of the mesh
axis `memory` each have tokens of their own, t of them, and a part of every table:

    whole      all of it; nothing is exchanged.
    columns    its columns of every row. Ids go to all devices; each adds up its columns of the
               pre-scores, which are summed, and of the values, which go back to their tokens.
    rows       its rows. A token's selections go to the devices that own them, whose partial sums
               go back to the token. No selection is ever left out: those that do not fit into the
               buffers, whose sizes are fixed, go in a further round.

Exchanged floating-point arrays have the compute dtype; sums within a device are accumulated in
float32 (float64 for float64). Collectives are differentiated by JAX: the gradient of a gathered
array is scattered, and so on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from umv2 import parallel

Layout = Literal["whole", "columns", "rows"]
Activation = Literal["gelu", "silu", "relu"] | None

# Room for selections in a round beyond an even load: a share of it, or, where loads are small, this
# many standard deviations of what falls on a device when each selection picks one at random.
_SLACK, _DEVIATIONS = 0.25, 5
# Selections of a token that its virtual tokens hold at most (`_virtual_tokens`).
_MAX_GROUP = 8


class _Options(NamedTuple):
    """What is not an array; hashable."""

    axis: str
    activation: Activation
    num_slots: int
    chunk_size: int | None
    implementation: str
    dtype: DTypeLike


def aggregate(
    layout: Layout,
    values: Float[Array, "l n v"],
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    *,
    pre_values: Float[Array, "l n p"] | None,
    pre_inputs: Float[Array, "t p_whole"] | None,
    activation: Activation,
    slots: Int32[Array, "t k"] | None,
    num_slots: int,
    chunk_size: int | None,
    implementation: str,
    dtype: DTypeLike,
    axis: str = parallel.MEMORY,
) -> Float[Array, "t e"]:
    """Returns the weighted sums of each token's rows: `value_aggregation` over divided tables.

    Args:
      layout: how the tables are divided over `axis`.
      values: this device's part of all tables: [L, N, v], whose N ("rows") or v ("columns") is
        1/M of the whole. In the layout "rows" device m owns rows m N/M and on of every table.
      rows: the selected rows as table * N + row, with N the rows of a whole table.
      weights: of each selection, for each of the c equal slices of a whole row.
      pre_values: rows that decide, with `pre_inputs`, how much each selection counts; alike.
      pre_inputs: what this device's tokens bring to whole pre-values; both or neither.
      activation: of the pre-score.
      slots: where in its token's output each selection is added, in [0, num_slots).
      num_slots: outputs a token; 1 without `slots`.
      chunk_size: tokens whose rows are fetched at once; None: chosen by their size.
      implementation: of the operators on a device's rows.
      dtype: of the floating-point arrays that are exchanged.
      axis: the mesh axis over which the tables are divided.

    Returns:
      [t, num_slots * D_v], in the accumulation dtype of `value_aggregation`.
    """
    options = _Options(axis, activation, num_slots, chunk_size, implementation, dtype)
    arrays = (values, pre_values, rows, weights, pre_inputs, slots)
    if layout == "whole":
        return _value_aggregation(*arrays, options)
    accumulation = jnp.result_type(
        jnp.float32, *(x for x in (values, weights, pre_values, pre_inputs) if x is not None)
    )
    exchange: Callable[..., Array] = _columns if layout == "columns" else _rows
    return exchange(*_varying(arrays, axis), options).astype(accumulation)


def column_sizes(value_dim: int, pre_value_dim: int, num_cores: int) -> list[int]:
    """Returns the numbers of devices that can divide tables by columns, in rising order.

    They divide both tables, and a device holds columns of one core, or of whole cores.
    """
    divisors = _divisors(math.gcd(value_dim, pre_value_dim))
    return [size for size in divisors if size % num_cores == 0 or num_cores % size == 0]


def row_sizes(num_values: int) -> list[int]:
    """Returns the numbers of devices that can divide tables by rows, in rising order."""
    return _divisors(num_values)


def column_fault(value_dim: int, pre_value_dim: int, num_cores: int, size: int) -> str | None:
    """Returns why `size` devices cannot divide tables by columns, with a size that can, or None."""
    sizes = column_sizes(value_dim, pre_value_dim, num_cores)
    rule = f"value_dim={value_dim} and pre_value_dim={pre_value_dim}"
    if num_cores > 1:
        rule += f", and be a divisor or a multiple of num_cores={num_cores}"
    return _fault(size, sizes, rule)


def row_fault(num_values: int, size: int) -> str | None:
    """Returns why `size` devices cannot divide tables by rows, with a size that can, or None."""
    return _fault(size, row_sizes(num_values), f"the {num_values} rows of a table")


def _fault(size: int, sizes: list[int], rule: str) -> str | None:
    if size in sizes:
        return None
    return f"must divide {rule}; {min(sizes, key=lambda other: abs(other - size))} would do"


def _divisors(number: int) -> list[int]:
    small = [m for m in range(1, math.isqrt(number) + 1) if number % m == 0]
    return sorted({*small, *(number // m for m in small)})


# --- columns ---


def own_cores(num_cores: int, size: int) -> int:
    """Returns how many cores weight the columns of one device."""
    return max(1, num_cores // size)


def _columns(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p_whole"] | None,
    slots: Int32[Array, "t k"] | None,
    options: _Options,
) -> Float[Array, "t e"]:
    """Pools this device's columns for the tokens of all devices, and joins those of its own."""
    axis, num_slots = options.axis, options.num_slots
    num_tokens = rows.shape[0]
    rows = lax.all_gather(rows, axis, tiled=True)
    if pre_values is not None and pre_inputs is not None:
        own_inputs = lax.all_to_all(pre_inputs.astype(options.dtype), axis, 1, 0, tiled=True)
        partial = parallel.row_products(
            _flat(pre_values),
            rows,
            own_inputs,
            chunk_size=options.chunk_size,
            implementation=options.implementation,
        )
        pre_scores = lax.psum_scatter(partial.astype(options.dtype), axis, tiled=True)
        gates = parallel.activate(pre_scores.astype(partial.dtype), options.activation)
        weights = weights * gates[:, :, None]
    weights = _own_weights(weights.astype(options.dtype), axis)
    if slots is not None:
        slots = lax.all_gather(slots.astype(smallest_dtype(num_slots)), axis, tiled=True)
        slots = slots.astype(jnp.int32)
    pooled = _value_aggregation(values, None, rows, weights, None, slots, options)
    pooled = pooled.astype(options.dtype).reshape(-1, num_slots, values.shape[-1])
    return lax.all_to_all(pooled, axis, 0, 2, tiled=True).reshape(num_tokens, -1)


def _own_weights(weights: Float[Array, "t k c"], axis: str) -> Float[Array, "mt k own"]:
    """Returns, for all tokens, the weights of the cores that this device's columns belong to."""
    size, num_cores = lax.axis_size(axis), weights.shape[-1]
    if num_cores == 1:
        return lax.all_gather(weights, axis, tiled=True)
    own = own_cores(num_cores, size)
    # Core j of device m: devices that share a core get copies of its weights.
    cores = (np.arange(size)[:, None] * num_cores // size + np.arange(own)[None, :]).reshape(-1)
    return lax.all_to_all(weights[:, :, cores], axis, 2, 0, tiled=True)


# --- rows ---


class Routing(NamedTuple):
    """Which of a device's selections go to whom, and in what order.

    A token's selections of one slot are a line of their own: line t * num_slots + slot. Selections
    are sorted by owner, then line; those of equal rank keep their order.

    Attributes:
      order: where each of the sorted selections stands in the flattened [t, k] arrays.
      rows: the sorted selections' rows of their owner's part of the tables.
      ends: for each owner, how many of its selections belong to lines up to each one.
      starts: where the selections of each owner begin among the sorted ones.
      num_rounds: rounds that it takes until all devices have sent all selections; at least 1.
    """

    order: Int32[Array, " tk"]
    rows: Int32[Array, " tk"]
    ends: Int32[Array, "owners lines"]
    starts: Int32[Array, " owners"]
    num_rounds: Int32[Array, ""]


def capacity(num_selections: int, size: int) -> int:
    """Returns how many selections a device sends to each of `size` owners in one round, at most."""
    even = num_selections / size
    room = math.ceil(even + max(_SLACK * even, _DEVIATIONS * math.sqrt(even)))
    return min(num_selections, -(-room // 8) * 8)


def route(
    rows: Int32[Array, "t k"],
    slots: Int32[Array, "t k"] | None,
    *,
    own_rows: int,
    num_slots: int,
    axis: str,
) -> Routing:
    """Sorts this device's selections by the devices that own their rows.

    Args:
      rows: table * N + row.
      slots: of the selections.
      own_rows: rows of each table that a device owns, N/M.
      num_slots: slots of a token.
      axis: the mesh axis over which rows are divided.
    """
    size, num_tokens = lax.axis_size(axis), rows.shape[0]
    table, row = rows // (own_rows * size), rows % (own_rows * size)
    owner, local = row // own_rows, table * own_rows + row % own_rows
    line = jnp.arange(num_tokens, dtype=jnp.int32)[:, None] * num_slots
    # Of each token, how many selections each owner and slot gets. Comparing is cheaper for
    # accelerators than adding one by one at places that the data name.
    kinds = owner * num_slots
    if slots is not None:
        line, kinds = line + slots, kinds + slots
    kind = jnp.arange(size * num_slots, dtype=jnp.int32)
    counts = jnp.sum(kinds[:, :, None] == kind[None, None, :], axis=1, dtype=jnp.int32)
    counts = counts.reshape(num_tokens, size, num_slots).swapaxes(0, 1).reshape(size, -1)

    place = (owner * (num_tokens * num_slots) + line).reshape(-1)
    _, local, order = lax.sort(
        (place, local.reshape(-1), lax.iota(jnp.int32, rows.size)), num_keys=1, is_stable=True
    )
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    totals = ends[:, -1]
    starts = jnp.cumsum(totals, dtype=jnp.int32) - totals
    most = -(-jnp.max(totals) // capacity(rows.size, size))
    # All devices of the mesh agree: the rounds of some must not wait for those of others.
    num_rounds = lax.pmax(most, tuple(sorted(jax.typeof(most).manual_axis_type.varying)))
    return Routing(order, local, ends, starts, num_rounds)


def _rows(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p"] | None,
    slots: Int32[Array, "t k"] | None,
    options: _Options,
) -> Float[Array, "t e"]:
    """Pools, of this device's rows, those that all devices' tokens selected."""
    own_rows, num_slots = values.shape[1], options.num_slots
    routing = route(rows, slots, own_rows=own_rows, num_slots=num_slots, axis=options.axis)
    if pre_inputs is not None:
        pre_inputs = lax.all_gather(pre_inputs.astype(options.dtype), options.axis)
    arrays = (values, pre_values, weights.astype(options.dtype), pre_inputs)
    sums = _sum_of_rounds(functools.partial(_round, options), routing.num_rounds, routing, arrays)
    sums = sums.reshape(-1, sums.shape[-1]).astype(options.dtype)
    return lax.psum_scatter(sums, options.axis, tiled=True).reshape(rows.shape[0], -1)


def _round(
    options: _Options, number: Int[Array, ""] | int, routing: Routing, arrays: tuple
) -> Float[Array, "m lines v"]:
    """Returns this device's part of the pooled lines of all devices, of one round's selections."""
    values, pre_values, weights, pre_inputs = arrays
    axis, size = options.axis, lax.axis_size(options.axis)
    num_tokens, top_m, num_cores = weights.shape
    room = capacity(num_tokens * top_m, size)

    # Places beyond an owner's last selection name some other selection and have no weight.
    place = jnp.arange(room, dtype=jnp.int32)[None, :] + number * room
    place += routing.starts[:, None]
    sent = place < (routing.starts + routing.ends[:, -1])[:, None]
    place = jnp.minimum(place, num_tokens * top_m - 1)
    weights = weights.reshape(-1, num_cores)
    weights = jnp.where(sent[:, :, None], weights[routing.order[place]], 0)
    ends = jnp.clip(routing.ends - number * room, 0, room)
    counts = jnp.diff(ends, prepend=0, axis=1).astype(smallest_dtype(top_m + 1))

    exchange = functools.partial(
        lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True
    )
    rows, counts, weights = map(exchange, (routing.rows[place], counts, weights))
    group = _group_size(top_m, size * options.num_slots)
    rows, weights, line = _virtual_tokens(rows, counts.astype(jnp.int32), weights, group)
    num_lines = counts.shape[1]
    if pre_inputs is not None:
        source = jnp.arange(size, dtype=jnp.int32)[:, None]
        pre_inputs = pre_inputs[source, jnp.minimum(line // options.num_slots, num_tokens - 1)]
        pre_inputs = pre_inputs.reshape(-1, pre_inputs.shape[-1])

    chunk_size = options.chunk_size and max(1, options.chunk_size * top_m // group)
    pooled = _value_aggregation(
        values,
        pre_values,
        rows.reshape(-1, group),
        weights.reshape(-1, group, num_cores),
        pre_inputs,
        None,
        options._replace(num_slots=1, chunk_size=chunk_size),
    )
    pooled = pooled.reshape(size, -1, pooled.shape[-1])
    # Virtual tokens that hold nothing have line `num_lines`, which does not exist.
    add = jax.vmap(
        lambda sums, line, terms: sums.at[line].add(terms, mode="drop", indices_are_sorted=True)
    )
    return add(jnp.zeros_like(pooled, shape=(size, num_lines, pooled.shape[-1])), line, pooled)


def _group_size(top_m: int, parts: int) -> int:
    """The selections of a virtual token: a power of two near those of a line at one owner."""
    return 1 << (min(max(top_m // parts, 1), _MAX_GROUP).bit_length() - 1)


def _virtual_tokens(
    rows: Int32[Array, "m room"],
    counts: Int32[Array, "m lines"],
    weights: Float[Array, "m room c"],
    group: int,
) -> tuple[Int32[Array, "m u g"], Float[Array, "m u g c"], Int32[Array, "m u"]]:
    """Cuts the selections of each line into groups, which are aggregated as tokens are.

    Args:
      rows: received from each device, in the order of lines.
      counts: how many belong to each line.
      weights: of the selections.
      group: selections of a virtual token.

    Returns:
      Rows and weights of virtual tokens, and the line that each belongs to: the number of lines
      for those at the end that hold nothing.
    """
    (size, room), num_lines = rows.shape, counts.shape[1]
    num_virtual = min(room, num_lines + room // group)
    source = jnp.arange(size, dtype=jnp.int32)[:, None]
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    groups = -(-counts // group)
    group_ends = jnp.cumsum(groups, axis=1, dtype=jnp.int32)

    # The line of virtual token u is the number of lines that end at u or before.
    marks = jnp.zeros_like(ends, shape=(size, num_virtual))
    marks = marks.at[source, group_ends].add(1, mode="drop", indices_are_sorted=True)
    line = jnp.cumsum(marks, axis=1, dtype=jnp.int32)
    held = jnp.minimum(line, num_lines - 1)
    before = jnp.arange(num_virtual, dtype=jnp.int32)[None, :] - (group_ends - groups)[source, held]
    first = (ends - counts)[source, held] + before * group
    length = jnp.where(line < num_lines, ends[source, held] - first, 0)

    # A place that holds nothing repeats the last row before it, with no weight.
    within = jnp.arange(group, dtype=jnp.int32)[None, None, :]
    place = first[:, :, None] + jnp.minimum(within, jnp.maximum(length, 1)[:, :, None] - 1)
    place = jnp.clip(place, 0, room - 1)
    present = within < length[:, :, None]
    taken = weights[source[:, :, None], place]
    return rows[source[:, :, None], place], jnp.where(present[..., None], taken, 0), line


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(
    send: Callable[..., Array], num_rounds: Int32[Array, ""], routing: Routing, arrays: tuple
) -> Array:
    """Returns the sum of send(r, routing, arrays) over r < num_rounds, at least the first.

    A loop of unknown length has no reverse derivative of its own: that of a sum is the sum of the
    derivatives. Only the first round keeps what it computed for the backward pass; there is
    seldom another.
    """

    def add(number: Array, total: Array) -> Array:
        return total + send(number, routing, arrays)

    return _later_rounds(num_rounds, add, send(0, routing, arrays))


def _sum_of_rounds_fwd(
    send: Callable[..., Array], num_rounds: Array, routing: Routing, arrays: tuple
) -> tuple[Array, Any]:
    first, first_vjp = jax.vjp(functools.partial(send, 0, routing), arrays)

    def add(number: Array, total: Array) -> Array:
        return total + send(number, routing, arrays)

    total = _later_rounds(num_rounds, add, first)
    return total, (first_vjp, num_rounds, routing, arrays)


def _sum_of_rounds_bwd(send: Callable[..., Array], residuals: Any, total_grad: Array) -> tuple:
    first_vjp, num_rounds, routing, arrays = residuals

    def add(number: Array, grads: tuple) -> tuple:
        _, vjp = jax.vjp(functools.partial(send, number, routing), arrays)
        return jax.tree.map(jnp.add, grads, vjp(total_grad)[0])

    return None, None, _later_rounds(num_rounds, add, first_vjp(total_grad)[0])


_sum_of_rounds.defvjp(_sum_of_rounds_fwd, _sum_of_rounds_bwd)


def _later_rounds[T](num_rounds: Array, add: Callable[[Array, T], T], first: T) -> T:
    """Applies `add(r, total)` for the rounds after the first."""
    _, total = lax.while_loop(
        lambda carry: carry[0] < num_rounds,
        lambda carry: (carry[0] + 1, add(*carry)),
        (jnp.ones_like(num_rounds), first),
    )
    return total


# --- both ---


def _value_aggregation(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p"] | None,
    slots: Int32[Array, "t k"] | None,
    options: _Options,
) -> Float[Array, "t e"]:
    return parallel.value_aggregation(
        _flat(values),
        rows,
        weights,
        pre_values=None if pre_values is None else _flat(pre_values),
        pre_inputs=pre_inputs,
        activation=None if pre_values is None else options.activation,
        slots=slots,
        num_slots=options.num_slots,
        chunk_size=options.chunk_size,
        implementation=options.implementation,
    )


def _flat(table: Float[Array, "l n d"]) -> Float[Array, "ln d"]:
    return table.reshape(-1, table.shape[-1])


def smallest_dtype(num_values: int) -> np.dtype:
    """Returns the smallest integer type that holds 0, ..., num_values - 1."""
    return np.min_scalar_type(num_values - 1)


def _varying(arrays: Any, axis: str) -> Any:
    """Makes arrays vary over `axis` and every other mesh axis that one of them varies over.

    The gradient of a table that others hold too is then summed where it leaves this device's code.
    """

    def varying(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset({axis}).union(*map(varying, jax.tree.leaves(arrays)))

    def vary(array: Array) -> Array:
        missing = tuple(sorted(axes - varying(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, arrays)
