"""The public operator: validates arguments, chooses a backend and defines the derivative."""

import dataclasses
import functools
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import arguments, dispatch, tables, tuned
from kernels_pallas.array_types import AnyArray, Array, Float, Int32
from kernels_pallas.common import check, chunk_tokens, match_vma
from kernels_pallas.product_key_top_k.call import TopKBackend, TopKCall
from kernels_pallas.protocol import cotangents

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]

BACKENDS = dispatch.Backends[TopKBackend](
    "kernels_pallas.product_key_top_k",
    {"xla": "xla", "pallas_tpu": "tpu.backend", "pallas_gpu": "gpu.backend"},
)

MAX_NUM_KEYS = 46340  # addresses are int32, and 46341 squared exceeds 2^31

# Bytes of key scores per chunk of tokens if the caller does not set a chunk size. Milliseconds on 2
# CPU cores, best of 7 interleaved runs, key dim 64, cores with singular values 2.1 : 0.15:
#
#     T, n, s, m             chunks of 64    128    256 tokens    plain, no chunks
#      512,  964,  94,  94           11.0   10.6   12.8                       38.3
#      256, 1696, 128, 256           14.7   20.3   26.3                       31.5
#     2048,  360,  32,  32           12.7   11.8   10.7                       30.2
#
# The scores of a chunk must stay in cache while they are searched. These times include the products
# with the keys. At the paper's key dims of 512 and 1280, the products take a third to a half of the
# total, and the plain form is 2.7 and 2.0 times as slow.
_CPU_CHUNK_BYTES = 2 * 2**20
# On an accelerator every operation of a chunk costs a launch, so chunks are as large as memory
# comfortably allows. Estimated, not measured.
_ACCELERATOR_CHUNK_BYTES = 256 * 2**20


def product_key_top_k(
    query: Float[AnyArray, "query_heads 2 query_ranks num_tokens key_dim"],
    keys: Float[AnyArray, "num_heads 2 rank num_keys key_dim"],
    u: Float[AnyArray, "num_heads rank"] | None,
    v: Float[AnyArray, "num_heads rank"] | None,
    cores: Float[AnyArray, "num_cores num_heads rank rank"] | None,
    *,
    top_m: int,
    shortlist: int,
    implementation: Implementation | None = None,
    chunk_size: int | None = None,
    platform: dispatch.Platform | None = None,
) -> tuple[
    Float[Array, "num_tokens num_heads*{top_m} cores"], Int32[Array, "num_tokens num_heads*{top_m}"]
]:
    """Finds the `top_m` best pairs of a row and a column key for each token and head.

    For head h, side i (0 rows, 1 columns) and rank a, broadcasting query heads or ranks of size 1:

        S_i[t, a, k] = <query[h, i, a, t], keys[h, i, a, k]>
        rows = the shortlist best k of S_0 u[h],   columns = the shortlist best k of S_1 v[h]
        score_c[t, j, k] = sum over a, b of S_0[t, a, j] cores[c, h, a, b] S_1[t, b, k]
        chosen = the top_m best (j, k) of rows x columns by sum over c of score_c

    Without cores, score[t, j, k] = S_0[t, 0, j] + S_1[t, 0, k], of one core and rank 1. Sources:
    Tucker scores, UltraMemV2 (arXiv 2508.18756), eq. 6-8 and 10-11; additive scores, product-key
    memory (arXiv 1907.05242). `reference.py` is the equivalent code with full grids.

    Selections are sorted, best first. Ties (-0 equals 0) go to the lower key index in a shortlist,
    and to the pair whose row, then column, comes earlier in its shortlist. NaN ranks above all
    other scores: a key that scores NaN is chosen, and its NaN is returned.

    Scores and accumulation are in float32, or in float64 if query or keys are; query and keys are
    multiplied in their own dtype. The selection is exact with respect to the rounded scores; the
    order of scores that differ by a rounding error depends on the compiler.

    Gradients flow to query, keys and cores only through the scores of the chosen pairs; u, v and
    the selection are treated as constants. Gradients are accumulated like the scores, in a fixed
    order, and returned in the dtype of their argument. Only reverse-mode differentiation is
    supported. Inside `jax.shard_map` the operator works on the local arrays, which may vary over
    different manual axes; outside, on a mesh with explicit axes, arrays may be sharded over tokens
    but no other axis. NumPy arrays are accepted.

    Args:
        query: for each head, side, rank and token; axes of heads or ranks that share a query may
            have size 1.
        keys: for each head, side and rank.
        u: weights of the ranks in the scores that shortlist row keys: the first left singular
            vector of the summed cores. Its sign matters: (-u, -v) are singular vectors too, but
            they shortlist the keys with the lowest S u and S v, and so select other pairs.
            `jnp.linalg.svd` may return either sign; use `fix_signs`.
        v: the same for columns: the first right singular vector. The closer the cores are to
            lambda u v^T, the less often the selection has to search the full grid.
        cores: Tucker cores; None, together with u and v, for additive scores.
        top_m: number of pairs to choose for each token and head.
        shortlist: number of candidates per side.
        implementation: for the forward and the backward pass. "xla" runs everywhere, "pallas_tpu"
            on TPU, "pallas_gpu" on Hopper. By default, the first of `tables.AUTOMATIC` that
            supports the call; the choice is logged once.
        chunk_size: tokens that "xla" processes at once. By default the tuned value (`tuned.py`) if
            there is one, else a power of two that fits a memory budget of the platform.
        platform: what the call will be compiled for, if that is neither the platform of the mesh in
            context nor the default backend: ahead-of-time compilation for TPU in a CPU process.

    Returns:
        The score of each chosen pair by core, and its address, row * num_keys + column; the
        selections of the heads of a token are concatenated.

    Raises:
        ValueError: the rank, shape, dtype or value of an argument is invalid; the message names the
            argument, its value and the rule.
        UnsupportedError: the named implementation does not support the call; the message says why.
    """
    given = {"query": query, "keys": keys, "u": u, "v": v, "cores": cores}
    arrays = _checked_arrays(given)
    top_m, shortlist, chunk = _checked_options(arrays["keys"], top_m, shortlist, chunk_size)
    target = dispatch.lowering_platform(platform)
    call = TopKCall(**arrays, top_m=top_m, shortlist=shortlist)
    chosen, call = _choose(call, chunk, implementation, target)
    return arguments.per_device("product_key_top_k", _local_top_k, call, chosen)


def _choose(
    call: TopKCall, chunk_size: int | None, implementation: str | None, platform: str
) -> tuple[str, TopKCall]:
    """Chooses the implementation of a validated call, and its chunk size."""
    num_heads, num_sides, rank, num_keys, _ = call.keys.shape
    row = num_heads * num_sides * rank * num_keys * call.dtype.itemsize
    chunk_bytes = _CPU_CHUNK_BYTES if platform == "cpu" else _ACCELERATOR_CHUNK_BYTES
    default = tuned.Chunks(chunk_tokens(row, chunk_bytes))
    call = dataclasses.replace(call, chunk_size=chunk_size or default.chunk_size)
    reasons = BACKENDS.unsupported_reasons(call, platform)
    chosen = dispatch.choose(
        "product_key_top_k", implementation, platform, tables.AUTOMATIC, reasons
    )
    if chosen == "xla" and chunk_size is None:
        key = tuned.Key.of("product_key_top_k", "xla", "both", call.sizes, call.query.dtype)
        chunks = tuned.lookup(default, key, platform=platform) or default
        call = dataclasses.replace(call, chunk_size=chunks.chunk_size)
    return chosen, call


def _local_top_k(call: TopKCall, implementation: str) -> tuple[Array, Array]:
    return _top_k(match_vma(call), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _top_k(call: TopKCall, implementation: str) -> tuple[Array, Array]:
    result = BACKENDS[implementation].forward(call)
    return result.scores, result.addresses


def _top_k_fwd(call: TopKCall, implementation: str) -> tuple[tuple[Array, Array], Any]:
    result = BACKENDS[implementation].forward(call, with_chosen=True)
    # Named so that a rematerialization policy can keep them: they are small, and dear to compute.
    result = checkpoint_name(result, "product_key_top_k")
    # The backward pass does not need the scores.
    return (result.scores, result.addresses), (call, result.addresses, result.chosen)


def _top_k_bwd(implementation: str, residuals: Any, grads: Any) -> tuple[TopKCall]:
    call, addresses, chosen = residuals
    gradients = BACKENDS[implementation].backward(call, addresses, chosen, grads[0])
    return (cotangents(call, gradients),)


_top_k.defvjp(_top_k_fwd, _top_k_bwd)


def _checked_arrays(passed: dict[str, Any]) -> dict[str, Any]:
    """Converts the arguments to JAX arrays and checks that their shapes are consistent."""
    arrays = arguments.as_arrays(TopKCall, passed)
    query, keys, u, v, cores = (arrays[name] for name in ("query", "keys", "u", "v", "cores"))
    num_heads, num_sides, rank, num_keys, key_dim = keys.shape
    check(num_sides == 2, "keys.shape[1]", num_sides, "2 (rows and columns)")
    check(num_keys <= MAX_NUM_KEYS, "keys.shape[3]", num_keys, f"at most {MAX_NUM_KEYS}")
    for axis in (0, 2, 4):
        check(keys.shape[axis] >= 1, f"keys.shape[{axis}]", keys.shape[axis], "at least 1")
    rule = f"[{num_heads} or 1, 2, {rank} or 1, num_tokens, {key_dim}] to match keys"
    fits = query.shape[0] in (1, num_heads) and query.shape[2] in (1, rank)
    fits = fits and query.shape[1] == num_sides and query.shape[4] == key_dim
    check(fits, "query.shape", query.shape, rule)

    given = ", ".join(
        f"{name} {'absent' if array is None else 'given'}"
        for name, array in (("u", u), ("v", v), ("cores", cores))
    )
    together = (u is None) == (v is None) == (cores is None)
    check(together, "Tucker arrays", given, "all or none")
    if u is None or v is None or cores is None:
        check(rank == 1, "keys.shape[2]", rank, "1 without cores")
        return arrays
    for name, vector in (("u", u), ("v", v)):
        rule = f"[num_heads, rank] = {(num_heads, rank)}"
        check(vector.shape == (num_heads, rank), f"{name}.shape", vector.shape, rule)
    expected = (num_heads, rank, rank)
    rule = f"[num_heads, rank, rank] = {expected}"
    check(cores.shape[1:] == expected, "cores.shape[1:]", cores.shape[1:], rule)
    check(cores.shape[0] >= 1, "cores.shape[0]", cores.shape[0], "at least 1")
    return arrays


def _checked_options(
    keys: Array, top_m: Any, shortlist: Any, chunk_size: Any
) -> tuple[int, int, int | None]:
    num_keys = keys.shape[3]
    shortlist = arguments.as_integer("shortlist", shortlist)
    rule = f"from 1 to num_keys = {num_keys}"
    check(1 <= shortlist <= num_keys, "shortlist", shortlist, rule)
    top_m = arguments.as_integer("top_m", top_m)
    rule = f"from 1 to shortlist squared = {shortlist**2}"
    check(1 <= top_m <= shortlist**2, "top_m", top_m, rule)
    return top_m, shortlist, arguments.chunk_tokens(chunk_size)
