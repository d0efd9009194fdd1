"""The value store and the memory layer that reads it (UltraMemV2, arXiv 2508.18756, section 3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from umv2 import parallel
from umv2.config import ModelConfig
from umv2.model import initialization, layers, retrieval
from umv2.types import LayerStats, struct


@struct
class ValueStore:
    """All value tables of a model, one after another; the only owner of these arrays.

    A row is a Pre-value, which gates a selected value by its product with the projected input, and
    a Value, which is added up (Eq. 13-15). `pre_values` is None where pre_value_dim is 0.
    """

    values: Float[Array, "*l rows v"]
    pre_values: Float[Array, "*l rows p"] | None

    @property
    def num_rows(self) -> int:
        """Rows that an index may name."""
        return self.values.shape[-2]


def create_store(config: ModelConfig, *, key: Key[Array, ""]) -> ValueStore:
    """Draws the value tables of all memory layers: [L_mem * N, D_v] and [L_mem * N, D_p]."""
    memory = config.memory
    std = initialization.memory_initialization(config).values_std
    rows = len(config.placements) * memory.num_values
    pre_values = None
    if memory.pre_value_dim:
        pre_values = layers.normal(key, "pre_values", (rows, memory.pre_value_dim), std)
    values = layers.normal(key, "values", (rows, memory.value_dim), std)
    return ValueStore(values=values, pre_values=pre_values)


class MemoryLayer(nnx.Module):
    """Retrieves `top_m` rows per token and head, and sums them into the residual stream.

    Memory(y) = W_v sum_j G_c[j] act(<W_p y, P[j]>) V[j, slice c] over the selected rows j, with
    G_c the score of core c (Eq. 6-15). `core_u`, `core_v` and `shuffle` are buffers: `u` and `v`
    follow the cores once an optimizer step (`refresh_core_vectors`), the shuffle never changes.
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        memory = config.memory
        start = initialization.memory_initialization(config)
        hidden, heads, rank = config.hidden_size, memory.num_heads, memory.tucker_rank
        num_chunks = retrieval.query_chunks(memory.query, rank)
        sides = (heads, 2, rank, memory.keys_per_side, memory.key_dim)

        def parameter(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return nnx.Param(layers.normal(key, name, shape, std))

        self.query = parameter("query", (hidden, num_chunks * memory.key_dim), start.query_std)
        self.keys = parameter("keys", sides, start.key_std)
        self.query_norm = nnx.Param(jnp.full((memory.key_dim,), start.norm_weight, jnp.float32))
        self.key_norm = nnx.Param(jnp.full((memory.key_dim,), start.norm_weight, jnp.float32))
        if memory.scoring == "tucker":
            shape = (memory.num_cores, heads, rank, rank)
            cores = jax.random.uniform(layers.named_key(key, "cores"), shape, jnp.float32)
            self.cores = nnx.Param(cores)
            none = jnp.zeros((heads, rank), jnp.float32)
            u, v = retrieval.core_vectors(cores, none, none)
        else:
            u = v = jnp.ones((heads, rank), jnp.float32)
        self.core_u, self.core_v = layers.Buffer(u), layers.Buffer(v)
        self.shuffle = layers.Buffer(
            jax.random.permutation(
                layers.named_key(key, "shuffle"), jnp.arange(sides[3] ** 2, dtype=jnp.int32)
            )
        )
        if memory.pre_value_dim:
            self.pre = parameter("pre", (hidden, memory.pre_value_dim), start.pre_std)
        pooled = memory.num_slots * memory.value_dim
        self.output = parameter("output", (pooled, hidden), start.output_std)
        self.config = memory
        self.norm_epsilon = config.norm_epsilon

    def refresh_core_vectors(self) -> None:
        """Recomputes u and v from the cores, with the sign that stays closest to the old pair."""
        if self.config.scoring == "tucker":
            u, v = retrieval.core_vectors(self.cores[...], self.core_u[...], self.core_v[...])
            self.core_u[...], self.core_v[...] = u, v

    def __call__(
        self, x: Float[Array, "b t d"], *, store: ValueStore, start: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "b t d"], LayerStats]:
        """Returns the memory's output for normalised inputs, and what was observed on the way.

        Args:
          x: normalised input, the same that the FFN reads.
          store: the tables; rows of other layers may be among them.
          start: first row of this layer's window, which wraps round the end of the store.
        """
        shared = (
            self._retrieval_arrays(),
            store,
            jnp.asarray(start, jnp.int32),
        )
        query = layers.linear(x, self.query[...])
        pre_inputs = layers.linear(x, self.pre[...]) if self.config.pre_value_dim else None
        pooled, sums = parallel.map_over_batch(self._look_up, (query, pre_inputs), shared)
        y = layers.linear(pooled.astype(x.dtype), self.output[...])
        selections = x.shape[0] * x.shape[1] * self.config.num_heads
        balance = retrieval.balance_loss(*sums["balance"])
        stats = LayerStats(
            balance_loss=balance,
            output_variance=jnp.var(y.astype(jnp.float32)),
            top_score=sums["top_score"] / selections,
            last_score=sums["last_score"] / selections,
            row_hits=sums["row_hits"],
        )
        return y, stats

    def _retrieval_arrays(self) -> dict[str, Array]:
        names = ["keys", "key_norm", "query_norm", "core_u", "core_v", "shuffle"]
        if self.config.scoring == "tucker":
            names.append("cores")
        return {name: getattr(self, name)[...] for name in names}

    def _look_up(self, batched: tuple, shared: tuple) -> tuple[Float[Array, "b t e"], dict]:
        """Retrieves and pools the rows for one device's tokens."""
        memory, (query, pre_inputs), (weights, store, start) = self.config, batched, shared
        batch, length = query.shape[:2]
        chunks = query.reshape(batch * length, -1, memory.key_dim)
        chunks = layers.rms_norm(chunks, weights["query_norm"], self.norm_epsilon)
        keys = layers.rms_norm(weights["keys"], weights["key_norm"], self.norm_epsilon)
        arranged = retrieval.arrange_query(
            chunks, memory.query, num_heads=memory.num_heads, tucker_rank=memory.tucker_rank
        )
        scores = retrieval.product_key_scores(arranged, keys.astype(arranged.dtype))
        shortlisting = retrieval.shortlist_scores(scores, weights["core_u"], weights["core_v"])
        selection = retrieval.select(
            scores,
            shortlisting,
            weights.get("cores"),
            top_m=memory.top_m,
            shortlist=memory.shortlist,
        )
        virtual = retrieval.virtual_addresses(selection, weights["shuffle"], memory.keys_per_side)
        block, visible, rows = retrieval.table_rows(
            virtual, start, num_visible=memory.num_visible, num_rows=store.num_rows
        )
        pooled = parallel.value_aggregation(
            store.values,
            rows,
            retrieval.per_core_scores(selection),
            pre_values=store.pre_values,
            pre_inputs=None if pre_inputs is None else pre_inputs.reshape(batch * length, -1),
            activation=None if memory.activation == "none" else memory.activation,
            slots=block if memory.num_slots > 1 else None,
            num_slots=memory.num_slots,
            chunk_size=memory.chunk_tokens or None,
        )
        totals = jax.lax.stop_gradient(selection.scores).sum(axis=-1)
        sums = {
            "balance": retrieval.balance_statistics(shortlisting, memory.shortlist),
            "top_score": totals[..., 0].sum(),
            "last_score": totals[..., -1].sum(),
            "row_hits": jnp.zeros(memory.num_visible, jnp.int32).at[visible].add(1),
        }
        return pooled.reshape(batch, length, -1), sums
