"""The public operator: checks its arguments and owns the derivative."""

import dataclasses
import functools
from typing import Any, Literal

import jax

from kernels_pallas import arguments, dispatch, tuned
from kernels_pallas.array_types import AnyArray, Array, Float, Int32
from kernels_pallas.common import check, chunk_tokens, vary_alike
from kernels_pallas.product_key_top_k.call import TopKBackend, TopKCall
from kernels_pallas.protocol import cotangents

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]

BACKENDS = dispatch.Backends[TopKBackend](
    "kernels_pallas.product_key_top_k",
    {"xla": "xla", "pallas_tpu": "tpu.backend", "pallas_gpu": "gpu.backend"},
)

# What an unnamed implementation is: the first that can take the call.
AUTOMATIC = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}

MAX_NUM_KEYS = 46340  # addresses are int32, and 46341 squared is beyond 2^31

# Bytes of key scores that one chunk of tokens holds, when the caller names no chunk size. CPU, 2
# cores, milliseconds, best of 7 interleaved runs, key dim 64, cores of singular values 2.1 : 0.15:
#
#     T, n, s, m             chunks of 64    128    256 tokens    plain, no chunks
#      512,  964,  94,  94           11.0   10.6   12.8                       38.3
#      256, 1696, 128, 256           14.7   20.3   26.3                       31.5
#     2048,  360,  32,  32           12.7   11.8   10.7                       30.2
#
# What a token's numbers take must stay in the cache while they are searched. The products with the
# keys are in these times: with key dims of 512 and 1280, as at the paper's sizes, they are a third
# to a half of the whole, and the plain form is 2.7 and 2.0 times as slow.
_CPU_CHUNK_BYTES = 2 * 2**20
# An accelerator pays a launch for each operation of a chunk, so it gets as few chunks as its memory
# easily holds. Reasoned, not measured.
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
    """Finds, for each token and head, the `top_m` best pairs of a row and a column key.

    For head h, side i (0 rows, 1 columns), rank a, and query heads or ranks of 1 that serve all:

        S_i[t, a, k] = <query[h, i, a, t], keys[h, i, a, k]>
        rows = the shortlist best k of S_0 u[h],   columns = the shortlist best k of S_1 v[h]
        score_c[t, j, k] = sum over a, b of S_0[t, a, j] cores[c, h, a, b] S_1[t, b, k]
        chosen = the top_m best (j, k) of rows x columns by sum over c of score_c

    Without cores, score[t, j, k] = S_0[t, 0, j] + S_1[t, 0, k], of one core and rank 1. Sources:
    Tucker scores, UltraMemV2 (arXiv 2508.18756), eq. 6-8 and 10-11; additive scores, product-key
    memory (arXiv 1907.05242). `reference.py` says the same with every grid in full.

    Selections are best first. Equal scores (-0 equals 0) go to the key of the lower number in a
    shortlist, and to the pair whose row, then column, comes earlier in its shortlist. NaN counts as
    the best of all scores: a key that scores NaN is chosen, and its NaN is returned.

    Sums are accumulated in, and scores have, float32, or float64 if query or keys are; products of
    query and keys are those of their dtype. The selection is exact for scores so rounded; which of
    two that differ by a rounding error is better depends on the compiler.

    Gradients reach query, keys and cores through the scores of the chosen pairs alone; u, v and the
    selection count as constants. They are accumulated like the scores, in a fixed order, and
    returned in the dtype of their argument. Reverse-mode differentiable only. Inside
    `jax.shard_map` it works on the local arrays, which may vary over different manual axes;
    outside, on a mesh with explicit axes, tokens may be sharded, and nothing else.
    Arrays may be NumPy's.

    Args:
        query: of each head, side, rank and token; heads and ranks that share a query may be 1.
        keys: of each head, side and rank.
        u: what weights the ranks of a row key's score in the shortlist, the first left singular
            vector of the summed cores. Its sign matters: (-u, -v) are singular vectors as well, but
            shortlist the keys of the lowest S u and S v, so that other pairs are selected.
            `jnp.linalg.svd` returns either; `fix_signs` settles it.
        v: the same for columns, the first right singular vector. The closer the cores are to
            lambda u v^T, the less often the selection has to look at the whole grid.
        cores: Tucker cores; None, as are then u and v, for additive scores.
        top_m: pairs to choose for each token and head.
        shortlist: candidates a side.
        implementation: of the forward and the backward pass. "xla" runs everywhere, "pallas_tpu"
            on TPU, "pallas_gpu" on Hopper. By default the first of `AUTOMATIC` that supports the
            call, which is logged once.
        chunk_size: tokens that "xla" processes at once. By default what was measured (`tuned.py`),
            else a power of two, from a budget of bytes for the platform.
        platform: what the call will be compiled for, where it is not the platform of the mesh in
            context nor the default backend: ahead-of-time compilation for TPU in a CPU process.

    Returns:
        The score of each chosen pair by core, and its address, row * num_keys + column; the
        selections of a token's heads lie side by side.

    Raises:
        ValueError: an argument's rank, shape, dtype or value breaks a rule above; the message names
            the argument, what it got and the rule.
        UnsupportedError: the named implementation cannot take the call; the message says why.
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
    """Which implementation gets a call whose arguments are sound, and its chunks of tokens."""
    num_heads, num_sides, rank, num_keys, _ = call.keys.shape
    row = num_heads * num_sides * rank * num_keys * call.dtype.itemsize
    chunk_bytes = _CPU_CHUNK_BYTES if platform == "cpu" else _ACCELERATOR_CHUNK_BYTES
    default = tuned.Chunks(chunk_tokens(row, chunk_bytes))
    call = dataclasses.replace(call, chunk_size=chunk_size or default.chunk_size)
    reasons = BACKENDS.unsupported_reasons(call, platform)
    chosen = dispatch.choose("product_key_top_k", implementation, platform, AUTOMATIC, reasons)
    if chosen == "xla" and chunk_size is None:
        key = tuned.Key.of("product_key_top_k", "xla", "both", call.sizes, call.query.dtype)
        chunks = tuned.lookup(default, key, platform=platform) or default
        call = dataclasses.replace(call, chunk_size=chunks.chunk_size)
    return chosen, call


def _local_top_k(call: TopKCall, implementation: str) -> tuple[Array, Array]:
    return _top_k(vary_alike(call), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _top_k(call: TopKCall, implementation: str) -> tuple[Array, Array]:
    result = BACKENDS[implementation].forward(call)
    return result.scores, result.addresses


def _top_k_fwd(call: TopKCall, implementation: str) -> tuple[tuple[Array, Array], Any]:
    result = BACKENDS[implementation].forward(call, with_chosen=True)
    # The scores are not needed again.
    return (result.scores, result.addresses), (call, result.addresses, result.chosen)


def _top_k_bwd(implementation: str, residuals: Any, grads: Any) -> tuple[TopKCall]:
    call, addresses, chosen = residuals
    gradients = BACKENDS[implementation].backward(call, addresses, chosen, grads[0])
    return (cotangents(call, gradients),)


_top_k.defvjp(_top_k_fwd, _top_k_bwd)


def _checked_arrays(passed: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments as arrays of JAX that fit together, by name."""
    arrays = arguments.as_arrays(TopKCall, passed)
    query, keys, u, v, cores = (arrays[name] for name in ("query", "keys", "u", "v", "cores"))
    num_heads, num_sides, rank, num_keys, key_dim = keys.shape
    check(num_sides == 2, "keys.shape[1]", num_sides, "2, rows and columns")
    check(num_keys <= MAX_NUM_KEYS, "keys.shape[3]", num_keys, f"at most {MAX_NUM_KEYS}")
    for axis in (0, 2, 4):
        check(keys.shape[axis] >= 1, f"keys.shape[{axis}]", keys.shape[axis], "at least 1")
    rule = f"[{num_heads} or 1, 2, {rank} or 1, num_tokens, {key_dim}], as keys have it"
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
    shortlist = arguments.whole_number("shortlist", shortlist)
    rule = f"from 1 to num_keys = {num_keys}"
    check(1 <= shortlist <= num_keys, "shortlist", shortlist, rule)
    top_m = arguments.whole_number("top_m", top_m)
    rule = f"from 1 to shortlist squared = {shortlist**2}"
    check(1 <= top_m <= shortlist**2, "top_m", top_m, rule)
    return top_m, shortlist, arguments.chunk_tokens(chunk_size)
