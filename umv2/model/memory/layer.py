"""The memory layer.

UltraMemV2 (arXiv 2508.18756, section 3) and its predecessors are one layer: UltraMem
(arXiv 2411.12364), Memory+ (arXiv 2412.09764), PEER (arXiv 2407.04153) and PKM (arXiv 1907.05242)
differ from it in the fields of `MemoryConfig` that configs/families.py sets.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from umv2 import kernels, sharding
from umv2.config import ModelConfig
from umv2.model import initialization, layers
from umv2.model.memory import exchange, retrieval
from umv2.model.memory.store import StoreWindow
from umv2.types import LayerStats


class MemoryLayer(nnx.Module):
    """Retrieves `top_m` rows per token and head, and sums them into the residual stream.

    Memory(y) = W_v (sum_j w_jc act(<W_p y, P[j]>) V[j, slice c]) over the selected rows j, with
    w_jc the score of core c, or its softmax or ReLU (Eq. 6-15); with an output gate the pooled
    values are multiplied by silu(W_g y) before W_v (Memory+). What the configuration does without
    (a projection, a norm, the shuffle) does not exist.

    `core_u`, `core_v` and `shuffle` are buffers: `u` and `v` follow the cores once an optimizer
    step (`refresh`), the shuffle never changes.
    """

    def __init__(self, config: ModelConfig, *, key: Key[Array, ""]):
        memory = config.memory
        start = initialization.memory_initialization(config)
        hidden, heads, rank = config.hidden_size, memory.num_heads, memory.tucker_rank
        num_chunks = retrieval.query_chunks(memory.query, num_heads=heads, tucker_rank=rank)
        pooled_size = memory.num_slots * memory.value_dim

        def parameter(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return nnx.Param(layers.normal(key, name, shape, std))

        def constant(size: int, value: float) -> nnx.Param:
            return nnx.Param(jnp.full((size,), value, jnp.float32))

        self.query = parameter("query", (hidden, num_chunks * memory.key_dim), start.query_std)
        sides = (heads, 2, rank, memory.keys_per_side, memory.key_dim)
        self.keys = parameter("keys", sides, start.key_std)
        if memory.query_norm != "none":
            self.query_norm = constant(memory.key_dim, start.query_norm)
        if memory.query_norm == "layer":
            self.query_norm_bias = constant(memory.key_dim, 0.0)
        if memory.key_norm != "none":
            self.key_norm = constant(memory.key_dim, start.key_norm)
        if memory.scoring == "tucker":
            shape = (memory.num_cores, heads, rank, rank)
            cores = jax.random.uniform(layers.named_key(key, "cores"), shape, jnp.float32)
            self.cores = nnx.Param(cores)
            none = jnp.zeros((heads, rank), jnp.float32)
            u, v = retrieval.core_vectors(cores, none, none)
            self.core_u, self.core_v = layers.Buffer(u), layers.Buffer(v)
        if memory.shuffle:
            addresses = jnp.arange(memory.keys_per_side**2, dtype=jnp.int32)
            shuffled = jax.random.permutation(layers.named_key(key, "shuffle"), addresses)
            self.shuffle = layers.Buffer(shuffled)
        if memory.has_pre_projection:
            self.pre = parameter("pre", (hidden, memory.pre_value_dim), start.pre_std)
        if memory.output_gate != "none":
            self.output_gate = parameter("output_gate", (hidden, pooled_size), start.gate_std)
        if memory.projection != "none":
            self.output = parameter("output", (pooled_size, hidden), start.output_std)
        if memory.bias:
            self.query_bias = constant(num_chunks * memory.key_dim, 0.0)
            if memory.output_gate != "none":
                self.output_gate_bias = constant(pooled_size, 0.0)
            if memory.projection != "none":
                self.output_bias = constant(hidden, 0.0)
        self.config = memory
        self.norm_epsilon = config.norm_epsilon

    def refresh(self) -> None:
        """Recomputes u and v from the cores, with the sign that stays closest to the old pair."""
        if self.config.scoring == "tucker":
            u, v = retrieval.core_vectors(self.cores[...], self.core_u[...], self.core_v[...])
            self.core_u[...], self.core_v[...] = u, v

    def normalise_keys(self) -> None:
        """Puts normalised keys in place of the trained ones, once for all tokens (inference)."""
        if self.config.key_norm == "rms":
            keys = layers.rms_norm(self.keys[...], self.key_norm[...], self.norm_epsilon)
            self.keys[...] = keys
            self.config = dataclasses.replace(self.config, key_norm="none")

    def __call__(
        self, x: Float[Array, "b t d"], *, store: StoreWindow
    ) -> tuple[Float[Array, "b t d"], LayerStats]:
        """Returns the memory's output for normalised inputs, and what was observed on the way.

        Args:
          x: normalised input, the same that the FFN reads.
          store: this layer's window of the value tables; rows of other layers may be in it.
        """
        memory = self.config
        x = sharding.shard_sequence(x)
        query = layers.linear(x, self.query[...], self._optional("query_bias"))
        pre_inputs = None
        if memory.pre_value_dim:
            pre_inputs = layers.linear(x, self.pre[...]) if memory.has_pre_projection else x
        start = jnp.asarray(store.start, jnp.int32)
        pooled, sums = sharding.shard_map_tokens(
            functools.partial(
                self._look_up,
                layout=sharding.table_layout(store.store.values),
                num_rows=store.store.num_rows,
            ),
            (query, pre_inputs),
            (self._retrieval_arrays(), store.store, start),
        )
        y = pooled.astype(x.dtype)
        if memory.output_gate == "silu":
            gate = layers.linear(x, self.output_gate[...], self._optional("output_gate_bias"))
            y = y * jax.nn.silu(gate)
        if memory.projection != "none":
            y = layers.linear(y, self.output[...], self._optional("output_bias"))
        y = sharding.gather_sequence(y)
        selections = x.shape[0] * x.shape[1] * memory.num_heads
        stats = LayerStats(
            balance_loss=retrieval.balance_loss(*sums["balance"]),
            router_z_loss=jnp.zeros((), jnp.float32),
            router_probability=jnp.zeros((0,), jnp.float32),
            output_variance=jnp.var(y.astype(jnp.float32)),
            top_score=sums["top_score"] / selections,
            last_score=sums["last_score"] / selections,
            hits=sums["hits"],
        )
        return y, stats

    def _optional(self, name: str) -> Array | None:
        """Returns a variable's array, or None where the configuration does without it."""
        return getattr(self, name)[...] if hasattr(self, name) else None

    def _retrieval_arrays(self) -> dict[str, Any]:
        names = ("key_norm", "query_norm", "query_norm_bias", "cores", "core_u", "core_v")
        arrays = {name: self._optional(name) for name in (*names, "shuffle")}
        return arrays | {"keys": sharding.gathered(self.keys[...])}

    def _look_up(
        self, batched: tuple, shared: tuple, *, layout: exchange.Layout, num_rows: int
    ) -> tuple[Float[Array, "b t e"], dict]:
        """Retrieves and pools the rows for one device's tokens."""
        memory, (query, pre_inputs), (weights, store, start) = self.config, batched, shared
        batch, length = query.shape[:2]
        num_tokens = batch * length
        query = retrieval.arrange_query(
            self._normalised_query(query.reshape(num_tokens, -1, memory.key_dim), weights),
            memory.query,
            num_heads=memory.num_heads,
            tucker_rank=memory.tucker_rank,
        )
        keys = weights["keys"]
        if memory.key_norm == "rms":
            keys = layers.rms_norm(keys, weights["key_norm"], self.norm_epsilon)
        keys = keys.astype(query.dtype)
        u, v, cores = (weights[name] for name in ("core_u", "core_v", "cores"))
        scores, grid = kernels.product_key_top_k(
            query,
            keys,
            u,
            v,
            cores,
            top_m=memory.top_m,
            shortlist=memory.shortlist,
            implementation=memory.product_key_top_k,
        )
        virtual = retrieval.virtual_addresses(grid, weights["shuffle"])
        block, visible, rows = retrieval.table_rows(
            virtual, start, num_visible=memory.num_visible, num_rows=num_rows
        )
        value_weights = retrieval.value_weights(
            scores, memory.score_activation, num_heads=memory.num_heads
        )
        tables = jax.tree.map(lambda table: table.reshape(-1, *table.shape[-2:]), store)
        pooled = exchange.aggregate(
            layout,
            tables.values,
            rows,
            value_weights,
            pre_values=tables.pre_values,
            pre_inputs=None if pre_inputs is None else pre_inputs.reshape(num_tokens, -1),
            activation=None if memory.activation == "none" else memory.activation,
            slots=block if memory.num_slots > 1 else None,
            num_slots=memory.num_slots,
            chunk_size=memory.chunk_tokens or None,
            implementation=memory.value_aggregation,
            dtype=query.dtype,
        )
        key_scores = retrieval.product_key_scores(query, keys)
        shortlisting = retrieval.shortlist_scores(key_scores, u, v)
        totals = jax.lax.stop_gradient(value_weights).sum(axis=-1)
        totals = totals.reshape(num_tokens, memory.num_heads, memory.top_m)
        sums = {
            "balance": retrieval.balance_statistics(shortlisting, memory.shortlist),
            "top_score": totals[..., 0].sum(),
            "last_score": totals[..., -1].sum(),
            "hits": jnp.zeros(memory.num_visible, jnp.int32).at[visible].add(1),
        }
        return pooled.reshape(batch, length, -1), sums

    def _normalised_query(
        self, chunks: Float[Array, "t q_chunks q"], weights: dict[str, Any]
    ) -> Float[Array, "t q_chunks q"]:
        norm, bias = weights["query_norm"], weights["query_norm_bias"]
        match self.config.query_norm:
            case "rms":
                return layers.rms_norm(chunks, norm, self.norm_epsilon)
            case "layer":
                return layers.layer_norm(chunks, norm, bias, self.norm_epsilon)
            case _:
                return chunks
