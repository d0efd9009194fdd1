"""Product-key top-k on Hopper GPUs, fused into one kernel that only writes the selection.

A thread block processes a few tokens of one head, four per warpgroup, from products to results.
Neither the scores of all keys nor a grid of pairs reaches device memory.

    products    For each side, keys stream through shared memory in blocks of 64; each warpgroup has
                its own blocks and ring of buffers. The thread blocks of a cluster share each read:
                each loads a part and multicasts it. The tensor cores multiply keys with queries; S
                of all keys and ranks of one side stays in shared memory.
    shortlists  Each warp ranks the keys of its token; see `select.py`.
    staircase   As in `xla.py`, but row i has exactly reach / i columns. The scores of the pairs
                inside are packed into shared memory, from which the best are selected.
    certificate The pairs outside are compared with the last one selected. If one of them may
                precede it, the warpgroup selects from the full grid, whose scores are computed on
                the fly and never stored.
    results     For each chosen pair: the score of each core, the address, and S of both keys.

    bfloat16    Products are exact; the tensor cores accumulate them in float32.
    float32     Each number is split into three bfloat16 parts, which hold its 24 bits, and six
                products of parts are added. The omitted products are 2^-24 of the total, so sums
                are as accurate as in float32. An infinity becomes NaN because its parts do; the
                NaN is returned.
    other sizes XLA pads a copy of query or keys if there are fewer than 72 keys, if all keys do not
                fill tiles of 8, if the key dim is not a multiple of 16 (32 for float32), or if
                tokens do not fill the thread blocks.

The backward pass is that of `xla.py`: matrix products, for which XLA calls its library.

The kernel has been compiled for the H200 and interpreted, but never run on a GPU: statements about
speed are estimates. Blackwell has other matrix instructions (`tcgen05`) and is not supported. The
kernel uses lane lowering semantics, because layout inference (jax 0.12) does not terminate on it.
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
from kernels_pallas.common import L2_BYTES, match_vma, padded
from kernels_pallas.compat import barrier_arrive_and_wait, gpu_kernel
from kernels_pallas.product_key_top_k import xla
from kernels_pallas.product_key_top_k.call import TopK, TopKCall
from kernels_pallas.product_key_top_k.gpu.keys import key_scores, shortlist
from kernels_pallas.product_key_top_k.gpu.memory import Blocks, Plan, Scratch
from kernels_pallas.product_key_top_k.gpu.pairs import Grid, select_pairs, write_results
from kernels_pallas.product_key_top_k.gpu.select import LANES, TOKENS

_SHARED_BYTES = 227 * 2**10  # maximum per thread block
_MULTIPROCESSORS = 132  # of an H100 or H200

backward = xla.backward


def heuristic(plan: Plan) -> Blocks:
    """Blocks by shared memory, number of SMs and key traffic. Estimated, not measured.

    Each thread block reads all keys once. For 8192 tokens in blocks of 8, and the 17 MB of keys of
    the paper's largest model, that is 18 GB in total, or 3 ms from the L2 cache. So thread blocks
    have 16 tokens if shared memory allows, and clusters of four share each read of the keys, unless
    there are so few tokens that SMs would be idle. With four stages, 64 or 128 KiB are in flight
    per thread block.

    The lists must hold a lane's part of the best candidates: a random number for keys, a more even
    one for pairs, which are visited row by row. In simulations with random scores at the paper's
    sizes (800 tokens each), at most 3 in 100 warpgroups needed a scan of keys, and none a scan of
    pairs.
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
    """Returns why this implementation does not support these shapes and dtypes, or None."""
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
            f"{plan.top_m} need {needed} bytes of shared memory, "
            f"only {_SHARED_BYTES} are available",
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
    """Pads the arrays and launches the kernel."""
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
    launch = gpu_kernel(
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
        cost_estimate=_cost(plan, blocks, num_tokens, operands, list(results.values())),
    )
    arrays = custom_batching.sequential_vmap(launch)(*operands)
    # Mosaic GPU drops the manual axes of `shard_map` over which its arguments vary.
    arrays = match_vma(arrays, operands)
    scores, addresses, *chosen = (x[: plan.num_tokens] for x in arrays)
    return TopK(scores, addresses, chosen[0] if chosen else None)


def _product_key_top_k_kernel(plan: Plan, blocks: Blocks, *refs: Any) -> None:
    """The program of a thread block; see the module docstring."""
    query, keys, weights, cores, summed_core, places, *refs_left = refs
    num_results = 3 if plan.with_chosen else 2
    results, scratch = refs_left[:num_results], Scratch(*refs_left[num_results:])
    head = lax.axis_index("head")
    tile = lax.axis_index("tiles") * blocks.cluster + lax.axis_index("peer")
    group = lax.axis_index("group")
    local = scratch.of(group)

    for side in range(2):
        key_scores(plan, blocks, side, head, tile * blocks.tokens, group, query, keys, scratch)
        barrier_arrive_and_wait(scratch.together)
        shortlist(plan, blocks, side, head, weights, local)
        # The next side, and then the candidate pairs, overwrite these scores.
        barrier_arrive_and_wait(scratch.together)
    core = [[summed_core[head, a, b] for b in range(plan.rank)] for a in range(plan.rank)]
    select_pairs(plan, blocks, Grid(plan, core, local), places, local)
    first_token = tile * blocks.tokens + group * TOKENS
    write_results(plan, head, pl.ds(first_token, TOKENS), cores, results, local)


def _cost(
    plan: Plan, blocks: Blocks, num_tokens: int, operands: tuple[Array, ...], results: list[Any]
) -> pl.CostEstimate:
    """The FLOPs of the key products, and the bytes read from and written to device memory.

    A cluster reads all keys, and a thread block its queries with each block of keys. These reads
    come from the L2 cache, unless the keys take most of it.
    """
    query, keys, *small = operands
    clusters = num_tokens // (blocks.tokens * blocks.cluster)
    read = query.nbytes + keys.nbytes * (1 if keys.nbytes <= L2_BYTES // 2 else clusters)
    return pl.CostEstimate(
        flops=2 * plan.num_tokens * 2 * plan.num_heads * plan.rank * plan.num_keys * plan.key_dim,
        transcendentals=0,
        bytes_accessed=read
        + sum(x.nbytes for x in small)
        + sum(4 * math.prod(shape) for shape, _ in results),
    )


def _pad(x: Array, *after: int) -> Array:
    """Pads the end of each axis with zeros; a no-op if there is nothing to add."""
    return jnp.pad(x, [(0, n) for n in after]) if any(after) else x
