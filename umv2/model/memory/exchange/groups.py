"""How selections are packed into groups, and how many groups a device sends: arithmetic alone."""

import functools
import math
from typing import NamedTuple

# Extra capacity of the first round over an even load: this fraction of it or, if larger (small
# loads), this many standard deviations of the load under uniformly random selection. Unused
# capacity costs as much as groups in use. If popularity follows Zipf's law, the fullest owner of
# rows of a shuffled table receives 1.03 to 1.05 times the even load with exponent 0.6, 1.08 to 1.19
# times with 0.8, and at most 1.24 times with 1.2 (experiments/results/README.md).
_SLACK, _DEVIATIONS = 0.125, 5
# Later rounds have this fraction of the capacity of the first: an overflow costs little more than
# the missing capacity would have.
_LATER = 1 / 8
# Traffic of a group relative to that of a selection: see `groups`.
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

    Large groups have more padding, small ones are more numerous; the size minimizes the traffic of
    both. A selection, or its padding, moves a row: fetched forward and backward, and added to the
    table's gradient, 16 bytes a column. A group moves a pooled value and a pre-input, together as
    wide as a row, and their gradients: packed, sent and summed in bfloat16, and accumulated in
    float32, about 30 bytes a column of memory, and 4 of links that are 4 (TPU) to 10 (GPU) times
    slower; so 3 to 4.5 times as much. Sizes above two are multiples of four, the rows that kernels
    fetch at a time.
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
    return Groups(size, min(capacity, all_groups), _whole(capacity * _LATER))


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
