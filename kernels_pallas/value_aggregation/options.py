"""What the backends of value aggregation are told besides the arrays."""

from typing import NamedTuple

from kernels_pallas.value_aggregation.reference import Activation


class Options(NamedTuple):
    """Arguments of `value_aggregation` that are known while tracing, checked and complete."""

    activation: Activation | None
    num_slots: int
    chunk_size: int
