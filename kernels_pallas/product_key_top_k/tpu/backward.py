"""The backward pass of product-key top-k on the TensorCores of a TPU, in one kernel.

For each side, the gradients of S of the chosen keys are expanded to a dense [n, tokens] matrix by
comparing ids; repeated ids sum, in the order of the pairs. Two matrix products with it give the
gradients of queries and keys. Only the rows of 256 keys are materialized at a time, in VMEM. The
keys of a side also stay in VMEM, as do their gradients until all tokens have contributed. Token
tiles are processed sequentially, so the order of every sum is fixed.

If each rank has its own queries, the expansion takes 3 r m n vector operations per side and token,
else (1 + 2 r) m n. In the former case, thousands of operations per token for both sides, at the
paper's sizes (n, m): 138 (360, 32), 811 (528, 128), 1,087 (964, 94), 5,210 (1696, 256). The last
takes 0.87 microseconds on a v5e, and its products, twice those of the forward pass and in float32,
take 1.06. Counted, not measured.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.array_types import Array, Float, Int32
from kernels_pallas.common import add_up, check, padded, tiled_bytes
from kernels_pallas.product_key_top_k.call import TopKCall

_SUBLANES, _LANES = 8, 128
_REGISTERS = 16  # registers of sums, over ranks, in a pass over all chosen keys
_KEYS_PER_PRODUCT = 256
_TOKENS_PER_TILE = (512, 256, 128)  # the first that fits
_VMEM_BYTES = 56 * 2**20  # of 64 MiB on tpu7x; others have more


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The number of tokens per step of the backward kernel."""

    tokens: int


def heuristic(call: TopKCall) -> Blocks:
    """As many tokens as fit: each step reads and writes all key gradients once."""
    candidates = [Blocks(num_tokens) for num_tokens in _TOKENS_PER_TILE]
    fitting = (x for x in candidates if _Plan(call, x).fits)
    return next(fitting, candidates[-1])


def unsupported_reason(call: TopKCall) -> str | None:
    """Returns why arguments of these shapes do not fit, or None."""
    plan = _Plan(call, heuristic(call))
    if plan.fits:
        return None
    needed = f"the backward pass needs {plan.vmem_bytes} bytes of VMEM"
    return f"{needed}, only {_VMEM_BYTES} are available"


def backward(
    call: TopKCall,
    addresses: Int32[Array, "num_tokens pairs"],
    chosen: Float[Array, "num_tokens 2 num_heads rank top_m"],
    scores_grad: Float[Array, "num_tokens pairs num_cores"],
) -> dict[str, Array]:
    """Computes the gradients of query, keys and cores, each in its own dtype."""
    query, keys, cores = call.query, call.keys, call.cores
    blocks = heuristic(call)
    key = tuned.Key.of("product_key_top_k", "pallas_tpu", "backward", call.sizes, query.dtype)
    blocks = tuned.lookup(blocks, key, platform="tpu") or blocks
    plan = _Plan(call, blocks)

    num_heads, top_m, num_tokens = plan.num_heads, plan.top_m, plan.num_tokens
    ids = addresses.T.reshape(num_heads, top_m, num_tokens)
    grads = jnp.moveaxis(scores_grad, 2, 0).swapaxes(1, 2)
    grads = grads.reshape(-1, num_heads, top_m, num_tokens).astype(jnp.float32)
    chosen = jnp.moveaxis(chosen, 0, 4)
    query_grad, keys_grad, *others = plan.run(query, keys, cores, ids, chosen, grads)
    if query.shape[0] < num_heads:
        query_grad = query_grad.sum(axis=0, keepdims=True).astype(query.dtype)
    gradients = {"query": query_grad, "keys": keys_grad}
    if cores is None:
        return gradients
    (partial_sums,) = others
    by_head = partial_sums.sum(axis=(1, 2, 4)).reshape(num_heads, -1, *cores.shape[2:])
    cores_grad = jnp.moveaxis(by_head, 0, 1)
    return gradients | {"cores": cores_grad.astype(cores.dtype)}


class _Plan:
    """Shapes, blocks and the steps of the backward kernel."""

    def __init__(self, call: TopKCall, blocks: Blocks) -> None:
        query, keys, cores = call.query, call.keys, call.cores
        self.query_heads, _, self.query_ranks, self.num_tokens, self.key_dim = query.shape
        self.num_heads, _, self.rank, self.num_keys, _ = keys.shape
        self.num_cores = 1 if cores is None else cores.shape[0]
        self.additive = cores is None
        self.top_m = call.top_m
        self.query_dtype, self.keys_dtype = query.dtype, keys.dtype

        self.tile_tokens = blocks.tokens
        rule = f"a multiple of {_LANES}, the lanes of a register"
        check(self.tile_tokens % _LANES == 0, "tokens", self.tile_tokens, rule)
        # Ranks that share a query add to the same gradient, so a step processes them together.
        self.step_ranks = self.rank if self.query_ranks == 1 else 1
        self.product_keys = min(_KEYS_PER_PRODUCT, padded(self.num_keys, _SUBLANES))
        self.listed = padded(self.top_m, _SUBLANES)

    @property
    def scratch(self) -> dict[str, Any]:
        """Shapes and dtypes of the scratch buffers in VMEM."""
        tokens = self.tile_tokens
        buffers = {
            "ids": ((self.listed, tokens), jnp.int32),
            "grads": ((self.step_ranks, self.listed, tokens), jnp.float32),
            "dense": ((self.step_ranks, self.product_keys, tokens), jnp.float32),
            "query_sums": ((tokens, self.key_dim), jnp.float32),
        }
        if self.keys_dtype != jnp.float32:
            shape = (self.step_ranks, self.num_keys, self.key_dim)
            buffers["keys_sums"] = (shape, jnp.float32)
        return buffers

    @property
    def vmem_bytes(self) -> int:
        """The scratch buffers, one or two buffers for each block, and space for temporaries."""
        width, tokens = padded(self.key_dim, _LANES), self.tile_tokens
        query_bytes, keys_bytes = self.query_dtype.itemsize, self.keys_dtype.itemsize
        scratch = sum(4 * math.prod(shape) for shape, _ in self.scratch.values())
        keys = padded(self.num_keys, _SUBLANES) * width * self.step_ranks * 2 * keys_bytes
        queries = tokens * width * (query_bytes + 4)
        pairs = 4 * tokens * self.listed * (1 + 2 * self.rank + self.num_cores)
        # Operands of products, in float32 and as three bfloat16 parts.
        parts = 10 * (width * (tokens + self.product_keys) + tokens * self.product_keys)
        return scratch + keys + 2 * (queries + pairs) + parts + 5 * 2**20

    @property
    def fits(self) -> bool:
        """Whether everything fits VMEM."""
        return self.vmem_bytes <= _VMEM_BYTES

    def run(
        self,
        query: Array,
        keys: Array,
        cores: Array | None,
        addresses: Array,
        chosen: Array,
        grads: Array,
    ) -> tuple[Array, ...]:
        """Calls the kernel; returns the gradients of queries, [H, ...], and keys.

        Gradients of queries that several heads share are float32. With cores, also returns partial
        sums of their gradients, [H, 2, steps, c r r, tokens of a tile].
        """
        per_head = self.query_heads > 1
        ranks, tokens, key_dim = self.step_ranks, self.tile_tokens, self.key_dim
        small = {}
        if cores is not None:
            small["cores"] = jnp.moveaxis(cores, 1, 0).astype(jnp.float32).reshape(-1)
        arrays = {
            "addresses": addresses,
            "chosen": chosen,
            "scores_grad": grads,
            "query": query,
            "keys": keys,
        }
        query_block = (1, 1, 1, tokens, key_dim)
        # A single buffer is enough, because the block changes only when the token tiles restart.
        keys_block = pl.BlockSpec(
            (1, 1, ranks, self.num_keys, key_dim),
            lambda h, s, a, t: (h, s, a, 0, 0),
            pipeline_mode=pl.Buffered(1),
        )
        in_specs = [
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in small),
            pl.BlockSpec((1, self.top_m, tokens), lambda h, s, a, t: (h, 0, t)),
            pl.BlockSpec((2, 1, self.rank, self.top_m, tokens), lambda h, s, a, t: (0, h, 0, 0, t)),
            pl.BlockSpec((self.num_cores, 1, self.top_m, tokens), lambda h, s, a, t: (0, h, 0, t)),
            pl.BlockSpec(query_block, lambda h, s, a, t: (h * per_head, s, a, t, 0)),
            keys_block,
        ]
        out_specs = [pl.BlockSpec(query_block, lambda h, s, a, t: (h, s, a, t, 0)), keys_block]
        shapes = [(self.num_heads, *query.shape[1:]), keys.shape]
        shares_query = self.query_heads < self.num_heads
        dtypes = [jnp.float32 if shares_query else query.dtype, keys.dtype]
        outputs = ["query_grad", "keys_grad"]
        if not self.additive:
            outputs.append("cores_grad")
            part = (self.num_cores * self.rank**2, tokens)
            shapes.append((self.num_heads, 2, self.rank // ranks, *part))
            dtypes.append(jnp.float32)
            out_specs.append(pl.BlockSpec((1, 1, 1, *part), lambda h, s, a, t: (h, s, a, 0, 0)))
        names = (*small, *arrays, *outputs, *self.scratch)

        def _product_key_top_k_backward_kernel(*refs: Any) -> None:
            self._step(dict(zip(names, refs, strict=True)))

        # Inside shard_map, results vary as the arguments do.
        axis_type = jax.typeof(query).manual_axis_type
        results = [
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axis_type)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        launch = pl.pallas_call(
            _product_key_top_k_backward_kernel,
            name="product_key_top_k_backward",
            grid=(self.num_heads, 2, self.rank // ranks, pl.cdiv(self.num_tokens, tokens)),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=results,
            scratch_shapes=[pltpu.VMEM(*buffer) for buffer in self.scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=self.vmem_bytes,
            ),
            cost_estimate=self._cost(arrays, [*small.values(), *results]),
        )
        # Pallas cannot batch the scalars in SMEM, so vmap becomes a loop of calls.
        return tuple(custom_batching.sequential_vmap(launch)(*small.values(), *arrays.values()))

    def _cost(self, arrays: dict[str, Array], others: list[Any]) -> pl.CostEstimate:
        """The FLOPs of both matrix products of a key; others are read or written once."""
        pairs = tiled_bytes(*(arrays[name] for name in ("addresses", "chosen", "scores_grad")))
        # If all tokens fit a tile, the pairs of a head stay in VMEM for both sides and all ranks.
        one_tile = self.num_tokens <= self.tile_tokens
        pair_reads = 1 if one_tile else 2 * self.rank // self.step_ranks
        query_reads = self.num_heads // self.query_heads
        return pl.CostEstimate(
            flops=4 * self.num_tokens * math.prod(arrays["keys"].shape),
            transcendentals=0,
            bytes_accessed=pair_reads * pairs
            + query_reads * tiled_bytes(arrays["query"])
            + tiled_bytes(arrays["keys"], *others),
        )

    def _step(self, refs: dict[str, Any]) -> None:
        """Processes one tile of tokens, for a head, a side, and the ranks of the step."""
        head, side, rank_step, tile = (pl.program_id(axis) for axis in range(4))
        is_token = tile * self.tile_tokens + _iota((1, self.tile_tokens), 1) < self.num_tokens
        self._list_gradients(refs, head, side, rank_step, is_token)

        # If keys are float32, accumulate their gradients directly in the output block.
        keys_sums = refs["keys_sums"] if "keys_sums" in refs else refs["keys_grad"].at[0, 0]

        @pl.when(tile == 0)
        def _begin() -> None:
            keys_sums[...] = jnp.zeros_like(keys_sums)
            if not self.additive:
                refs["cores_grad"][...] = jnp.zeros_like(refs["cores_grad"])

        if not self.additive:

            @pl.when((side == 0) & (rank_step == 0))
            def _sum_cores() -> None:
                self._sum_cores(refs, is_token)

        # Mask rows after the last token: they are uninitialized, and zero times NaN is NaN.
        is_row = tile * self.tile_tokens + _iota((self.tile_tokens, 1), 0) < self.num_tokens
        query = jnp.where(is_row, refs["query"][0, 0, 0].astype(jnp.float32), 0)
        query_sums = refs["query_sums"]
        query_sums[...] = jnp.zeros_like(query_sums)

        def multiply(first: Array | int, num_keys: int) -> None:
            self._expand(refs, first, num_keys)
            here = pl.ds(first, num_keys)
            for a in range(self.step_ranks):
                dense = refs["dense"][a, :num_keys]
                keys_sums[a, here] += _dot(dense, query, (1, 0))
                keys = refs["keys"][0, 0, a, here].astype(jnp.float32)
                query_sums[...] += _dot(dense, keys, (0, 0))

        num_products, rest = divmod(self.num_keys, self.product_keys)

        def multiply_full(i: Array, _: None) -> None:
            multiply(pl.multiple_of(i * self.product_keys, _SUBLANES), self.product_keys)

        lax.fori_loop(0, num_products, multiply_full, None)
        if rest:
            multiply(num_products * self.product_keys, rest)
        refs["query_grad"][0, 0, 0] = query_sums[...].astype(refs["query_grad"].dtype)

        if "keys_sums" in refs:

            @pl.when(tile == pl.num_programs(3) - 1)
            def _end() -> None:
                refs["keys_grad"][0, 0] = keys_sums[...].astype(refs["keys_grad"].dtype)

    def _list_gradients(
        self, refs: Any, head: Array, side: Array, rank_step: Array, is_token: Array
    ) -> None:
        """Writes the ids of the chosen keys of the side, and the gradients of their S by rank."""
        addresses = refs["addresses"][0]
        rows = lax.div(addresses, jnp.full_like(addresses, self.num_keys))
        refs["ids"][...] = jnp.full_like(refs["ids"], -1)
        refs["ids"][: self.top_m] = jnp.where(side == 0, rows, addresses - rows * self.num_keys)
        refs["grads"][...] = jnp.zeros_like(refs["grads"])
        for a in range(self.step_ranks):
            if self.additive:
                grads = refs["scores_grad"][0, 0]
            else:
                rank = rank_step * self.step_ranks + a
                grads = add_up(
                    refs["scores_grad"][core, 0] * self._other_side(refs, head, side, rank, core)
                    for core in range(self.num_cores)
                )
            refs["grads"][a, : self.top_m] = jnp.where(is_token, grads, 0)

    def _other_side(self, refs: Any, head: Array, side: Array, rank: Array, core: int) -> Array:
        """The derivative of a core's score by S of a side and rank: the core times the other S."""
        first = (head * self.num_cores + core) * self.rank**2
        terms = []
        for other in range(self.rank):
            entry = jnp.where(side == 0, rank * self.rank + other, other * self.rank + rank)
            terms.append(refs["cores"][first + entry] * refs["chosen"][1 - side, 0, other])
        return add_up(terms)

    def _sum_cores(self, refs: Any, is_token: Array) -> None:
        """Adds to the gradients of the cores, separately for each token of the tile."""
        ranks = range(self.rank)
        entries = itertools.product(range(self.num_cores), ranks, ranks)
        for i, (core, a, b) in enumerate(entries):
            products = refs["chosen"][0, 0, a] * refs["chosen"][1, 0, b]
            products *= refs["scores_grad"][core, 0]
            sums = jnp.sum(products, axis=0, keepdims=True)
            refs["cores_grad"][0, 0, 0, pl.ds(i, 1)] += jnp.where(is_token, sums, 0)

    def _expand(self, refs: Any, first: Array | int, num_keys: int) -> None:
        """Expands the gradients of S to a range of keys, with zeros for keys not chosen."""
        rows = _REGISTERS * _SUBLANES // self.step_ranks

        def expand(start: int, height: int, group: Array) -> None:
            tokens = pl.ds(pl.multiple_of(group * _LANES, _LANES), _LANES)
            ids = first + start + _iota((height, _LANES), 0)

            def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                places = pl.ds(pl.multiple_of(i * _SUBLANES, _SUBLANES), _SUBLANES)
                chosen = refs["ids"][places, tokens]
                grads = [refs["grads"][a, places, tokens] for a in range(self.step_ranks)]
                for k in range(_SUBLANES):
                    here = ids == chosen[k : k + 1]
                    sums = tuple(
                        x + jnp.where(here, grad[k : k + 1], 0)
                        for x, grad in zip(sums, grads, strict=True)
                    )
                return sums

            zeros = tuple(jnp.zeros((height, _LANES)) for _ in range(self.step_ranks))
            sums = lax.fori_loop(0, self.listed // _SUBLANES, add, zeros)
            for a, x in enumerate(sums):
                refs["dense"][a, pl.ds(start, height), tokens] = x

        def expand_group(group: Array, _: None) -> None:
            for start in range(0, num_keys, rows):
                expand(start, min(rows, padded(num_keys - start, _SUBLANES)), group)

        lax.fori_loop(0, self.tile_tokens // _LANES, expand_group, None)


def _dot(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    return lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
