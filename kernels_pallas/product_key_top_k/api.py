"""The public operator: checks its arguments and owns the derivative."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, dispatch, tuned
from kernels_pallas.arguments import Argument
from kernels_pallas.array_types import AnyArray, Array, Float, Int32
from kernels_pallas.common import check, chunk_tokens, vary_alike
from kernels_pallas.product_key_top_k.options import Options
from kernels_pallas.product_key_top_k.reference import scores_dtype
from kernels_pallas.product_key_top_k.shapes import sizes

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]

# Each has `unsupported_reason`, `forward` and `backward`, of the same arguments in the same order.
BACKENDS = dispatch.Backends("kernels_pallas.product_key_top_k", get_args(Implementation))

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
            vector of the summed cores.
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
    arrays = _checked_arrays(query, keys, u, v, cores)
    query, keys, u, v, cores = arrays.values()
    top_m, shortlist, chunk_size = _checked_options(keys, top_m, shortlist, chunk_size)
    target = dispatch.lowering_platform(platform)
    num_heads, num_sides, rank, num_keys, _ = keys.shape
    row = num_heads * num_sides * rank * num_keys * scores_dtype(query, keys).itemsize
    chunk_bytes = _CPU_CHUNK_BYTES if target == "cpu" else _ACCELERATOR_CHUNK_BYTES
    default = tuned.Chunks(chunk_tokens(row, chunk_bytes))
    options = Options(top_m, shortlist, chunk_size or default.chunk_size)
    reasons = BACKENDS.unsupported_reasons(query, keys, u, v, cores, options, target)
    chosen = dispatch.choose("product_key_top_k", implementation, target, AUTOMATIC, reasons)
    if chosen == "xla" and chunk_size is None:
        shape = sizes(query, keys, cores, top_m=top_m, shortlist=shortlist)
        key = tuned.Key.of("product_key_top_k", "xla", "both", shape, query.dtype)
        chunks = tuned.lookup(default, key, platform=target) or default
        options = options._replace(chunk_size=chunks.chunk_size)
    return arguments.per_device(
        "product_key_top_k",
        _local_top_k,
        arrays,
        (options, chosen),
        token_axes={"query": 3},
    )


def _local_top_k(
    query: Array,
    keys: Array,
    u: Array | None,
    v: Array | None,
    cores: Array | None,
    options: Options,
    implementation: str,
) -> tuple[Array, Array]:
    return _top_k(*vary_alike((query, keys, u, v, cores)), options, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _top_k(
    query: Array,
    keys: Array,
    u: Array | None,
    v: Array | None,
    cores: Array | None,
    options: Options,
    implementation: str,
) -> tuple[Array, Array]:
    options = options._replace(with_chosen=False)
    scores, addresses, _ = BACKENDS[implementation].forward(query, keys, u, v, cores, options)
    return scores, addresses


def _top_k_fwd(
    query: Array,
    keys: Array,
    u: Array | None,
    v: Array | None,
    cores: Array | None,
    options: Options,
    implementation: str,
) -> tuple[tuple[Array, Array], Any]:
    forward = BACKENDS[implementation].forward
    scores, addresses, chosen = forward(query, keys, u, v, cores, options)
    return (scores, addresses), (query, keys, u, v, cores, addresses, chosen)


def _top_k_bwd(
    options: Options, implementation: str, residuals: Any, grads: Any
) -> tuple[Array | None, ...]:
    query, keys, u, v, cores, addresses, chosen = residuals
    query_grad, keys_grad, cores_grad = BACKENDS[implementation].backward(
        query, keys, cores, addresses, chosen, grads[0], options
    )
    zeros = [None if x is None else jnp.zeros_like(x) for x in (u, v)]
    return query_grad, keys_grad, *zeros, cores_grad


_top_k.defvjp(_top_k_fwd, _top_k_bwd)


def _checked_arrays(query: Any, keys: Any, u: Any, v: Any, cores: Any) -> dict[str, Any]:
    """Returns the arguments as arrays of JAX that fit together, by name."""
    arrays = arguments.as_arrays(
        {
            "query": Argument(query, "[num_heads or 1, 2, rank or 1, num_tokens, key_dim]"),
            "keys": Argument(keys, "[num_heads, 2, rank, num_keys, key_dim]"),
            "u": Argument(u, "[num_heads, rank]", optional=True),
            "v": Argument(v, "[num_heads, rank]", optional=True),
            "cores": Argument(cores, "[num_cores, num_heads, rank, rank]", optional=True),
        }
    )
    query, keys, u, v, cores = arrays.values()
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
