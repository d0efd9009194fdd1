"""The keys of one side in the Hopper kernel: products with the queries, and the shortlist.

Each warpgroup has a ring of buffers. While the tensor cores multiply, bulk copies prefetch the next
columns of a block of 64 keys and the same columns of the queries. The thread blocks of a cluster
process the keys in lockstep: each loads a part of a buffer and multicasts it to all of them.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import add_up
from kernels_pallas.compat import barrier_arrive_and_wait, gpu_store
from kernels_pallas.product_key_top_k.gpu import select
from kernels_pallas.product_key_top_k.gpu.memory import (
    BLOCK_KEYS,
    Blocks,
    GroupScratch,
    Plan,
    Scratch,
)
from kernels_pallas.product_key_top_k.gpu.select import LANES


def key_scores(
    plan: Plan,
    blocks: Blocks,
    side: int,
    head: Array,
    first_token: Array,
    group: Array,
    query: Any,
    keys: Any,
    scratch: Scratch,
) -> None:
    """Computes S of all keys and ranks of one side, at row a * key_rows + key and column token."""
    num_groups, stages, width = blocks.groups, blocks.stages, blocks.columns
    num_chunks = plan.padded_dim // width
    num_units = plan.rank * plan.num_blocks  # a unit: a block of keys of one rank
    my_units = lax.div(num_units - group + num_groups - 1, num_groups)
    my_steps = my_units * num_chunks

    def unit_of(turn: Array) -> tuple[Array, Array]:
        unit = group + turn * num_groups
        return lax.div(unit, plan.num_blocks), lax.rem(unit, plan.num_blocks)

    def fetch(step: Array, *, again: bool) -> None:
        slot = lax.rem(step, stages)
        rank, block = unit_of(lax.div(step, num_chunks))
        columns = pl.ds(lax.rem(step, num_chunks) * width, width)
        first_row, _ = plan.first_row(head, side, rank)
        block_rows = pl.ds(first_row + block * BLOCK_KEYS, BLOCK_KEYS)
        query_head = head if query.shape[0] > 1 else 0
        query_rank = rank if query.shape[2] > 1 else 0
        arrived = scratch.arrived.at[group * stages + slot]
        plgpu.copy_gmem_to_smem(
            query.at[query_head, side, query_rank, pl.ds(first_token, blocks.tokens), columns],
            scratch.query.at[group, slot],
            arrived,
        )
        if blocks.cluster > 1 and again:
            # Pallas ensures that all four warps have read a buffer before a copy overwrites it. The
            # cluster barrier ensures the same for the other thread blocks.
            barrier_arrive_and_wait(scratch.free.at[group * stages + slot])
        plgpu.copy_gmem_to_smem(
            keys.at[block_rows, columns],
            scratch.keys.at[group, slot],
            arrived,
            collective_axes="peer" if blocks.cluster > 1 else None,
        )

    if blocks.cluster > 1:
        # Copies also fill the buffers of the cluster's other thread blocks, which must be done with
        # the previous side.
        barrier_arrive_and_wait(scratch.begun.at[group])
    for step in range(stages):
        pl.when(step < my_steps)(functools.partial(fetch, jnp.int32(step), again=False))

    def multiply_unit(turn: Array, _: None) -> None:
        def multiply(sums: Any) -> Array:
            def multiply_chunk(index: Array, _: None) -> None:
                step = turn * num_chunks + index
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(scratch.arrived.at[group * stages + slot])
                _multiply_add(sums, slot, group, scratch)
                following = functools.partial(fetch, step + stages, again=True)
                pl.when(step + stages < my_steps)(following)

            lax.fori_loop(0, num_chunks, multiply_chunk, None)
            return sums[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((BLOCK_KEYS, blocks.tokens), jnp.float32))
        rank, block = unit_of(turn)
        rows = pl.ds(rank * plan.key_rows + block * BLOCK_KEYS, BLOCK_KEYS)
        select.store(scratch.scores.at[rows, pl.ds(0, blocks.tokens)], select.as_int(sums))

    lax.fori_loop(0, my_units, multiply_unit, None)


def _multiply_add(sums: Any, slot: Array, group: Array, scratch: Scratch) -> None:
    """Accumulates keys [64, columns] times query^T [columns, tokens] into sums."""
    keys, query = scratch.keys.at[group, slot], scratch.query.at[group, slot]
    if scratch.key_part is None:
        plgpu.wgmma(sums, keys, query.T)
        plgpu.wgmma_wait(0)
        return

    query_parts, key_part = scratch.query_parts.at[group], scratch.key_part.at[group]
    num_parts = query_parts.shape[0]
    for i, part in enumerate(_parts(select.load(query), num_parts)):
        select.store(query_parts.at[i], part)
    for i, part in enumerate(_parts(plgpu.load(keys, layout=plgpu.Layout.WGMMA), num_parts)):
        gpu_store(key_part, part)
        plgpu.commit_smem()
        for j in range(num_parts - i):
            plgpu.wgmma(sums, key_part, query_parts.at[j].T)
        plgpu.wgmma_wait(0)


def _parts(x: Array, num_parts: int) -> Iterator[Array]:
    """Splits float32 into bfloat16 parts whose sum approximates it, the largest first."""
    for _ in range(num_parts):
        part = x.astype(jnp.bfloat16)
        yield part
        x = x - part.astype(jnp.float32)


def shortlist(
    plan: Plan, blocks: Blocks, side: int, head: Array, weights: Any, local: GroupScratch
) -> None:
    """Selects the best keys of one side by rank-1 score; writes indices and S to the lists."""
    skipped = [plan.first_row(head, side, a)[1] for a in range(plan.rank)]

    def visit(body: Any, carry: Any) -> Any:
        def visit_keys(index: Array, carry: Any) -> Any:
            first = index * LANES
            number = select.lane() + first
            words = [
                select.load(local.scores(a * plan.key_rows + skipped[a] + first))
                for a in range(plan.rank)
            ]
            by_rank = [select.as_float(word) for word in words]
            ranking = by_rank[0]
            if not plan.additive:
                by_weight = [weights[side, head, a] for a in range(plan.rank)]
                products = zip(by_rank, by_weight, strict=True)
                ranking = add_up(s * select.full(w, jnp.float32) for s, w in products)
            exists = number < plan.num_keys
            sort_key = select.where(exists, select.sort_key(ranking), select.EMPTY)
            return body(carry, [sort_key, number, *words])

        return lax.fori_loop(0, pl.cdiv(plan.num_keys, LANES), visit_keys, carry)

    outputs = [local.list(side, word) for word in range(1 + plan.rank)]
    select.best(visit, plan.shortlist, blocks.key_depth, 2 + plan.rank, outputs, local.flags)
