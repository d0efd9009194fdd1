"""Dropless mixture of experts: every token is processed by all its experts, without a capacity.

(token, expert) pairs are sorted by expert, so that each expert works on a contiguous range of rows.
The router weight of a pair multiplies the inner activations, before the down projection. Combining
is then an unweighted sum over a token's rows, and dispatch and combine are each other's transpose.
Both are implemented as gathers, never as scatter-adds.

The VJP saves only its arguments and recomputes rows and inner activations, which for k experts per
token are more than k times larger. This takes 2 matrix products more than the 9 of forward and
backward, and no more if the block is rematerialised anyway. On CPU, saving the activations would
make this layer 3 to 5 % faster for 20 % more memory (measured).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from umv2 import kernels
from umv2.model import layers
from umv2.types import accumulation_dtype, struct

# Maximum rows per block. On CPU, forward and backward in ms by block size, 2 shared cores, float32,
# median of 8 interleaved runs:
#
#     tokens x k, experts, h, s        rows: 32     64    128    256    512
#     2048 x 8, 32, 192, 56                57.2   49.5   46.5   54.1   56.7
#     2048 x 8, 64, 128, 32                33.2   24.2   23.6   30.6
#     1024 x 8, 64, 512, 256                225    210    213    228
_CPU_BLOCK_ROWS = 128
# Larger on GPU, where every block costs several kernel launches. An estimate, not measured.
_GPU_BLOCK_ROWS = 2048


@struct
class Dispatch:
    """The assignment of (token, choice) pairs to rows [0, t * k), which are sorted by expert."""

    # Pair of each row, as token * k + choice.
    pairs: Int[Array, " m"]
    # Row of each pair.
    rows: Int[Array, "t k"]
    # Number of rows of each expert.
    group_sizes: Int[Array, " experts"]


def plan_dispatch(choices: Int[Array, "t k"], num_experts: int) -> Dispatch:
    """Sorts the pairs by expert; the pairs of one expert stay in token order."""
    flat = choices.reshape(-1)
    places = jnp.arange(flat.size, dtype=jnp.int32)
    experts, pairs = lax.sort((flat, places), num_keys=1, is_stable=True)
    rows = jnp.zeros_like(places).at[pairs].set(places, unique_indices=True)
    ends = jnp.searchsorted(experts, jnp.arange(num_experts, dtype=flat.dtype), side="right")
    sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
    return Dispatch(pairs=pairs, rows=rows.reshape(choices.shape), group_sizes=sizes)


def mixture(
    x: Float[Array, "t d"],
    weights: Float[Array, "t k"],
    dispatch: Dispatch,
    into: Sequence[Float[Array, "experts d _"]],
    down: Float[Array, "experts s d"],
) -> Float[Array, "t d"]:
    """Returns the weighted sum over each token's experts: sum_j w_j Down(silu(Gate x) * Up x).

    `into` holds Gate and Up, each [experts, d, s], or both as one array [experts, d, 2 s]. Matrix
    products use the dtype of `x`; sums over a token's experts accumulate in float32 (float64 for
    float64). Supports reverse-mode differentiation only. Inside `jax.shard_map`, tokens and
    matrices may each be replicated over some mesh axes.
    """
    arguments = (x, weights.astype(x.dtype), (tuple(into), down), dispatch)
    return _mixture(*kernels.match_vma(arguments))


@jax.custom_vjp
def _mixture(x: Array, weights: Array, matrices: Any, dispatch: Dispatch) -> Array:
    rows = (_dispatch_tokens(x, dispatch), _sorted_weights(weights, dispatch))
    out = _by_platform(_ragged, _blocked, rows, matrices, dispatch.group_sizes)
    return _combine(out, dispatch)


def _mixture_fwd(*arguments: Any) -> tuple[Array, Any]:
    return _mixture(*arguments), arguments


def _mixture_bwd(arguments: Any, y_grad: Array) -> tuple[Array, Array, Any, None]:
    x, weights, matrices, dispatch = arguments
    rows = (_dispatch_tokens(x, dispatch), _sorted_weights(weights, dispatch))
    (rows_grad, weights_grad), matrices_grad = _by_platform(
        _ragged_gradients,
        _blocked_gradients,
        rows,
        matrices,
        dispatch.group_sizes,
        _dispatch_tokens(y_grad, dispatch),
    )
    return _combine(rows_grad, dispatch), weights_grad[dispatch.rows, 0], matrices_grad, None


_mixture.defvjp(_mixture_fwd, _mixture_bwd)


def _by_platform(ragged: Callable[..., Any], blocked: Callable[..., Any], *operands: Any) -> Any:
    """Selects the implementation by the platform that the program is lowered for.

    That need not be the current backend: programs for TPUs can be compiled on a CPU. XLA implements
    grouped matrix products on TPU only. On CPU and NVIDIA GPUs it lowers `ragged_dot` to a dense
    product of all rows with all experts (seen in programs that jax 0.12.0.1 compiled for an H200).
    """
    return lax.platform_dependent(
        *operands,
        tpu=ragged,
        cpu=functools.partial(blocked, max_block_rows=_CPU_BLOCK_ROWS),
        default=functools.partial(blocked, max_block_rows=_GPU_BLOCK_ROWS),
    )


def _dispatch_tokens(x: Float[Array, "t d"], dispatch: Dispatch) -> Float[Array, "m d"]:
    """Gathers the token of each row."""
    return x[dispatch.pairs // dispatch.rows.shape[1]]


def _sorted_weights(weights: Float[Array, "t k"], dispatch: Dispatch) -> Float[Array, "m 1"]:
    return weights.reshape(-1, 1)[dispatch.pairs]


def _combine(rows: Float[Array, "m d"], dispatch: Dispatch) -> Float[Array, "t d"]:
    """Sums the rows of each token's pairs; the transpose of `_dispatch_tokens`."""
    dtype = accumulation_dtype(rows.dtype)
    # One gather per choice: XLA fuses them, but would materialise [t, k, d] for a single gather.
    choices = [rows[dispatch.rows[:, choice]] for choice in range(dispatch.rows.shape[1])]
    total = functools.reduce(jnp.add, [choice.astype(dtype) for choice in choices])
    return total.astype(rows.dtype)


def _swiglu(product: Callable[[Array, Array], Array], rows: Any, matrices: Any) -> Array:
    """Applies expert SwiGLUs to rows (inputs, router weights) with the given matrix product."""
    (x, weights), (into, down) = rows, matrices
    projected = [product(x, matrix) for matrix in into]
    gate, up = projected if len(projected) == 2 else jnp.split(projected[0], 2, axis=-1)
    # Weighted in float32, since the gradient of a weight is a sum over columns.
    dtype = accumulation_dtype(x.dtype)
    inner = (jax.nn.silu(gate) * up).astype(dtype) * weights.astype(dtype)
    return product(inner.astype(x.dtype), down)


# --- TPU: grouped matrix products ---


def _ragged(rows: Any, matrices: Any, group_sizes: Array) -> Array:
    def product(x: Array, stacked: Array) -> Array:
        return _grouped_product(x, stacked, group_sizes)

    return _swiglu(product, rows, matrices)


@jax.custom_vjp
def _grouped_product(
    x: Float[Array, "m i"],
    stacked: Float[Array, "experts i o"],
    group_sizes: Int[Array, " experts"],
) -> Float[Array, "m o"]:
    """Multiplies the rows of each expert by its matrix, in the dtype of the rows.

    Like `sharding.linear`, it accumulates in float32, and the gradient of a float32 matrix is not
    rounded to the dtype of the rows.
    """
    return _ragged_dot(x, stacked.astype(x.dtype), group_sizes, _ROWS_TIMES_MATRICES).astype(
        x.dtype
    )


def _grouped_product_fwd(x: Array, stacked: Array, group_sizes: Array) -> tuple[Array, Any]:
    return _grouped_product(x, stacked, group_sizes), (x, stacked, group_sizes)


def _grouped_product_bwd(residuals: Any, grad: Array) -> tuple[Array, Array, None]:
    x, stacked, group_sizes = residuals
    narrow = stacked.astype(x.dtype)
    x_grad = _ragged_dot(grad, narrow, group_sizes, _ROWS_TIMES_TRANSPOSED).astype(x.dtype)
    stacked_grad = _ragged_dot(x, grad, group_sizes, _ROWS_TIMES_ROWS).astype(stacked.dtype)
    return x_grad, stacked_grad, None


_grouped_product.defvjp(_grouped_product_fwd, _grouped_product_bwd)


def _contracting(left: int, right: int, *, grouped: Sequence[int]) -> lax.RaggedDotDimensionNumbers:
    """Returns a product that contracts these axes of rows and of matrices grouped along an axis."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((left,), (right,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=grouped,
    )


_ROWS_TIMES_MATRICES = _contracting(1, 1, grouped=[0])
_ROWS_TIMES_TRANSPOSED = _contracting(1, 2, grouped=[0])
_ROWS_TIMES_ROWS = _contracting(0, 0, grouped=[])  # one matrix for each group of rows


def _ragged_dot(
    left: Array, right: Array, group_sizes: Array, dimensions: lax.RaggedDotDimensionNumbers
) -> Array:
    dtype = accumulation_dtype(left.dtype)
    return lax.ragged_dot_general(
        left, right, group_sizes, dimensions, preferred_element_type=dtype
    )


def _ragged_gradients(rows: Any, matrices: Any, group_sizes: Array, out_grad: Array) -> Any:
    _, pull_back = jax.vjp(functools.partial(_ragged, group_sizes=group_sizes), rows, matrices)
    return pull_back(out_grad)


# --- CPU and GPU: a loop over blocks of rows ---
#
# Each iteration applies all matrix products of one expert to one block of its rows, which on CPU is
# a third faster than one loop per product. Experts without rows are not read.


@dataclasses.dataclass(frozen=True)
class _Block:
    """A fixed-size slice of rows, containing consecutive rows of one expert."""

    expert: Array
    # First row of the slice.
    start: Array
    # Which rows of the slice are the expert's: the last block of an expert may contain others'.
    owned: Bool[Array, "block 1"]

    def read(self, rows: Any) -> Any:
        """Slices the rows of the block."""
        return jax.tree.map(
            lambda array: lax.dynamic_slice_in_dim(array, self.start, len(self.owned)), rows
        )

    def read_owned(self, rows: Array) -> Array:
        """Slices the rows of the block, with zeros in place of other experts' rows."""
        return jnp.where(self.owned, self.read(rows), 0)

    def write(self, rows: Array, new: Array) -> Array:
        """Writes the expert's rows, leaving those of other experts unchanged."""
        new = jnp.where(self.owned, new, self.read(rows))
        return lax.dynamic_update_slice_in_dim(rows, new, self.start, axis=0)

    def matrices(self, stacked: Any) -> Any:
        """Indexes the expert's matrices."""
        return jax.tree.map(
            lambda array: lax.dynamic_index_in_dim(array, self.expert, keepdims=False), stacked
        )

    def add(self, stacked: Array, new: Array) -> Array:
        """Adds to the expert's entry of a stacked array."""
        new = self.matrices(stacked) + new
        return lax.dynamic_update_index_in_dim(stacked, new, self.expert, axis=0)


def _visit_blocks[T](
    visit: Callable[[_Block, T], T],
    initial: T,
    group_sizes: Array,
    *,
    num_rows: int,
    max_block_rows: int,
) -> T:
    """Folds `visit` over all blocks of all experts."""
    num_experts = len(group_sizes)
    # About twice the mean number of rows per expert: most experts then need one block, and little
    # is wasted when decoding few tokens.
    wanted = max(1, 2 * num_rows // num_experts)
    size = min(1 << (wanted - 1).bit_length(), max_block_rows, num_rows)
    ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // size)
    last_visits = jnp.cumsum(blocks)
    visits = jnp.arange(num_rows // size + num_experts, dtype=blocks.dtype)
    # Clamp the entries past the last visit, which are never used.
    experts = jnp.minimum(jnp.searchsorted(last_visits, visits, side="right"), num_experts - 1)
    firsts = (ends - group_sizes)[experts] + (visits - (last_visits - blocks)[experts]) * size

    def step(index: Array | int, carry: T) -> T:
        expert, first = experts[index], firsts[index]
        start = jnp.minimum(first, num_rows - size)
        places = start + jnp.arange(size, dtype=start.dtype)
        owned = (places >= first) & (places < ends[expert])
        return visit(_Block(expert, start, owned[:, None]), carry)

    return lax.fori_loop(0, last_visits[-1], step, initial)


def _expert(rows: Any, matrices: Any) -> Array:
    return _swiglu(layers.linear, rows, matrices)


def _blocked(rows: Any, matrices: Any, group_sizes: Array, *, max_block_rows: int) -> Array:
    def visit(block: _Block, out: Array) -> Array:
        return block.write(out, _expert(block.read(rows), block.matrices(matrices)))

    x, _ = rows
    return _visit_blocks(
        visit, jnp.zeros_like(x), group_sizes, num_rows=len(x), max_block_rows=max_block_rows
    )


def _blocked_gradients(
    rows: Any, matrices: Any, group_sizes: Array, out_grad: Array, *, max_block_rows: int
) -> Any:
    def visit(block: _Block, grads: Any) -> Any:
        rows_grad, matrices_grad = grads
        _, pull_back = jax.vjp(_expert, block.read(rows), block.matrices(matrices))
        block_grad, expert_grad = pull_back(block.read_owned(out_grad))
        rows_grad = jax.tree.map(block.write, rows_grad, block_grad)
        return rows_grad, jax.tree.map(block.add, matrices_grad, expert_grad)

    zeros = jax.tree.map(jnp.zeros_like, (rows, matrices))
    return _visit_blocks(
        visit, zeros, group_sizes, num_rows=len(out_grad), max_block_rows=max_block_rows
    )
