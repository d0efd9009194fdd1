"""Value aggregation over tables that are sharded by rows or by columns."""

from umv2.model.memory.exchange.aggregate import Layout, aggregate
from umv2.model.memory.exchange.columns import column_fault, column_sizes, own_cores
from umv2.model.memory.exchange.groups import Groups, groups
from umv2.model.memory.exchange.local import Activation, Masters, smallest_dtype
from umv2.model.memory.exchange.rows import (
    Routing,
    first_round_only,
    route,
    row_fault,
    row_sizes,
)

__all__ = [
    "Activation",
    "Groups",
    "Layout",
    "Masters",
    "Routing",
    "aggregate",
    "column_fault",
    "column_sizes",
    "first_round_only",
    "groups",
    "own_cores",
    "route",
    "row_fault",
    "row_sizes",
    "smallest_dtype",
]
