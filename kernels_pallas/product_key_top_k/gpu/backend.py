"""Product-key top-k on Hopper GPUs in one kernel: only what is chosen leaves the chip.

A block takes a few tokens of one head, four for each of its warpgroups, and does all that is to be
done for them; neither the scores of all keys nor a grid of pairs reaches device memory.

    products    For each side, the keys stream through shared memory, 64 at a time, a warpgroup each
                with a ring of buffers of its own; blocks of a cluster read them together, each a
                part that is sent to all. Matrix units multiply them with the tokens' queries; S of
                all keys and ranks of one side stays in shared memory.
    shortlists  Each warp ranks the keys of its token; `select.py` says how.
    staircase   As in `xla.py`: row i has its first reach / i columns, exactly. Their scores are put
                in shared memory one after the other, and the best are selected from there.
    certificate The pairs outside are compared with the last one selected; if one of them may come
                before it, the warpgroup selects from the whole grid, whose scores are computed
                on the way and never stored.
    results     Score of each core, address, and S of both keys of each chosen pair.

    bfloat16    Exact products, added in float32 by the matrix units.
    float32     Each number is split into three of bfloat16, which hold its 24 bits, and six
                products of parts are added: what is left out is 2^-24 of a product, so the sums
                are as good as those of float32. An infinite number makes a NaN, as its parts do;
                it is reported.
    other sizes Fewer than 64 keys, a key dim that is no multiple of 16 (of 32 in float32), or
                tokens that do not fill the blocks, are padded by XLA in a copy of query or keys.

The backward pass is that of `xla.py`: products of matrices, for which XLA calls its library.

Compiled for the H200 and interpreted, but never run on a GPU: what is said of speed is reasoned.
Blackwell has other matrix instructions (`tcgen05`), for which nothing is written. Lane semantics
are chosen for lowering because the inference of layouts (jax 0.12) does not come to an end here.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch, tuned
from kernels_pallas.array_types import Array
from kernels_pallas.common import padded, vary_alike
from kernels_pallas.product_key_top_k import xla
from kernels_pallas.product_key_top_k.call import TopK, TopKCall
from kernels_pallas.product_key_top_k.gpu.keys import key_scores, shortlist
from kernels_pallas.product_key_top_k.gpu.memory import Blocks, Plan, Scratch
from kernels_pallas.product_key_top_k.gpu.pairs import Grid, select_pairs, write_results
from kernels_pallas.product_key_top_k.gpu.select import LANES, TOKENS

_SHARED_BYTES = 227 * 2**10  # that a block may have
_MULTIPROCESSORS = 132  # of an H100 or H200

backward = xla.backward


def heuristic(plan: Plan) -> Blocks:
    """Blocks by shared memory, multiprocessors and the traffic of keys. Reasoned, not measured.

    A block reads all keys once: 18 GB together for 8192 tokens in blocks of 8 and the 17 MB of keys
    of the largest of the paper's models, 3 ms from the L2 cache. So blocks have 16 tokens where
    shared memory allows, and four of them read each key together; unless tokens are so few that
    multiprocessors would be idle. With four stages, 64 or 128 KiB are on their way to each.

    Lists hold what a lane gets of the best, at random for keys, and more evenly for pairs, which
    lie row by row. With random scores of the paper's sizes (simulated, 800 tokens each), a scan of
    keys follows for at most 3 in 100 warpgroups, and one of pairs for none.
    """

    def depth(count: int, deviations: float) -> int:
        mean = count / LANES
        return min(count, math.ceil(mean + deviations * mean**0.5 + 1))

    def cluster(tokens: int) -> int:
        return next(n for n in (4, 2, 1) if n == 1 or plan.num_tokens % (n * tokens) == 0)

    depths = depth(plan.shortlist, 3.5), depth(plan.top_m, 2.5)
    few = plan.num_heads * plan.num_tokens < 16 * _MULTIPROCESSORS
    choices = [
        Blocks(tokens, 1 if few else cluster(tokens), stages, columns, *depths)
        for tokens in ((8,) if few else (16, 8))
        for columns in plan.widths
        for stages in (4, 3, 2)
    ]
    fitting = (blocks for blocks in choices if plan.shared_bytes(blocks) <= _SHARED_BYTES)
    return next(fitting, choices[-1])


def unsupported_reason(call: TopKCall, platform: str) -> str | None:
    """Returns why this implementation cannot take a call of these shapes and dtypes, or None."""
    capability = dispatch.compute_capability()
    reasons = [
        (platform != "gpu", f"it compiles for GPU, not for {platform}"),
        (
            capability is not None and not capability.startswith("9."),
            f"it needs compute capability 9.0 (Hopper), the device has {capability}",
        ),
        (call.dtype != jnp.float32, "it accumulates in float32, not in float64"),
    ]
    for name, array in (("query", call.query), ("keys", call.keys)):
        known = array.dtype in (jnp.float32, jnp.bfloat16)
        reasons.append((not known, f"{name} must be float32 or bfloat16, is {array.dtype}"))
        reasons.append((0 in array.shape, f"{name} is empty, {array.shape}"))
    plan = Plan.of(call)
    needed = plan.shared_bytes(heuristic(plan))
    reasons.append(
        (
            needed > _SHARED_BYTES,
            f"{plan.num_keys} keys of rank {plan.rank}, shortlist = {plan.shortlist} and top_m = "
            f"{plan.top_m} need {needed} bytes of shared memory, there are {_SHARED_BYTES}",
        )
    )
    return next((reason for holds, reason in reasons if holds), None)


def forward(call: TopKCall, with_chosen: bool = False) -> TopK:
    """Computes the results of `product_key_top_k`."""
    plan = Plan.of(call, with_chosen)
    blocks = heuristic(plan)
    key = tuned.Key.of("product_key_top_k", "pallas_gpu", "forward", call.sizes, call.keys.dtype)
    blocks = tuned.lookup(blocks, key, platform="gpu") or blocks
    return _launch(plan, blocks, call)


def _launch(plan: Plan, blocks: Blocks, call: TopKCall) -> TopK:
    """Launches the kernel."""
    query, keys, u, v, cores = call.query, call.keys, call.u, call.v, call.cores
    num_tokens = padded(plan.num_tokens, blocks.cluster * blocks.tokens)
    pad_dim = plan.padded_dim - plan.key_dim
    pad_keys = plan.padded_keys - plan.num_keys
    query = _pad(query.astype(plan.dtype), 0, 0, 0, num_tokens - plan.num_tokens, pad_dim)
    keys = _pad(keys.astype(plan.dtype), 0, 0, 0, pad_keys, pad_dim).reshape(-1, plan.padded_dim)
    if u is None or v is None or cores is None:
        weights = jnp.ones((2, plan.num_heads, 1), jnp.float32)
        cores = jnp.ones((1, plan.num_heads, 1, 1), jnp.float32)
    else:
        weights = jnp.stack([u, v]).astype(jnp.float32)
    cores = cores.astype(jnp.float32)
    operands = (query, keys, weights, cores, cores.sum(axis=0), plan.places())

    pairs = plan.num_heads * plan.top_m
    results: dict[str, tuple[tuple[int, ...], Any]] = {
        "scores": ((num_tokens, pairs, max(1, plan.num_cores)), jnp.float32),
        "addresses": ((num_tokens, pairs), jnp.int32),
    }
    if plan.with_chosen:
        shape = (num_tokens, 2, plan.num_heads, plan.rank, plan.top_m)
        results["chosen"] = (shape, jnp.float32)
    launch = plgpu.kernel(
        functools.partial(_product_key_top_k_kernel, plan, blocks),
        kernel_name="product_key_top_k_forward",
        out_type=[jax.ShapeDtypeStruct(*described) for described in results.values()],
        scratch_types=Scratch.types(plan, blocks),
        grid=(plan.num_heads, num_tokens // (blocks.cluster * blocks.tokens)),
        grid_names=("head", "tiles"),
        cluster=(blocks.cluster,),
        cluster_names=("peer",),
        num_threads=blocks.groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        cost_estimate=_cost(plan, query, num_tokens // blocks.tokens),
    )
    arrays = custom_batching.sequential_vmap(launch)(*operands)
    # Mosaic GPU forgets over which axes of `shard_map` its arguments vary.
    arrays = vary_alike(arrays, operands)
    scores, addresses, *chosen = (x[: plan.num_tokens] for x in arrays)
    return TopK(scores, addresses, chosen[0] if chosen else None)


def _product_key_top_k_kernel(plan: Plan, blocks: Blocks, *refs: Any) -> None:
    """All of a block; see the top of this file."""
    query, keys, weights, cores, summed_core, places, *refs_left = refs
    num_results = 3 if plan.with_chosen else 2
    results, scratch = refs_left[:num_results], Scratch(*refs_left[num_results:])
    head = lax.axis_index("head")
    tile = lax.axis_index("tiles") * blocks.cluster + lax.axis_index("peer")
    group = lax.axis_index("group")
    mine = scratch.of(group)

    for side in range(2):
        key_scores(plan, blocks, side, head, tile * blocks.tokens, group, query, keys, scratch)
        plgpu.barrier_arrive_and_wait(scratch.together)
        shortlist(plan, blocks, side, head, weights, mine)
        # The next side, and then the candidates, take the place of these scores.
        plgpu.barrier_arrive_and_wait(scratch.together)
    core = [[summed_core[head, a, b] for b in range(plan.rank)] for a in range(plan.rank)]
    select_pairs(plan, blocks, Grid(plan, core, mine), places, mine)
    first_token = tile * blocks.tokens + group * TOKENS
    write_results(plan, head, pl.ds(first_token, TOKENS), cores, results, mine)


def _cost(plan: Plan, query: Array, num_tiles: int) -> pl.CostEstimate:
    """Operations and bytes as the algorithm has them, for XLA's scheduler."""
    key_products = 2 * plan.rank * plan.num_keys * plan.key_dim
    pairs = plan.num_heads * plan.top_m
    results = query.shape[3] * pairs * 4 * (1 + max(1, plan.num_cores) + 2 * plan.rank)
    read_keys = plan.num_heads * key_products * plan.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * query.shape[3] * plan.num_heads * key_products,
        bytes_accessed=read_keys * num_tiles + query.nbytes + results,
        transcendentals=0,
    )


def _pad(x: Array, *after: int) -> Array:
    """Zeros after each axis; no operation where there is nothing to add."""
    return jnp.pad(x, [(0, n) for n in after]) if any(after) else x
