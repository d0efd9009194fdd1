"""Tables sharded by rows: selections are routed to the devices that own their rows.

A device packs its selections into groups and sends them to the owners, which pool each group and
return it; the device sums the groups of each token. No selection is dropped: those that exceed the
fixed capacity of the buffers are sent in further rounds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from umv2.kernels import RARE
from umv2.model.memory.exchange.groups import Groups, arranged_groups, groups
from umv2.model.memory.exchange.local import Masters, Options, divisors, fault, pool
from umv2.model.rematerialization import keep
from umv2.types import accumulation_dtype

# Within `with first_round_only(True):`, traced programs have no rounds after the first, and drop
# the selections beyond its capacity. For planning: later rounds normally do not run, but take most
# of the time to compile.
first_round_only = jax.make_user_context(default_value=False)

# `_collect` sums this many groups of every token at a time, for small temporaries. XLA for GPUs
# fuses a gather into a sum of less than 32 terms.
_BLOCK = 16


def row_sizes(num_values: int) -> list[int]:
    """Returns the numbers of devices over which tables can be sharded by rows, ascending."""
    return divisors(num_values)


def row_fault(num_values: int, size: int) -> str | None:
    """Returns why tables cannot be sharded by rows over `size` devices, or None if they can."""
    return fault(size, row_sizes(num_values), f"the {num_values} rows of a table")


class Routing(NamedTuple):
    """The owner of each of a device's selections.

    The groups of a token are numbered by owner, then by slot; unused groups come last.

    Attributes:
      keys: sort keys of each token's selections and padding; weights are sorted by them too.
      rows: rows of the selections, numbered within their owner's shard, in groups.
      slots: slot of each group.
      owners: owner of each group.
      ranks: position of each group among all groups of its owner, by token; -1 for unused groups.
      order: permutation that sorts the groups by owner, then by rank.
      ends: end of each owner's groups in this order.
      num_rounds: number of rounds until all devices have sent all groups; at least 1.
      masters: the masters, whose tables are passed apart, since they get gradients; or None.
    """

    keys: Int32[Array, "t w"]
    rows: Int32[Array, "t a g"]
    slots: Int32[Array, "t a"]
    owners: Int32[Array, "t a"]
    ranks: Int32[Array, "t a"]
    order: Int32[Array, " ta"]
    ends: Int32[Array, " m"]
    num_rounds: Int32[Array, ""]
    masters: Any = None


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
    sizes = groups(num_tokens, top_m, num_slots, num_owners)
    group, arranged = sizes.size, arranged_groups(top_m, num_buckets, sizes.size)
    table, row = rows // (own_rows * num_owners), rows % (own_rows * num_owners)
    bucket = row // own_rows * num_slots + (0 if slots is None else slots)
    local = table * own_rows + row % own_rows
    every = jnp.arange(num_buckets, dtype=jnp.int32)
    counts = jnp.sum(bucket[:, :, None] == every[None, None, :], axis=1, dtype=jnp.int32)

    # Pad the last group of each bucket; unused padding gets bucket num_buckets, which sorts last.
    width = arranged * group
    fill = jnp.arange(group - 1, dtype=jnp.int32)[None, None, :] < (-counts % group)[:, :, None]
    fill = jnp.where(fill, every[None, :, None], num_buckets).reshape(num_tokens, -1)
    bucket = jnp.concatenate([bucket, fill], axis=1)
    spare = width - bucket.shape[1]
    bucket = jnp.pad(bucket, ((0, 0), (0, spare)), constant_values=num_buckets)
    keys = bucket * width + jnp.arange(width, dtype=jnp.int32)[None, :]
    local = jnp.pad(local, ((0, 0), (0, width - top_m)))
    sorted_keys, local = lax.sort((keys, local), dimension=1, num_keys=1, is_stable=False)
    local, sorted_keys = (x.reshape(num_tokens, arranged, group) for x in (local, sorted_keys))
    # Padding repeats a selected row of its group: an arbitrary row might not be finite, and its
    # weight of zero would not cancel it.
    local = jnp.where(sorted_keys % width < top_m, local, local[:, :, :1])

    bucket = sorted_keys[:, :, 0] // width
    owners = bucket // num_slots
    _, order = lax.sort_key_val(owners.reshape(-1), lax.iota(jnp.int32, owners.size))
    owned = -(-counts // group).reshape(num_tokens, num_owners, num_slots)
    owned = jnp.sum(owned, axis=2, dtype=jnp.int32)
    ranks = _ranks(owners, owned)
    owned = jnp.sum(owned, axis=0, dtype=jnp.int32)
    rest = jnp.maximum(jnp.max(owned) - sizes.capacity, 0)
    most = 1 + -(-rest // sizes.later)
    # All devices must run the same number of rounds, or their collectives would deadlock.
    num_rounds = lax.pmax(most, tuple(sorted(jax.typeof(most).manual_axis_type.varying)))
    ends = jnp.cumsum(owned, dtype=jnp.int32)
    return Routing(keys, local, bucket % num_slots, owners, ranks, order, ends, num_rounds)


def _ranks(owners: Int32[Array, "t a"], owned: Int32[Array, "t m"]) -> Int32[Array, "t a"]:
    """Returns the position of each group among all groups of its owner, or -1 if it has none.

    Args:
      owners: owner of each group; those of a token are contiguous.
      owned: number of groups of each token and owner.
    """
    earlier = jnp.cumsum(owned, axis=0, dtype=jnp.int32) - owned  # of earlier tokens
    first = jnp.cumsum(owned, axis=1, dtype=jnp.int32) - owned
    index = jnp.arange(owners.shape[1], dtype=jnp.int32)[None, :, None]
    matches = owners[:, :, None] == jnp.arange(owned.shape[1], dtype=jnp.int32)[None, None, :]
    ranks = (earlier - first)[:, None, :] + index
    return jnp.sum(jnp.where(matches, ranks + 1, 0), axis=2, dtype=jnp.int32) - 1


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


class _Buffer(NamedTuple):
    """Where the groups of each line stand in the buffer of a round: a 0/1 matrix, both ways.

    Attributes:
      lines: line of each place of the buffer, by owner.
      filled: whether the place is used; otherwise its line is arbitrary.
      places: place of each group of each token, as an index into the flat buffer.
      sent: whether the group is in the buffer, at the slot of its line.
    """

    lines: Int32[Array, "m c"]
    filled: Bool[Array, "m c"]
    places: Int32[Array, "t a"]
    sent: Bool[Array, "t a s"]


@jax.custom_vjp
def _spread(x: Float[Array, "t s d"], buffer: _Buffer) -> Float[Array, "m c d"]:
    """Copies each line to the places of its groups; the transpose of `_collect`.

    JAX would transpose a gather to a scatter into zeros, and scatters are slow.
    """
    lines = x.reshape(-1, x.shape[-1]).at[buffer.lines].get(mode="promise_in_bounds")
    return jnp.where(buffer.filled[:, :, None], lines, 0)


@jax.custom_vjp
def _collect(packed: Float[Array, "m c d"], buffer: _Buffer) -> Float[Array, "t s d"]:
    """Sums the groups of each line, in at least float32; the transpose of `_spread`."""
    num_tokens, num_groups, num_slots = buffer.sent.shape
    num_blocks = -(-num_groups // _BLOCK)
    flat = packed.reshape(-1, packed.shape[-1])

    def blocks(x: Array) -> Array:
        """[t, a, ...] to [block, t, a / blocks, ...]."""
        spare = ((0, 0), (0, -num_groups % num_blocks), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, spare).reshape(num_tokens, num_blocks, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def add(sums: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        places, sent = block
        terms = flat.at[places].get(mode="promise_in_bounds")[:, :, None, :]
        terms = jnp.where(sent[:, :, :, None], terms, 0)
        return sums + jnp.sum(terms, axis=1, dtype=sums.dtype), None

    dtype = accumulation_dtype(packed.dtype)
    # Unlike zeros, zeros_like keeps the manual axes over which an array varies inside shard_map.
    sums = jnp.zeros_like(packed, dtype, shape=(num_tokens, num_slots, packed.shape[-1]))
    sums, _ = lax.scan(add, sums, (blocks(buffer.places), blocks(buffer.sent)))
    return sums.astype(packed.dtype)


def _spread_fwd(x: Array, buffer: _Buffer) -> tuple[Array, _Buffer]:
    return _spread(x, buffer), buffer


def _collect_fwd(packed: Array, buffer: _Buffer) -> tuple[Array, _Buffer]:
    return _collect(packed, buffer), buffer


_spread.defvjp(_spread_fwd, lambda buffer, grad: (_collect(grad, buffer), None))
_collect.defvjp(_collect_fwd, lambda buffer, grad: (_spread(grad, buffer), None))


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
    num_tokens, top_m, _ = weights.shape
    sizes = groups(num_tokens, top_m, options.num_slots, lax.axis_size(options.axis))
    own_rows = (values if masters is None else masters.tables[0]).shape[1]
    num_slots = options.num_slots
    routing = keep(route(rows, slots, own_rows=own_rows, num_slots=num_slots, axis=options.axis))
    if pre_inputs is not None:
        pre_inputs = pre_inputs.astype(options.dtype)
    filled = ((0, 0), (0, routing.keys.shape[1] - top_m), (0, 0))
    weights = keep(_arrange(routing.keys, jnp.pad(weights.astype(options.dtype), filled)))
    weights = weights.reshape(-1, sizes.size, weights.shape[-1])
    if options.chunk_size:
        chunk_size = max(1, options.chunk_size * top_m // sizes.size)
        options = options._replace(chunk_size=chunk_size)
    trained = None
    if masters is not None:
        trained = masters.tables
        apart: Any = None
        routing = routing._replace(masters=masters._replace(tables=apart))
    arrays = (values, pre_values, weights, pre_inputs, trained)
    sums = _sum_of_rounds(functools.partial(_round, options), sizes, routing, arrays)
    return sums.reshape(num_tokens, -1)


def _round(
    options: Options, capacity: int, start: Int[Array, ""] | int, routing: Routing, arrays: tuple
) -> Float[Array, "t s v"]:
    """Runs one round: returns the sums of the groups of ranks start, ..., start + capacity - 1."""
    values, pre_values, weights, pre_inputs, trained = arrays
    masters = routing.masters and routing.masters._replace(tables=trained)
    _, arranged, group = routing.rows.shape
    all_to_all = functools.partial(
        lax.all_to_all, axis_name=options.axis, split_axis=0, concat_axis=0, tiled=True
    )

    # Unused places send some other group, with weight 0; their pooled values are not read.
    starts = jnp.concatenate([jnp.zeros_like(routing.ends[:1]), routing.ends[:-1]])
    position = jnp.arange(capacity, dtype=jnp.int32)[None, :] + start + starts[:, None]
    filled = position < routing.ends[:, None]
    chosen = routing.order[jnp.minimum(position, routing.order.size - 1)]
    rank = routing.ranks - start
    sent = (rank >= 0) & (rank < capacity)
    places = jnp.where(sent, routing.owners * capacity + rank, 0)
    by_group = _Buffer(chosen, filled, places.reshape(-1, 1), sent.reshape(-1, 1, 1))
    by_token = _Buffer(chosen // arranged, filled, places, sent[:, :, None])
    every = jnp.arange(options.num_slots, dtype=jnp.int32)[None, None, :]
    slots = routing.slots.reshape(-1)[chosen]
    by_line = by_token._replace(
        lines=by_token.lines * options.num_slots + slots,
        sent=sent[:, :, None] & (routing.slots[:, :, None] == every),
    )

    rows = keep(all_to_all(routing.rows.reshape(-1, group)[chosen]))
    num_cores = weights.shape[-1]
    weights = keep(all_to_all(_spread(weights.reshape(-1, 1, group * num_cores), by_group)))
    if pre_inputs is not None:
        pre_inputs = keep(all_to_all(_spread(pre_inputs[:, None, :], by_token)))
        pre_inputs = pre_inputs.reshape(-1, pre_inputs.shape[-1])
    pooled = pool(
        values,
        pre_values,
        rows.reshape(-1, group),
        weights.reshape(-1, group, num_cores),
        pre_inputs,
        None,
        masters,
        options._replace(num_slots=1),
    )
    pooled = pooled.astype(options.dtype).reshape(-1, capacity, pooled.shape[-1])
    # Rounds are added in float32.
    dtype = accumulation_dtype(options.dtype)
    return _collect(all_to_all(pooled), by_line).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_rounds(
    send: Callable[..., Array], sizes: Groups, routing: Routing, arrays: tuple
) -> Array:
    """Returns the sum of send(capacity, start, routing, arrays) over all rounds.

    JAX cannot reverse-differentiate a loop of unknown length, so the VJP sums the VJPs of the
    rounds. Only the first round saves residuals; later ones, which are rare, are recomputed.
    """
    return _sum_of_rounds_fwd(send, sizes, routing, arrays)[0]


def _sum_of_rounds_fwd(
    send: Callable[..., Array], sizes: Groups, routing: Routing, arrays: tuple
) -> tuple[Array, Any]:
    first, first_vjp = jax.vjp(functools.partial(send, sizes.capacity, 0, routing), arrays)

    def add(start: Array, total: Array) -> Array:
        return total + send(sizes.later, start, routing, arrays)

    total = _later_rounds(sizes, routing.num_rounds, add, first)
    return total, (first_vjp, routing, arrays)


def _sum_of_rounds_bwd(
    send: Callable[..., Array], sizes: Groups, residuals: Any, total_grad: Array
) -> tuple:
    first_vjp, routing, arrays = residuals

    def add(start: Array, grads: tuple) -> tuple:
        _, vjp = jax.vjp(functools.partial(send, sizes.later, start, routing), arrays)
        return jax.tree.map(jnp.add, grads, vjp(total_grad)[0])

    return None, _later_rounds(sizes, routing.num_rounds, add, first_vjp(total_grad)[0])


_sum_of_rounds.defvjp(_sum_of_rounds_fwd, _sum_of_rounds_bwd)


def _later_rounds[T](sizes: Groups, num_rounds: Array, add: Callable[[Array, T], T], first: T) -> T:
    """Applies `total = add(start, total)` for the first rank of every round after the first."""
    if first_round_only.value:
        return first

    def step(carry: tuple[Array, T]) -> tuple[Array, T]:
        number, total = carry
        return number + 1, add(sizes.capacity + (number - 1) * sizes.later, total)

    with jax.named_scope(RARE):
        _, total = lax.while_loop(
            lambda carry: carry[0] < num_rounds, step, (jnp.ones_like(num_rounds), first)
        )
    return total
