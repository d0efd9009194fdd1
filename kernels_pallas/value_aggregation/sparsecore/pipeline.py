"""The pipeline of rows through the local memories of SparseCores: windows, rings, streams.

Subcore w of W processes tokens w, w + W, ... A window is the rows of up to `Blocks.rows` selections
of one token. Each step of a subcore prefetches the window `Blocks.slots` - 1 steps ahead, awaits
its own window and computes on it. After the last window of a token, the token's results are sent.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from kernels_pallas.compat import Push, sparsecore_params

_GROUP_ROWS = 8  # a window must start at a multiple of this many ids
_STREAM_GROUPS = 16  # maximum groups per indirect stream
_MAX_SLOTS = 8  # a subcore has 32 semaphores
_GRANULE_BYTES = 32  # HBM granule to which rows are padded
_NUM_RESULTS = 2  # double-buffered results: one is sent while the next is computed
# The compiler reserves some of the local memory.
_USABLE_FRACTION = 0.9


class Chip(NamedTuple):
    """The properties of a chip that the kernels depend on."""

    num_cores: int
    num_subcores: int
    lanes: int
    local_bytes: int  # per subcore


def target_chip() -> Chip | None:
    """The SparseCores of the chip that a call is compiled for, or None if it has none.

    The device kind must be known: see `tuned.device_kind`.
    """
    info = pltpu.get_tpu_info().sparse_core
    if info is None:
        return None
    return Chip(info.num_cores, info.num_subcores, info.num_lanes, info.vmem_capacity_bytes)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the rows of a token pass through local memory."""

    groups: int  # groups of 8 selections per window, fetched by one stream per table
    slots: int  # windows in local memory; all but one are in flight

    @property
    def rows(self) -> int:
        """Selections per window."""
        return self.groups * _GROUP_ROWS


class Arrays(NamedTuple):
    """Shapes of the arrays of a kernel that pass through local memory."""

    tables: dict[str, Any]
    token_inputs: dict[str, Any]  # [T, ...]
    outputs: dict[str, Any]  # [T, ...]
    num_scratch: int  # scratch vectors for each selection of a window


def heuristic(arrays: Arrays, chip: Chip) -> Blocks | None:
    """The longest windows of which three (or two) fit in local memory, and as many as fit.

    Returns None if not even two windows of 8 rows fit. The rows in flight should cover latency x
    bandwidth: at 1.6 TB/s over 32 subcores (v6e) and one or two microseconds, 50 to 100 kB per
    subcore, which is all of its memory. Longer windows amortize the startup of loops and streams.
    Estimated, not measured.
    """
    num_groups = pl.cdiv(arrays.token_inputs["ids"].shape[1], _GROUP_ROWS)

    def fits(groups: int, slots: int) -> bool:
        held = _local_arrays(arrays, Blocks(groups, slots), chip).values()
        return sum(map(_padded_bytes, held)) <= _USABLE_FRACTION * chip.local_bytes

    lengths = range(min(num_groups, _STREAM_GROUPS), 0, -1)
    longest = next((n for slots in (3, 2) for n in lengths if fits(n, slots)), None)
    if longest is None:
        return None
    groups = pl.cdiv(num_groups, pl.cdiv(num_groups, longest))
    return Blocks(groups, next(slots for slots in range(_MAX_SLOTS, 1, -1) if fits(groups, slots)))


class _Rows(NamedTuple):
    """A transfer of table rows: those of `ids` from `first` on, into `target` [count, D]."""

    table: Any
    ids: Any
    first: Any
    target: Any
    arrived: Any
    lanes: int


class IndirectStream(_Rows):
    """One stream for all rows. Its stride is the row length, so rows must not be padded."""

    def start(self) -> None:
        """Starts the stream."""
        self._stream().start()

    def wait(self) -> None:
        """Waits for the stream."""
        self._stream().wait()

    def _stream(self) -> Any:
        ids = self.ids.at[pl.ds(self.first, self.target.shape[0])]
        return pltpu.make_async_copy(self.table.at[ids], self.target, self.arrived)


class RowCopies(_Rows):
    """One copy per row."""

    def start(self) -> None:
        """Starts all copies."""

        @pl.loop(0, self.target.shape[0])
        def _(k: Array) -> None:
            row = self.ids[pl.ds(self.first + k, self.lanes)][0]
            self._copy(k, row).start()

    def wait(self) -> None:
        """Waits for all copies."""

        @pl.loop(0, self.target.shape[0])
        def _(k: Array) -> None:
            self._copy(k, jnp.int32(0)).wait()

    def _copy(self, k: Array, row: Array) -> Any:
        return pltpu.make_async_copy(self.table.at[row], self.target.at[k], self.arrived)


def has_padded_rows(table: Any) -> bool:
    """Whether the rows of this table are padded in HBM."""
    return table.shape[1] * table.dtype.itemsize % _GRANULE_BYTES != 0


def subcores(chip: Chip) -> plsc.VectorSubcoreMesh:
    """All vector subcores of a device."""
    return plsc.VectorSubcoreMesh(
        core_axis_name="core",
        subcore_axis_name="subcore",
        num_cores=chip.num_cores,
        num_subcores=chip.num_subcores,
    )


def this_subcore() -> Array:
    """The index of this vector subcore among all of them."""
    return lax.axis_index(("core", "subcore"))


def run(
    name: str,
    compute: Callable[[dict[str, Any], Any, Any], None],
    arrays: Arrays,
    operands: dict[str, Array],
    blocks: Blocks,
    chip: Chip,
    cost_estimate: pl.CostEstimate,
) -> dict[str, Array]:
    """Calls `compute(refs, num_rows, first_selection)` for every window of every token.

    `refs` maps the names of the arrays, and "scratch", to the buffers of the window and its token
    in local memory.
    """
    local = _local_arrays(arrays, blocks, chip)
    names = (*operands, *arrays.outputs, *(f"local_{key}" for key in local), *_SEMAPHORES)
    frames = local["ids"].shape[0]
    semaphores = (frames,), (blocks.slots,), (_NUM_RESULTS,)

    def kernel(*refs: Any) -> None:
        by_name = dict(zip(names, refs, strict=True))
        _Subcore(by_name, arrays, blocks, frames, chip).run(compute)

    kernel.__name__ = f"_{name}_kernel"
    launch = pl.kernel(
        kernel,
        out_type=tuple(arrays.outputs.values()),
        mesh=subcores(chip),
        scratch_types=[
            *(pltpu.VMEM(x.shape, x.dtype) for x in local.values()),
            *(pltpu.SemaphoreType.DMA(shape) for shape in semaphores),
        ],
        # The kernels need contiguous rows in HBM.
        compiler_params=sparsecore_params(use_tc_tiling_on_sc=False),
        cost_estimate=cost_estimate,
        name=name,
    )
    # Pallas cannot batch arrays that it leaves in HBM, so vmap becomes a loop of calls.
    results = custom_batching.sequential_vmap(launch)(*operands.values())
    return dict(zip(arrays.outputs, results, strict=True))


_SEMAPHORES = ("frames_arrived", "rows_arrived", "results_sent")


class _Subcore:
    """The program of one vector subcore."""

    def __init__(
        self, refs: dict[str, Any], arrays: Arrays, blocks: Blocks, frames: int, chip: Chip
    ) -> None:
        self.refs, self.arrays, self.blocks, self.frames = refs, arrays, blocks, frames
        num_tokens, self.num_selected = arrays.token_inputs["ids"].shape
        self.num_windows = pl.cdiv(self.num_selected, blocks.rows)
        self.last_rows = self.num_selected - (self.num_windows - 1) * blocks.rows
        self.lanes = chip.lanes
        self.num_subcores = chip.num_cores * chip.num_subcores
        self.subcore = this_subcore()
        after = num_tokens - self.subcore + self.num_subcores - 1
        self.num_tokens = lax.div(after, self.num_subcores)
        self.num_steps = self.num_tokens * self.num_windows

    def run(self, compute: Callable[[dict[str, Any], Any, Any], None]) -> None:
        for turn in range(self.frames):
            self.start_frame(jnp.int32(turn))
        for step in range(self.blocks.slots - 1):
            self.start_rows(jnp.int32(step))

        @pl.loop(0, self.num_steps)
        def _step(step: Array) -> None:
            self.start_rows(step + self.blocks.slots - 1)
            self.stream_rows(step, lambda stream: stream.wait())
            turn, window = self.turn_and_window(step)

            @pl.when((window == 0) & (turn >= _NUM_RESULTS))
            def _() -> None:
                self.send_results(turn - _NUM_RESULTS, lambda stream: stream.wait_read())

            is_last = window == self.num_windows - 1
            count = jnp.where(is_last, self.last_rows, self.blocks.rows)
            compute(self.refs_of(step), count, window * self.blocks.rows)

            @pl.when(is_last)
            def _() -> None:
                self.send_results(turn, lambda stream: stream.start())
                self.start_frame(turn + self.frames)

        for back in range(_NUM_RESULTS, 0, -1):

            @pl.when(self.num_tokens >= back)
            def _(back: int = back) -> None:
                self.send_results(self.num_tokens - back, lambda stream: stream.wait())

    def turn_and_window(self, step: Array) -> tuple[Array, Array]:
        """The index of a step's token among those of the subcore, and of its window."""
        return lax.div(step, self.num_windows), lax.rem(step, self.num_windows)

    def refs_of(self, step: Array) -> dict[str, Any]:
        turn, _ = self.turn_and_window(step)
        places = {name: lax.rem(turn, self.frames) for name in self.arrays.token_inputs}
        places |= {name: lax.rem(turn, _NUM_RESULTS) for name in self.arrays.outputs}
        places |= {name: lax.rem(step, self.blocks.slots) for name in self.arrays.tables}
        refs = {name: self.refs[f"local_{name}"].at[place] for name, place in places.items()}
        return refs | {"scratch": self.refs["local_scratch"]}

    def start_frame(self, turn: Array) -> None:
        """Starts the copies of the per-token inputs."""

        @pl.when(turn < self.num_tokens)
        def _() -> None:
            for copy in self.frame_copies(turn):
                copy.start()

    def frame_copies(self, turn: Array) -> Iterator[Any]:
        frame = lax.rem(turn, self.frames)
        token = self.subcore + turn * self.num_subcores
        arrived = self.refs["frames_arrived"].at[frame]
        for name, array in self.arrays.token_inputs.items():
            for lead in _leading(array):
                source = self.refs[name].at[(token, *lead)]
                target = self.refs[f"local_{name}"].at[(frame, *lead, pl.ds(0, array.shape[-1]))]
                yield pltpu.make_async_copy(source, target, arrived)

    def start_rows(self, step: Array) -> None:
        """Starts the streams of a window; for the first one of a token, first awaits its ids."""

        @pl.when(step < self.num_steps)
        def _() -> None:
            turn, window = self.turn_and_window(step)

            @pl.when(window == 0)
            def _() -> None:
                for copy in self.frame_copies(turn):
                    copy.wait()

            self.stream_rows(step, lambda stream: stream.start())

    def stream_rows(self, step: Array, act: Callable[[Any], None]) -> None:
        turn, window = self.turn_and_window(step)
        frame, slot = lax.rem(turn, self.frames), lax.rem(step, self.blocks.slots)

        def streams(count: int) -> None:
            first = pl.multiple_of(window * self.blocks.rows, _GROUP_ROWS)
            ids, arrived = self.refs["local_ids"].at[frame], self.refs["rows_arrived"].at[slot]
            for name, table in self.arrays.tables.items():
                fetch = RowCopies if has_padded_rows(table) else IndirectStream
                rows = self.refs[f"local_{name}"].at[slot, pl.ds(0, count)]
                act(fetch(self.refs[name], ids, first, rows, arrived, self.lanes))

        if self.num_windows == 1 or self.last_rows == self.blocks.rows:
            streams(self.last_rows)
            return
        is_last = window == self.num_windows - 1
        pl.when(is_last)(lambda: streams(self.last_rows))
        pl.when(~is_last)(lambda: streams(self.blocks.rows))

    def send_results(self, turn: Array, act: Callable[[Any], None]) -> None:
        buffer = lax.rem(turn, _NUM_RESULTS)
        token = self.subcore + turn * self.num_subcores
        sent = self.refs["results_sent"].at[buffer]
        for name, array in self.arrays.outputs.items():
            for lead in _leading(array):
                result = self.refs[f"local_{name}"].at[(buffer, *lead, pl.ds(0, array.shape[-1]))]
                act(Push(result, self.refs[name].at[(token, *lead)], sent))


def _leading(array: Any) -> list[tuple[int, ...]]:
    """The indices between the token axis and the last axis: each copy moves one vector."""
    return [()] if len(array.shape) == 2 else [(i,) for i in range(array.shape[1])]


def _local_arrays(arrays: Arrays, blocks: Blocks, chip: Chip) -> dict[str, jax.ShapeDtypeStruct]:
    """The buffers in the local memory of a subcore."""
    num_selected = arrays.token_inputs["ids"].shape[1]
    # Frames for tokens with prefetched windows, the current token, and one to prefetch.
    ahead = pl.cdiv(blocks.slots - 1, pl.cdiv(num_selected, blocks.rows))

    def vectors(copies: int, array: Any) -> jax.ShapeDtypeStruct:
        *lead, width = array.shape[1:]
        # A scalar is read and written as the first lane of a vector, so pad by one vector.
        width = _round_up(width, chip.lanes) + chip.lanes
        return jax.ShapeDtypeStruct((copies, *lead, width), array.dtype)

    held = {name: vectors(ahead + 2, x) for name, x in arrays.token_inputs.items()}
    held |= {name: vectors(_NUM_RESULTS, x) for name, x in arrays.outputs.items()}
    for name, table in arrays.tables.items():
        shape = (blocks.slots, blocks.rows, table.shape[1])
        held[name] = jax.ShapeDtypeStruct(shape, table.dtype)
    shape = (arrays.num_scratch, blocks.rows, chip.lanes)
    return held | {"scratch": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _padded_bytes(array: Any) -> int:
    """Bytes in local memory, where the last axis is padded to at most 64 bytes."""
    return math.prod(array.shape[:-1]) * _round_up(array.shape[-1] * array.dtype.itemsize, 64)


def bytes_accessed(arrays: Arrays) -> int:
    """Bytes between HBM and the local memories: a vector at a time, padded to granules."""

    def vector_bytes(array: Any) -> int:
        return _round_up(array.shape[-1] * array.dtype.itemsize, _GRANULE_BYTES)

    selections = math.prod(arrays.token_inputs["ids"].shape)
    rows = sum(map(vector_bytes, arrays.tables.values()))
    others = [*arrays.token_inputs.values(), *arrays.outputs.values()]
    return selections * rows + sum(math.prod(x.shape[:-1]) * vector_bytes(x) for x in others)


def _round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple
