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
float32 (float64 for float64). JAX differentiates the collectives.
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

from umv2 import kernels, sharding

Layout = Literal["whole", "columns", "rows"]
Activation = Literal["gelu", "silu", "relu"] | None

# Room for groups of selections in a round beyond an even load: a share of it, or, where loads are
# small, this many standard deviations of what falls on a device when rows are picked at random.
_SLACK, _DEVIATIONS = 0.25, 5
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
    axis: str = sharding.MEMORY,
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
    return exchange(*kernels.vary_alike(arrays, (axis,)), options).astype(accumulation)


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
        partial = kernels.row_products(
            _flat(pre_values),
            rows,
            own_inputs,
            chunk_size=options.chunk_size,
            implementation=options.implementation,
        )
        pre_scores = lax.psum_scatter(partial.astype(options.dtype), axis, tiled=True)
        gates = kernels.activate(pre_scores.astype(partial.dtype), options.activation)
        weights = weights * gates[:, :, None]
    weights = _own_weights(weights, axis, options.dtype)
    if slots is not None:
        slots = lax.all_gather(slots.astype(smallest_dtype(num_slots)), axis, tiled=True)
        slots = slots.astype(jnp.int32)
    pooled = _value_aggregation(values, None, rows, weights, None, slots, options)
    pooled = pooled.astype(options.dtype).reshape(-1, num_slots, values.shape[-1])
    return lax.all_to_all(pooled, axis, 0, 2, tiled=True).reshape(num_tokens, -1)


def _own_weights(
    weights: Float[Array, "t k c"], axis: str, dtype: DTypeLike
) -> Float[Array, "mt k own"]:
    """Returns, for all tokens, the weights of the cores that this device's columns belong to."""
    num_cores = weights.shape[-1]
    if num_cores == 1:
        return lax.all_gather(weights.astype(dtype), axis, tiled=True)
    # Devices that share a core get copies of its weights; their gradients are summed unrounded.
    copies = own_cores(num_cores, lax.axis_size(axis)) * lax.axis_size(axis) // num_cores
    weights = jnp.repeat(weights, copies, axis=2).astype(dtype)
    return lax.all_to_all(weights, axis, 2, 0, tiled=True)


# --- rows ---


class Groups(NamedTuple):
    """How selections are sent: in groups of one line, a token's selections of one slot.

    Attributes:
      size: selections that a group holds at most, a power of two: a line's at an owner are cut into
        groups of it, and value aggregation takes each for a token.
      room: groups that a device sends to each owner in one round, at most.
    """

    size: int
    room: int


def groups(num_tokens: int, top_m: int, num_slots: int, num_owners: int) -> Groups:
    """Returns the groups that suit an even load: each row as likely to be selected as any."""
    kinds = num_slots * num_owners
    size = 1 << (min(max(top_m // kinds, 1), _MAX_GROUP).bit_length() - 1)
    # The groups that a line is expected to have at an owner.
    expected = sum(_binomial(n, top_m, kinds) * -(-n // size) for n in range(top_m + 1))
    even = num_tokens * num_slots * expected
    room = math.ceil(even + max(_SLACK * even, _DEVIATIONS * math.sqrt(even)))
    return Groups(size, min(-(-room // 8) * 8, num_tokens * _arranged_groups(top_m, kinds, size)))


def _binomial(successes: int, trials: int, sides: int) -> float:
    """The probability that of so many throws of fair dice so many show a certain side."""
    if sides == 1:
        return float(successes == trials)
    misses = trials - successes
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(misses + 1)
    return math.exp(ways - successes * math.log(sides) + misses * math.log1p(-1 / sides))


def _arranged_groups(top_m: int, kinds: int, size: int) -> int:
    """Groups that any token's selections fit into, when each kind fills its last one up."""
    return -(-(top_m + kinds * (size - 1)) // size)


class Routing(NamedTuple):
    """Which of a device's selections go to whom.

    Attributes:
      keys: of each token's selections and of what fills groups up; weights are sorted by them.
      rows: rows of their owner's part of the tables, in groups.
      lines: of the groups, token * num_slots + slot.
      order: of the groups when sorted by owner, lines rising.
      ends: where the groups of each owner end among those.
      num_rounds: rounds that it takes until all devices have sent all groups; at least 1.
    """

    keys: Int32[Array, "t w"]
    rows: Int32[Array, "n g"]
    lines: Int32[Array, " n"]
    order: Int32[Array, " n"]
    ends: Int32[Array, " m"]
    num_rounds: Int32[Array, ""]


def route(
    rows: Int32[Array, "t k"],
    slots: Int32[Array, "t k"] | None,
    *,
    own_rows: int,
    num_slots: int,
    axis: str,
) -> Routing:
    """Groups this device's selections by the devices that own their rows.

    Sorts of each token's selections, and one of the groups, do it: accelerators sort side by side,
    but fetch and add elements at places that the data name one by one.

    Args:
      rows: table * N + row.
      slots: of the selections.
      own_rows: rows of each table that a device owns, N/M.
      num_slots: slots of a token.
      axis: the mesh axis over which rows are divided.
    """
    num_owners, (num_tokens, top_m) = lax.axis_size(axis), rows.shape
    kinds = num_owners * num_slots
    group, room = groups(num_tokens, top_m, num_slots, num_owners)
    table, row = rows // (own_rows * num_owners), rows % (own_rows * num_owners)
    kind = row // own_rows * num_slots + (0 if slots is None else slots)
    local = table * own_rows + row % own_rows
    every = jnp.arange(kinds, dtype=jnp.int32)
    counts = jnp.sum(kind[:, :, None] == every[None, None, :], axis=1, dtype=jnp.int32)

    # What fills up the last group of each kind; the rest has no kind, and comes last.
    width = _arranged_groups(top_m, kinds, group) * group
    fill = jnp.arange(group - 1, dtype=jnp.int32)[None, None, :] < (-counts % group)[:, :, None]
    fill = jnp.where(fill, every[None, :, None], kinds).reshape(num_tokens, -1)
    kind = jnp.concatenate([kind, fill], axis=1)
    spare = width - kind.shape[1]
    kind = jnp.pad(kind, ((0, 0), (0, spare)), constant_values=kinds)
    keys = kind * width + jnp.arange(width, dtype=jnp.int32)[None, :]
    local = jnp.pad(local, ((0, 0), (0, width - top_m)))
    sorted_keys, local = lax.sort((keys, local), dimension=1, num_keys=1, is_stable=False)
    local, sorted_keys = local.reshape(-1, group), sorted_keys.reshape(-1, group)
    # Its row is one that the token has selected: zero times a row that is not finite is not zero.
    local = jnp.where(sorted_keys % width < top_m, local, local[:, :1])

    kind = sorted_keys[:, 0] // width
    token = lax.iota(jnp.int32, kind.size) // (width // group)
    _, order = lax.sort_key_val(kind // num_slots, lax.iota(jnp.int32, kind.size))
    owned = jnp.sum(-(-counts // group), axis=0, dtype=jnp.int32).reshape(num_owners, num_slots)
    owned = jnp.sum(owned, axis=1, dtype=jnp.int32)
    most = -(-jnp.max(owned) // room)
    # All devices of the mesh agree: the rounds of some must not wait for those of others.
    num_rounds = lax.pmax(most, tuple(sorted(jax.typeof(most).manual_axis_type.varying)))
    ends = jnp.cumsum(owned, dtype=jnp.int32)
    lines = token * num_slots + kind % num_slots
    return Routing(keys, local, lines, order, ends, num_rounds)


@jax.custom_vjp
def _arrange(keys: Int32[Array, "t w"], weights: Float[Array, "t w c"]) -> Float[Array, "t w c"]:
    """Sorts weights by keys, key modulo w being a weight's place: so does its derivative."""
    columns = tuple(jnp.moveaxis(weights, -1, 0))
    return jnp.stack(lax.sort((keys, *columns), dimension=1, is_stable=False)[1:], axis=-1)


def _arrange_fwd(keys: Array, weights: Array) -> tuple[Array, Array]:
    return _arrange(keys, weights), keys


def _arrange_bwd(keys: Array, arranged_grad: Array) -> tuple[None, Array]:
    places = lax.sort(keys, dimension=1, is_stable=False) % keys.shape[1]
    return None, _arrange(places, arranged_grad)


_arrange.defvjp(_arrange_fwd, _arrange_bwd)


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
    num_tokens, top_m, num_cores = weights.shape
    routing = route(rows, slots, own_rows=own_rows, num_slots=num_slots, axis=options.axis)
    if pre_inputs is not None:
        pre_inputs = lax.all_gather(pre_inputs.astype(options.dtype), options.axis)
    filled = ((0, 0), (0, routing.keys.shape[1] - top_m), (0, 0))
    weights = _arrange(routing.keys, jnp.pad(weights.astype(options.dtype), filled))
    weights = weights.reshape(*routing.rows.shape, num_cores)
    arrays = (values, pre_values, weights, pre_inputs)
    send = functools.partial(_round, options, num_tokens, top_m)
    sums = _sum_of_rounds(send, routing.num_rounds, routing, arrays)
    sums = sums.reshape(-1, sums.shape[-1]).astype(options.dtype)
    return lax.psum_scatter(sums, options.axis, tiled=True).reshape(num_tokens, -1)


def _round(
    options: _Options,
    num_tokens: int,
    top_m: int,
    number: Int[Array, ""] | int,
    routing: Routing,
    arrays: tuple,
) -> Float[Array, "m lines v"]:
    """Returns this device's part of the pooled lines of all devices, of one round's selections."""
    values, pre_values, weights, pre_inputs = arrays
    axis, num_slots, num_owners = options.axis, options.num_slots, lax.axis_size(options.axis)
    group, room = groups(num_tokens, top_m, num_slots, num_owners)
    num_lines = num_tokens * num_slots

    starts = jnp.concatenate([jnp.zeros_like(routing.ends[:1]), routing.ends[:-1]])
    place = jnp.arange(room, dtype=jnp.int32)[None, :] + number * room + starts[:, None]
    sent = place < routing.ends[:, None]
    chosen = routing.order[jnp.minimum(place, routing.order.size - 1)]
    # Beyond an owner's last group stands some other, without weight and of a line that none has.
    lines = jnp.where(sent, routing.lines[chosen], num_lines)
    weights = jnp.where(sent[:, :, None, None], weights[chosen], 0)
    rows, lines, weights = (
        lax.all_to_all(x, axis, 0, 0, tiled=True) for x in (routing.rows[chosen], lines, weights)
    )
    if pre_inputs is not None:
        source = jnp.arange(num_owners, dtype=jnp.int32)[:, None]
        token = lines // num_slots
        pre_inputs = pre_inputs.at[source, token].get(mode="fill", fill_value=0)
        pre_inputs = pre_inputs.reshape(-1, pre_inputs.shape[-1])
    chunk_size = options.chunk_size and max(1, options.chunk_size * top_m // group)
    pooled = _value_aggregation(
        values,
        pre_values,
        rows.reshape(-1, group),
        weights.reshape(-1, *weights.shape[2:]),
        pre_inputs,
        None,
        options._replace(num_slots=1, chunk_size=chunk_size),
    )
    pooled = pooled.reshape(num_owners, room, -1)
    add = jax.vmap(
        lambda sums, line, terms: sums.at[line].add(terms, mode="drop", indices_are_sorted=True)
    )
    return add(
        jnp.zeros_like(pooled, shape=(num_owners, num_lines, pooled.shape[-1])), lines, pooled
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(
    send: Callable[..., Array], num_rounds: Int32[Array, ""], routing: Routing, arrays: tuple
) -> Array:
    """Returns the sum of send(r, routing, arrays) over r < num_rounds, at least the first.

    A loop of unknown length has no reverse derivative of its own: that of a sum is the sum of the
    derivatives. Only the first round keeps what it computed for the backward pass; there is
    seldom another.
    """
    return _sum_of_rounds_fwd(send, num_rounds, routing, arrays)[0]


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
    return kernels.value_aggregation(
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
