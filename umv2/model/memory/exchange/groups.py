"""How selections are packed into groups, and how many groups a device sends: arithmetic alone."""

import functools
import math
from typing import NamedTuple

# Extra capacity of the first round over an even load: this fraction of it or, if larger (small
# loads), this many standard deviations of the load under uniformly random selection.
_SLACK, _DEVIATIONS = 0.125, 5
# Later rounds, which are rare, have this fraction of the capacity of the first.
_LATER = 8
# The bytes moved for a group of one selection, relative to those of the selection: see `groups`.
_GROUP_COST = 4


class Groups(NamedTuple):
    """How selections are packed into groups for sending.

    A line is one slot of one token. The selections of a line with the same owner are packed into
    groups, each of which value aggregation treats as a token.

    Attributes:
      size: selections per group; the last group of a line and owner is padded.
      capacity: maximum number of groups that a device sends to one owner in the first round.
      later: the same in every further round.
    """

    size: int
    capacity: int
    later: int


@functools.cache
def groups(num_tokens: int, top_m: int, num_slots: int, num_owners: int) -> Groups:
    """Returns group size and capacities for an even load, in which all rows are equally likely.

    Large groups are padded more, small ones are more numerous. A selection costs the memory traffic
    of its row: fetched forward and backward, and added to the table's gradient, 16 bytes a column.
    A group costs its pooled value and its pre-input, and their gradients, which are as wide as a
    row: packed, sent and summed in the compute dtype, and accumulated in float32, in all about 30
    bytes a column of memory traffic, and 4 bytes a column of links that are 4 (TPU) to 10 (GPU)
    times slower: 3 to 4.5 times as much. The size minimizes the sum of both. Since kernels fetch
    four rows at a time, sizes above two are multiples of four.
    """
    num_buckets = num_slots * num_owners
    probabilities = [_binomial(n, top_m, num_buckets) for n in range(top_m + 1)]

    def expected(size: int) -> float:
        """Returns the expected number of groups per line and owner."""
        return sum(p * -(-n // size) for n, p in enumerate(probabilities))

    sizes = (1, 2, *range(4, top_m + 1, 4))
    size = min(sizes, key=lambda size: expected(size) * (size + _GROUP_COST))
    even = num_tokens * num_slots * expected(size)
    capacity = _whole(even + max(_SLACK * even, _DEVIATIONS * math.sqrt(even)))
    all_groups = num_tokens * arranged_groups(top_m, num_buckets, size)
    return Groups(size, min(capacity, all_groups), _whole(capacity / _LATER))


def _whole(capacity: float) -> int:
    """Rounds a capacity up to a multiple of 8."""
    return -(-math.ceil(capacity) // 8) * 8


def _binomial(successes: int, trials: int, sides: int) -> float:
    """Returns the binomial probability of `successes` in `trials`, with p = 1 / sides."""
    if sides == 1:
        return float(successes == trials)
    misses = trials - successes
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(misses + 1)
    return math.exp(ways - successes * math.log(sides) + misses * math.log1p(-1 / sides))


def arranged_groups(top_m: int, num_buckets: int, size: int) -> int:
    """Returns the number of groups that hold any token's selections, padding included."""
    return -(-(top_m + num_buckets * (size - 1)) // size)
