"""Tables sharded by rows: selections are routed to the devices that own their rows.

The owners return partial sums to the tokens. No selection is dropped: those that exceed the fixed
capacity of the buffers are sent in a further round.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from umv2.model.memory.exchange.local import Masters, Options, divisors, fault, pool

# Extra capacity of a round over an even load: this fraction of it or, if larger (small loads), this
# many standard deviations of the load under uniformly random selection.
_SLACK, _DEVIATIONS = 0.25, 5
_MAX_GROUP = 8


def row_sizes(num_values: int) -> list[int]:
    """Returns the numbers of devices over which tables can be sharded by rows, ascending."""
    return divisors(num_values)


def row_fault(num_values: int, size: int) -> str | None:
    """Returns why tables cannot be sharded by rows over `size` devices, or None if they can."""
    return fault(size, row_sizes(num_values), f"the {num_values} rows of a table")


class Groups(NamedTuple):
    """How selections are packed into groups for sending.

    A line is one slot of one token. The selections of a line with the same owner are packed into
    groups, each of which value aggregation treats as a token.

    Attributes:
      size: selections per group, a power of two; the last group of a line and owner is padded.
      capacity: maximum number of groups that a device sends to one owner in one round.
    """

    size: int
    capacity: int


def groups(num_tokens: int, top_m: int, num_slots: int, num_owners: int) -> Groups:
    """Returns group size and capacity for an even load, in which all rows are equally likely."""
    num_buckets = num_slots * num_owners
    size = 1 << (min(max(top_m // num_buckets, 1), _MAX_GROUP).bit_length() - 1)
    # Expected number of groups per line and owner.
    expected = sum(_binomial(n, top_m, num_buckets) * -(-n // size) for n in range(top_m + 1))
    even = num_tokens * num_slots * expected
    capacity = math.ceil(even + max(_SLACK * even, _DEVIATIONS * math.sqrt(even)))
    return Groups(
        size, min(-(-capacity // 8) * 8, num_tokens * _arranged_groups(top_m, num_buckets, size))
    )


def _binomial(successes: int, trials: int, sides: int) -> float:
    """Returns the binomial probability of `successes` in `trials`, with p = 1 / sides."""
    if sides == 1:
        return float(successes == trials)
    misses = trials - successes
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(misses + 1)
    return math.exp(ways - successes * math.log(sides) + misses * math.log1p(-1 / sides))


def _arranged_groups(top_m: int, num_buckets: int, size: int) -> int:
    """Returns the number of groups that hold any token's selections, padding included."""
    return -(-(top_m + num_buckets * (size - 1)) // size)


class Routing(NamedTuple):
    """The owner of each of a device's selections.

    Attributes:
      keys: sort keys of each token's selections and padding; weights are sorted by them too.
      rows: rows of the selections, numbered within their owner's shard, in groups.
      lines: line of each group, token * num_slots + slot.
      order: permutation that sorts the groups by owner, then by line.
      ends: end of each owner's groups in this order.
      num_rounds: number of rounds until all devices have sent all groups; at least 1.
      first_master: [1], the table of the copy that table 0 of the masters is; None without masters.
    """

    keys: Int32[Array, "t w"]
    rows: Int32[Array, "n g"]
    lines: Int32[Array, " n"]
    order: Int32[Array, " n"]
    ends: Int32[Array, " m"]
    num_rounds: Int32[Array, ""]
    first_master: Int32[Array, "1"] | None = None


def route(
    rows: Int32[Array, "t k"],
    slots: Int32[Array, "t k"] | None,
    *,
    own_rows: int,
    num_slots: int,
    axis: str,
) -> Routing:
    """Groups this device's selections by the owners of their rows.

    Uses one sort of each token's selections and one sort of the groups, because accelerators sort
    in parallel but serialise data-dependent gathers and scatters.

    Args:
      rows: selected rows, numbered table * N + row.
      slots: slots of the selections.
      own_rows: number of rows per table that each device owns, N/M.
      num_slots: output slots per token.
      axis: the mesh axis over which rows are sharded.
    """
    num_owners, (num_tokens, top_m) = lax.axis_size(axis), rows.shape
    num_buckets = num_owners * num_slots
    group, capacity = groups(num_tokens, top_m, num_slots, num_owners)
    table, row = rows // (own_rows * num_owners), rows % (own_rows * num_owners)
    bucket = row // own_rows * num_slots + (0 if slots is None else slots)
    local = table * own_rows + row % own_rows
    every = jnp.arange(num_buckets, dtype=jnp.int32)
    counts = jnp.sum(bucket[:, :, None] == every[None, None, :], axis=1, dtype=jnp.int32)

    # Pad the last group of each bucket; unused padding gets bucket num_buckets, which sorts last.
    width = _arranged_groups(top_m, num_buckets, group) * group
    fill = jnp.arange(group - 1, dtype=jnp.int32)[None, None, :] < (-counts % group)[:, :, None]
    fill = jnp.where(fill, every[None, :, None], num_buckets).reshape(num_tokens, -1)
    bucket = jnp.concatenate([bucket, fill], axis=1)
    spare = width - bucket.shape[1]
    bucket = jnp.pad(bucket, ((0, 0), (0, spare)), constant_values=num_buckets)
    keys = bucket * width + jnp.arange(width, dtype=jnp.int32)[None, :]
    local = jnp.pad(local, ((0, 0), (0, width - top_m)))
    sorted_keys, local = lax.sort((keys, local), dimension=1, num_keys=1, is_stable=False)
    local, sorted_keys = local.reshape(-1, group), sorted_keys.reshape(-1, group)
    # Padding repeats a selected row of its group: an arbitrary row might not be finite, and its
    # weight of zero would not cancel it.
    local = jnp.where(sorted_keys % width < top_m, local, local[:, :1])

    bucket = sorted_keys[:, 0] // width
    token = lax.iota(jnp.int32, bucket.size) // (width // group)
    _, order = lax.sort_key_val(bucket // num_slots, lax.iota(jnp.int32, bucket.size))
    owned = jnp.sum(-(-counts // group), axis=0, dtype=jnp.int32).reshape(num_owners, num_slots)
    owned = jnp.sum(owned, axis=1, dtype=jnp.int32)
    most = -(-jnp.max(owned) // capacity)
    # All devices must run the same number of rounds, or their collectives would deadlock.
    num_rounds = lax.pmax(most, tuple(sorted(jax.typeof(most).manual_axis_type.varying)))
    ends = jnp.cumsum(owned, dtype=jnp.int32)
    lines = token * num_slots + bucket % num_slots
    return Routing(keys, local, lines, order, ends, num_rounds)


@jax.custom_vjp
def _arrange(keys: Int32[Array, "t w"], weights: Float[Array, "t w c"]) -> Float[Array, "t w c"]:
    """Sorts weights by keys, where key % w is the position of a weight; its VJP is a sort too."""
    columns = tuple(jnp.moveaxis(weights, -1, 0))
    return jnp.stack(lax.sort((keys, *columns), dimension=1, is_stable=False)[1:], axis=-1)


def _arrange_fwd(keys: Array, weights: Array) -> tuple[Array, Array]:
    return _arrange(keys, weights), keys


def _arrange_bwd(keys: Array, arranged_grad: Array) -> tuple[None, Array]:
    positions = lax.sort(keys, dimension=1, is_stable=False) % keys.shape[1]
    return None, _arrange(positions, arranged_grad)


_arrange.defvjp(_arrange_fwd, _arrange_bwd)


def pool_rows(
    values: Float[Array, "l n v"],
    pre_values: Float[Array, "l n p"] | None,
    rows: Int32[Array, "t k"],
    weights: Float[Array, "t k c"],
    pre_inputs: Float[Array, "t p"] | None,
    slots: Int32[Array, "t k"] | None,
    masters: Masters | None,
    options: Options,
) -> Float[Array, "t e"]:
    """Pools the rows selected by this device's tokens, on the devices that own them."""
    own_rows, num_slots = values.shape[1], options.num_slots
    num_tokens, top_m, num_cores = weights.shape
    routing = route(rows, slots, own_rows=own_rows, num_slots=num_slots, axis=options.axis)
    if pre_inputs is not None:
        pre_inputs = lax.all_gather(pre_inputs.astype(options.dtype), options.axis)
    filled = ((0, 0), (0, routing.keys.shape[1] - top_m), (0, 0))
    weights = _arrange(routing.keys, jnp.pad(weights.astype(options.dtype), filled))
    weights = weights.reshape(*routing.rows.shape, num_cores)
    trained = None
    if masters is not None:
        routing = routing._replace(first_master=masters.first_table)
        trained = (masters.values, masters.pre_values)
    arrays = (values, pre_values, weights, pre_inputs, trained)
    send = functools.partial(_round, options, num_tokens, top_m)
    sums = _sum_of_rounds(send, routing.num_rounds, routing, arrays)
    sums = sums.reshape(-1, sums.shape[-1]).astype(options.dtype)
    return lax.psum_scatter(sums, options.axis, tiled=True).reshape(num_tokens, -1)


def _round(
    options: Options,
    num_tokens: int,
    top_m: int,
    number: Int[Array, ""] | int,
    routing: Routing,
    arrays: tuple,
) -> Float[Array, "m lines v"]:
    """Runs one round: returns this device's partial sums for the lines of all devices."""
    values, pre_values, weights, pre_inputs, trained = arrays
    masters = None
    if trained is not None and routing.first_master is not None:
        own_values, own_pre_values = trained
        masters = Masters(own_values, own_pre_values, routing.first_master)
    axis, num_slots, num_owners = options.axis, options.num_slots, lax.axis_size(options.axis)
    group, capacity = groups(num_tokens, top_m, num_slots, num_owners)
    num_lines = num_tokens * num_slots

    starts = jnp.concatenate([jnp.zeros_like(routing.ends[:1]), routing.ends[:-1]])
    position = jnp.arange(capacity, dtype=jnp.int32)[None, :] + number * capacity + starts[:, None]
    sent = position < routing.ends[:, None]
    chosen = routing.order[jnp.minimum(position, routing.order.size - 1)]
    # Positions after an owner's last group send some other group, with weight 0 and line num_lines,
    # which is out of bounds and dropped.
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
    pooled = pool(
        values,
        pre_values,
        rows.reshape(-1, group),
        weights.reshape(-1, *weights.shape[2:]),
        pre_inputs,
        None,
        masters,
        options._replace(num_slots=1, chunk_size=chunk_size),
    )
    pooled = pooled.reshape(num_owners, capacity, -1)
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
    """Returns the sum of send(r, routing, arrays) over rounds r < num_rounds, at least the first.

    JAX cannot reverse-differentiate a loop of unknown length, so the VJP sums the VJPs of the
    rounds. Only the first round saves residuals; later ones, which are rare, are recomputed.
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
    """Applies `total = add(r, total)` for all rounds r after the first."""
    _, total = lax.while_loop(
        lambda carry: carry[0] < num_rounds,
        lambda carry: (carry[0] + 1, add(*carry)),
        (jnp.ones_like(num_rounds), first),
    )
    return total
