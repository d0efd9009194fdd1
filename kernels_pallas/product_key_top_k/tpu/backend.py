"""Product-key top-k on the TensorCores of a TPU: one fused kernel per pass.

The forward kernel, for a tile of 1024 tokens and a head, streams tiles of keys through VMEM. The
MXU multiplies them with the queries, and the best keys of each tile are merged into the shortlist
of the side. Then the best pairs are selected from the grid of the two shortlists, block by block;
see `select.py`. Neither [T, n] nor [T, s * s] arrays reach HBM: S of all keys of a side stays in
VMEM until its shortlist is complete.

    layouts     The MXU writes S with keys along the lanes, [tokens, n], from which S of the chosen
                keys is gathered, 128 lanes at a time. The selection has tokens along sublanes and
                lanes, [places, 8, 128]. Queries are read row-major, and results are written with
                tokens along the lanes, [.., m, T], the layout that the kernels of value aggregation
                read: it needs no padding for any m.
    precision   Products of float32 arrays take six bfloat16 passes (HIGHEST); bfloat16 arrays are
                multiplied directly. Sums are float32.
    padding     s and m are rounded up to powers of two, at least 16; n to a multiple of the key
                tile; the number of tokens to a multiple of 1024.
    limits      S takes 4 KiB per key and rank: n can be up to about 5,000 at rank 2 if keys are
                narrow, and 1,700 at the largest size below. Larger n is unsupported.
    residual    S of the chosen keys is saved for a backward pass, 8 r m bytes per token. Apart from
                arguments and results, nothing else is in HBM.

Cost, counted and not measured: thousands of vector operations per token, for both sides, and the
number of grid blocks that were merged for 1024 tokens of random data whose core has singular values
2.1 : 0.15 (in parentheses: 2.0 : 0.4 and 1.2 : 0.4, which is worse than any trained core). All
blocks are compared with the m-th best.

      n,   s,   m    shortlists   a block   merged          of    compare   in all   matrix MFLOP
    360,  32,  32       100          3      10 (14, 25)     32       4        136        0.6
    528, 128, 128       253         21       9 (18, 55)    128      66        511        4.3
    964,  94,  94       338         21       9 (12, 33)     73      35        565        3.9
   1696, 128, 256       591         53       8 (13, 46)     64      66       1082       17.4

A v5e does 6e12 vector operations per second: 0.18 microseconds for the last line, whose float32 key
products take 0.53. Extracting the best pairs one at a time would take 4 m s^2 operations, or 16,777
thousand.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.array_types import Array
from kernels_pallas.common import add_up, check, padded, tiled_bytes
from kernels_pallas.product_key_top_k.call import TopK, TopKCall
from kernels_pallas.product_key_top_k.tpu import backward as pallas_tpu_backward
from kernels_pallas.product_key_top_k.tpu import select

_SUBLANES, _LANES = 8, 128
# The width of the MXU of v6e and tpu7x, and of the other chips; the first that fits is used.
_KEYS_PER_TILE = (256, 128)
_VMEM_BYTES = 56 * 2**20  # of 64 MiB on tpu7x; others have more

backward = pallas_tpu_backward.backward


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The number of keys that a step of the forward kernel multiplies and sorts."""

    keys: int


def heuristic(call: TopKCall, with_chosen: bool = True) -> Blocks:
    """As many keys as fit VMEM next to the other buffers, but at least one run of the sort."""
    least = _power_of_two(call.shortlist)
    candidates = [Blocks(max(least, num_keys)) for num_keys in _KEYS_PER_TILE]
    fitting = (x for x in candidates if _fits(_Plan(call, x, with_chosen)))
    return next(fitting, candidates[-1])


def unsupported_reason(call: TopKCall, platform: str) -> str | None:
    """Returns why this implementation does not support these shapes and dtypes, or None."""
    reasons = [(platform != "tpu", f"it compiles for TPU, not for {platform}")]
    is_float32 = call.dtype == jnp.float32
    reasons.append((not is_float32, "it accumulates in float32, not in float64"))
    for name, array in {"query": call.query, "keys": call.keys}.items():
        known = array.dtype in (jnp.float32, jnp.bfloat16)
        reasons.append((not known, f"{name} must be float32 or bfloat16, got {array.dtype}"))
        reasons.append((0 in array.shape, f"{name} is empty, {array.shape}"))
    plan = _Plan(call, heuristic(call))
    reason = f"it needs {plan.vmem_bytes} bytes of VMEM, only {_VMEM_BYTES} are available"
    reasons.append((not _fits(plan), reason))
    forward_reason = next((reason for holds, reason in reasons if holds), None)
    return forward_reason or pallas_tpu_backward.unsupported_reason(call)


def forward(call: TopKCall, with_chosen: bool = False) -> TopK:
    """Computes the results of `product_key_top_k`."""
    blocks = heuristic(call, with_chosen)
    key = tuned.Key.of("product_key_top_k", "pallas_tpu", "forward", call.sizes, call.query.dtype)
    blocks = tuned.lookup(blocks, key, platform="tpu") or blocks
    plan = _Plan(call, blocks, with_chosen)
    scores, addresses, *chosen = plan.run(call)
    pairs = (plan.num_heads * plan.top_m, plan.num_tokens)
    return TopK(
        jnp.moveaxis(scores.reshape(-1, *pairs), (0, 2), (2, 0)),
        addresses.reshape(pairs).T,
        jnp.moveaxis(chosen[0], 4, 0) if chosen else None,
    )


class _Plan:
    """Shapes, blocks and the steps of the forward kernel."""

    def __init__(self, call: TopKCall, blocks: Blocks, with_chosen: bool = True) -> None:
        query, keys, cores = call.query, call.keys, call.cores
        self.query_heads, _, self.query_ranks, self.num_tokens, self.key_dim = query.shape
        self.num_heads, _, self.rank, self.num_keys, _ = keys.shape
        self.num_cores = 1 if cores is None else cores.shape[0]
        self.additive = cores is None
        self.top_m, self.shortlist, self.with_chosen = call.top_m, call.shortlist, with_chosen
        self.query_dtype, self.keys_dtype = query.dtype, keys.dtype

        self.tile_tokens = _SUBLANES * _LANES
        # Products of float32 arrays also keep the bfloat16 parts of their operands in VMEM.
        self.dot_tokens = 2 * _LANES
        self.tile_keys = blocks.keys
        self.num_tiles = pl.cdiv(self.num_keys, self.tile_keys)
        self.padded = _power_of_two(self.shortlist)
        rule = f"a multiple of {math.lcm(_LANES, self.padded)}, to fill runs and registers"
        check(self.tile_keys % math.lcm(_LANES, self.padded) == 0, "keys", self.tile_keys, rule)
        self.staircase = select.Staircase(
            self.shortlist, self.padded, size=_power_of_two(self.top_m)
        )
        # Lists are transposed and gathered by full registers of lanes.
        self.listed = padded(self.padded, _LANES)
        self.places = max(self.listed, padded(self.staircase.size, _LANES))

    @property
    def scratch(self) -> dict[str, Any]:
        """Shapes and dtypes of the scratch buffers in VMEM."""
        tile, runs = (_SUBLANES, _LANES), max(self.padded, self.staircase.size)
        tokens = self.tile_tokens
        return {
            "key_scores": ((self.num_tiles, self.rank, tokens, self.tile_keys), jnp.float32),
            "ranking": ((self.tile_keys, *tile), jnp.int32),
            "work_keys": ((runs, *tile), jnp.int32),
            "work_ids": ((runs, *tile), jnp.int32),
            "best_keys": ((self.places, *tile), jnp.int32),
            "best_ids": ((self.places, *tile), jnp.int32),
            "short_ids": ((2, tokens, self.listed), jnp.int32),
            "short_scores": ((2, self.rank, tokens, self.listed), jnp.float32),
            "factors": ((2, self.rank, self.listed, *tile), jnp.float32),
        }

    @property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]]:
        """Shape, block and dtype of each result; tokens are the last axis."""
        m, rank, cores = self.top_m, self.rank, self.num_cores
        shapes = {
            "scores": ((cores, self.num_heads, m), (cores, 1, m), jnp.float32),
            "addresses": ((self.num_heads, m), (1, m), jnp.int32),
        }
        if self.with_chosen:
            block = (2, 1, rank, m)
            shapes["chosen"] = ((2, self.num_heads, rank, m), block, jnp.float32)
        return {
            name: ((*shape, self.num_tokens), (*block, self.tile_tokens), dtype)
            for name, (shape, block, dtype) in shapes.items()
        }

    @property
    def vmem_bytes(self) -> int:
        """The scratch buffers, two buffers for each block, and space for temporaries."""
        scratch = sum(4 * math.prod(shape) for shape, _ in self.scratch.values())
        blocks = sum(
            4 * math.prod(block[:-2]) * padded(block[-2], 8) * block[-1]
            for _, block, _ in self.outputs.values()
        )
        width = padded(self.key_dim, _LANES)
        blocks += width * self.tile_tokens * jnp.dtype(self.query_dtype).itemsize
        blocks += width * self.tile_keys * jnp.dtype(self.keys_dtype).itemsize
        parts = 6 * width * (self.dot_tokens + self.tile_keys)
        return scratch + 2 * blocks + parts + 4 * 2**20

    def run(self, call: TopKCall) -> tuple[Array, ...]:
        """Calls the kernel; returns scores [c, H, m, T], addresses [H, m, T] and, if requested, S.

        S has the shape [2, H, r, m, T].
        """
        query, keys, u, v, cores = call.query, call.keys, call.u, call.v, call.cores
        per_head, per_rank = self.query_heads > 1, self.query_ranks > 1
        small = {"blocks": jnp.asarray(self.staircase.blocks, jnp.int32).reshape(-1)}
        if u is not None and v is not None and cores is not None:
            small["weights"] = jnp.stack([u, v], axis=1).astype(jnp.float32).reshape(-1)
            small["cores"] = jnp.moveaxis(cores, 1, 0).astype(jnp.float32).reshape(-1)
        arrays = {"query": query, "keys": keys}
        in_specs = [
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in small),
            pl.BlockSpec(
                (1, 1, 1, self.tile_tokens, self.key_dim),
                lambda t, h, s, a, k: (h * per_head, s, a * per_rank, t, 0),
            ),
            pl.BlockSpec(
                (1, 1, 1, self.tile_keys, self.key_dim), lambda t, h, s, a, k: (h, s, a, k, 0)
            ),
        ]
        heads_at = {"scores": 1, "addresses": 0, "chosen": 1}

        def out_spec(name: str) -> pl.BlockSpec:
            _, block, _ = self.outputs[name]
            before, after = heads_at[name], len(block) - heads_at[name] - 2
            return pl.BlockSpec(block, lambda t, h, s, a, k: (*[0] * before, h, *[0] * after, t))

        names = (*small, *arrays, *self.outputs, *self.scratch)

        def _product_key_top_k_forward_kernel(*refs: Any) -> None:
            self._step(dict(zip(names, refs, strict=True)))

        # Inside shard_map, results vary as the arguments do.
        axis_type = jax.typeof(query).manual_axis_type
        launch = pl.pallas_call(
            _product_key_top_k_forward_kernel,
            name="product_key_top_k_forward",
            grid=(
                pl.cdiv(self.num_tokens, self.tile_tokens),
                self.num_heads,
                2,
                self.rank,
                self.num_tiles,
            ),
            in_specs=in_specs,
            out_specs=[out_spec(name) for name in self.outputs],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axis_type)
                for shape, _, dtype in self.outputs.values()
            ],
            scratch_shapes=[pltpu.VMEM(*buffer) for buffer in self.scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(
                    "parallel",
                    "arbitrary",
                    "arbitrary",
                    "arbitrary",
                    "arbitrary",
                ),
                vmem_limit_bytes=self.vmem_bytes,
            ),
            cost_estimate=self._cost(query, keys, list(small.values())),
        )
        # Pallas cannot batch the scalars in SMEM, so vmap becomes a loop of calls.
        return tuple(custom_batching.sequential_vmap(launch)(*small.values(), *arrays.values()))

    def _step(self, refs: dict[str, Any]) -> None:
        """Processes one tile of keys of one rank, side and head, for one tile of tokens."""
        tokens, head, side, rank, tile = (pl.program_id(axis) for axis in range(5))

        def multiply(i: Array, _: None) -> None:
            tokens = pl.ds(pl.multiple_of(i * self.dot_tokens, self.dot_tokens), self.dot_tokens)
            query, keys = refs["query"][0, 0, 0, tokens], refs["keys"][0, 0, 0]
            refs["key_scores"][tile, rank, tokens] = _dot(query, keys)

        lax.fori_loop(0, self.tile_tokens // self.dot_tokens, multiply, None)

        @pl.when(rank == self.rank - 1)
        def _shortlist() -> None:
            best = select.Items(refs["best_keys"], refs["best_ids"])

            @pl.when(tile == 0)
            def _begin() -> None:
                select.clear(best, self.padded)

            self._merge_tile(refs, best, head, side, tile)

            @pl.when(tile == self.num_tiles - 1)
            def _end() -> None:
                self._gather_shortlist(refs, head, side)

                @pl.when(side == 1)
                def _choose() -> None:
                    self._choose_pairs(refs, best, tokens)
                    self._write(refs, head)

    def _merge_tile(
        self, refs: Any, best: select.Items, head: Array, side: Array, tile: Array
    ) -> None:
        """Merges the keys of a tile into the shortlist of its side."""
        first_id = tile * self.tile_keys
        first_weight = (2 * head + side) * self.rank

        def rank_group(group: Array, _: None) -> None:
            parts = [refs["key_scores"][tile, a, _tokens_of(group)] for a in range(self.rank)]
            if not self.additive:
                parts = [x * refs["weights"][first_weight + a] for a, x in enumerate(parts)]
            keys = select.key_of(add_up(parts).T)
            ids = lax.broadcasted_iota(jnp.int32, keys.shape, 0) + first_id
            keys = jnp.where(ids < self.num_keys, keys, select.NOTHING)
            refs["ranking"][:, group] = keys

        lax.fori_loop(0, _SUBLANES, rank_group, None)
        work = select.Items(refs["work_keys"], refs["work_ids"])

        def merge_run(run: Array, _: None) -> None:
            def items(place: Array) -> list[select.Item]:
                first = run * self.padded + place
                keys = refs["ranking"][pl.ds(first, select.RADIX)]
                ids = lax.broadcasted_iota(jnp.int32, keys.shape, 0) + first_id + first
                return list(zip(keys, ids, strict=True))

            select.sort(work, self.padded, items)
            select.keep_best(best, work, self.padded)

        lax.fori_loop(0, self.tile_keys // self.padded, merge_run, None)

    def _gather_shortlist(self, refs: Any, head: Array, side: Array) -> None:
        """Gathers ids and S of the shortlisted keys, and computes the factors of pair scores."""

        def gather_group(group: Array, _: None) -> None:
            tokens = _tokens_of(group)
            ids = refs["best_ids"][: self.listed, group].T
            # Pad the list by repeating the last key of the shortlist.
            place = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
            ids = jnp.where(place < self.shortlist, ids, _column(ids, self.shortlist - 1))
            refs["short_ids"][side, tokens] = ids
            short = []
            for a in range(self.rank):
                tiles = [refs["key_scores"].at[k, a, tokens] for k in range(self.num_tiles)]
                short.append(_gather(tiles, ids))
                refs["short_scores"][side, a, tokens] = short[a]
            for q in range(self.rank):
                refs["factors"][side, q, :, group] = self._factor(refs, head, side, short, q).T

        lax.fori_loop(0, _SUBLANES, gather_group, None)

    def _factor(self, refs: Any, head: Array, side: Array, short: list[Array], q: int) -> Array:
        """A factor of pair scores: S times the summed cores for rows, S for columns."""
        if self.additive:
            return short[q]
        core = [self._core(refs, head, a, q) for a in range(self.rank)]
        times_core = add_up(x * c for x, c in zip(short, core, strict=True))
        return jnp.where(side == 0, times_core, short[q])

    def _core(self, refs: Any, head: Array, a: int, b: int, core: int | None = None) -> Array:
        """An entry of a core, or of the sum of all cores."""
        if core is None:
            entries = [self._core(refs, head, a, b, core) for core in range(self.num_cores)]
            return add_up(entries)
        first = (head * self.num_cores + core) * self.rank**2
        return refs["cores"][first + a * self.rank + b]

    def _choose_pairs(self, refs: Any, best: select.Items, tokens: Array) -> None:
        """Fills `best` with the best pairs."""
        tile = (_SUBLANES, _LANES)
        sublane, lane = (lax.broadcasted_iota(jnp.int32, tile, axis) for axis in range(2))
        token = tokens * self.tile_tokens + sublane * _LANES + lane
        select.best_pairs(
            self.staircase,
            refs["blocks"],
            refs["factors"],
            self.additive,
            self.top_m,
            token < self.num_tokens,
            best,
            select.Items(refs["work_keys"], refs["work_ids"]),
        )

    def _write(self, refs: Any, head: Array) -> None:
        """Writes scores, addresses and S of the chosen pairs."""
        for start in range(0, self.top_m, _LANES):
            lax.fori_loop(
                0, _SUBLANES, functools.partial(self._write_group, refs, head, start), None
            )

    def _write_group(self, refs: Any, head: Array, start: int, group: Array, _: None) -> None:
        """Writes the results of up to one register of lanes of pairs, for a group of tokens."""
        tokens = _tokens_of(group)
        kept = min(_LANES, self.top_m - start)

        def write(name: str, index: tuple[int, ...], x: Array) -> None:
            refs[name][(*index, pl.ds(start, kept), tokens)] = x.T[:kept]

        pairs = refs["best_ids"][start : start + _LANES, group].T
        places = pairs >> (self.padded.bit_length() - 1), pairs & (self.padded - 1)
        ids = [_gather([refs["short_ids"].at[i, tokens]], places[i]) for i in range(2)]
        write("addresses", (0,), ids[0] * self.num_keys + ids[1])
        chosen = [
            [_gather([refs["short_scores"].at[i, a, tokens]], places[i]) for a in range(self.rank)]
            for i in range(2)
        ]
        if self.with_chosen:
            for i, a in itertools.product(range(2), range(self.rank)):
                write("chosen", (i, 0, a), chosen[i][a])
        rows, columns = chosen
        if self.additive:
            write("scores", (0, 0), rows[0] + columns[0])
            return
        for core in range(self.num_cores):
            entries = itertools.product(range(self.rank), repeat=2)
            terms = [rows[a] * columns[b] * self._core(refs, head, a, b, core) for a, b in entries]
            write("scores", (core, 0), add_up(terms))

    def _cost(self, query: Array, keys: Array, small: list[Array]) -> pl.CostEstimate:
        """The FLOPs of the key products; keys are read for each tile of tokens, queries by head."""
        token_tiles = pl.cdiv(self.num_tokens, self.tile_tokens)
        query_reads = self.num_heads // self.query_heads
        written = [jax.ShapeDtypeStruct(shape, dtype) for shape, _, dtype in self.outputs.values()]
        return pl.CostEstimate(
            flops=2 * self.num_tokens * math.prod(keys.shape),
            transcendentals=0,
            bytes_accessed=token_tiles * tiled_bytes(keys)
            + query_reads * tiled_bytes(query)
            + tiled_bytes(*small, *written),
        )


def _fits(plan: _Plan) -> bool:
    return plan.vmem_bytes <= _VMEM_BYTES


def _dot(query: Array, keys: Array) -> Array:
    """The inner products of all queries and keys, [tokens, n], in float32."""
    if query.dtype != keys.dtype:
        query, keys = query.astype(jnp.float32), keys.astype(jnp.float32)
    is_float32 = query.dtype == jnp.float32
    return lax.dot_general(
        query,
        keys,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _gather(tables: list[Any], places: Array) -> Array:
    """Gathers entries of each token's row of the concatenated tables, each [tokens, n].

    A gather only reads one register of lanes, so each register of results takes as many gathers as
    there are registers in a row.
    """
    width = tables[0].shape[1]
    parts = []
    for start in range(0, places.shape[1], _LANES):
        wanted = places[:, start : start + _LANES]
        entries = jnp.zeros(wanted.shape, tables[0].dtype)
        for i, table in enumerate(tables):
            for first in range(0, width, _LANES):
                near = jnp.take_along_axis(
                    table[:, first : first + _LANES],
                    wanted & (_LANES - 1),
                    axis=1,
                    mode="promise_in_bounds",
                )
                here = wanted >> (_LANES.bit_length() - 1) == (i * width + first) // _LANES
                entries = jnp.where(here, near, entries)
        parts.append(entries)
    return jnp.concatenate(parts, axis=1)


def _tokens_of(group: Array) -> Any:
    """The slice of a tile's tokens that are in one sublane."""
    return pl.ds(pl.multiple_of(group * _LANES, _LANES), _LANES)


def _column(x: Array, column: int) -> Array:
    return x[:, column : column + 1]


def _power_of_two(size: int) -> int:
    """Rounds up to a power of two, at least the number of items that networks sort in registers."""
    return max(select.RADIX, 1 << (size - 1).bit_length())
