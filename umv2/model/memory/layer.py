"""The memory layer.

One layer implements UltraMemV2 (arXiv 2508.18756, section 3) and its predecessors: UltraMem
(arXiv 2411.12364), Memory+ (arXiv 2412.09764), PEER (arXiv 2407.04153) and PKM (arXiv 1907.05242)
differ only in the fields of `MemoryConfig` that configs/families.py sets.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from umv2 import kernels, sharding
from umv2.config import LossConfig, ModelConfig
from umv2.model import layers, random, rematerialization
from umv2.model.memory import exchange, initialization, retrieval
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import Buffer, Initializer
from umv2.model.slots import LayerCost, MemorySlot, MemoryStats, Observe

_FLOAT32_BYTES = _INT32_BYTES = 4


class MemoryLayer(MemorySlot):
    """Retrieves `top_m` rows per token and head, and returns a projection of their weighted sum.

    Memory(y) = W_v (sum_j w_jc act(<W_p y, P[j]>) V[j, slice c]) over the selected rows j, where
    w_jc is the score of core c, or its softmax or ReLU (Eq. 6-15). With an output gate the pooled
    values are multiplied by silu(W_g y) before W_v (Memory+). Parameters that the configuration
    disables (a projection, a norm, the shuffle) are not created.

    `core_u`, `core_v` and `shuffle` are buffers: `core_u` and `core_v` are recomputed from the
    cores after each optimizer step (`refresh`); the shuffle never changes.
    """

    reads_copy = True

    def __init__(self, config: ModelConfig, *, init: Initializer):
        memory = config.memory
        hidden, heads, rank = config.hidden_size, memory.num_heads, memory.tucker_rank
        num_chunks = retrieval.query_chunks(memory.query, num_heads=heads, tucker_rank=rank)
        query_size, pooled_size = num_chunks * memory.key_dim, memory.num_slots * memory.value_dim

        def start(name: str) -> Callable[[], float]:
            """Defers the calibration, which takes seconds, until values are drawn."""
            return lambda: getattr(initialization.memory_initialization(config), name)

        into: Any = {"axes": ("hidden", None), "group": "matrices"}
        self.query = init.normal("query", (hidden, query_size), std=start("query_std"), **into)
        self.keys = init.normal(
            "keys",
            (heads, 2, rank, memory.keys_per_side, memory.key_dim),
            std=start("key_std"),
            axes=(None, None, None, None, "key"),
            group="keys",
        )
        if memory.query_norm != "none":
            self.query_norm = init.constant(memory.key_dim, start("query_norm"))
        if memory.query_norm == "layer":
            self.query_norm_bias = init.constant(memory.key_dim, 0.0)
        if memory.key_norm != "none":
            self.key_norm = init.constant(memory.key_dim, start("key_norm"))
        if memory.scoring == "tucker":
            self.cores = init.uniform(
                "cores",
                (memory.num_cores, heads, rank, rank),
                axes=(None, None, None, None),
                group="keys",
                served="float32",
            )
            self.core_u = Buffer(self._first_vectors(init, 0, heads, rank))
            self.core_v = Buffer(self._first_vectors(init, 1, heads, rank))
        if memory.shuffle:
            addresses = memory.keys_per_side**2
            self.shuffle = Buffer(
                init.value(
                    "shuffle",
                    (addresses,),
                    lambda key: jax.random.permutation(key, jnp.arange(addresses, dtype=jnp.int32)),
                    jnp.int32,
                )
            )
        if memory.has_pre_projection:
            self.pre = init.normal(
                "pre", (hidden, memory.pre_value_dim), std=start("pre_std"), **into
            )
        if memory.output_gate != "none":
            self.output_gate = init.normal(
                "output_gate", (hidden, pooled_size), std=start("gate_std"), **into
            )
        if memory.projection != "none":
            self.output = init.normal(
                "output",
                (pooled_size, hidden),
                std=start("output_std"),
                axes=(None, "hidden"),
                group="matrices",
            )
        if memory.bias:
            self.query_bias = init.constant(query_size, 0.0)
            if memory.output_gate != "none":
                self.output_gate_bias = init.constant(pooled_size, 0.0)
            if memory.projection != "none":
                self.output_bias = init.constant(hidden, 0.0)
        self.config = memory
        self.num_counters = self.cost(config).counters
        self.norm_epsilon = config.norm_epsilon

    def _first_vectors(self, init: Initializer, index: int, heads: int, rank: int) -> Any:
        """Returns u (index 0) or v (index 1) of the initial cores, or their shape if abstract."""

        def compute(_: Key[Array, ""]) -> Float[Array, "h r"]:
            none = jnp.zeros((heads, rank), jnp.float32)
            return retrieval.core_vectors(self.cores[...], none, none)[index]

        return init.value("", (heads, rank), compute)

    @classmethod
    def table_rows(cls, config: ModelConfig) -> int:
        """Returns N = n^2, the number of rows of one table."""
        return config.memory.num_values

    @classmethod
    def create_store(cls, config: ModelConfig, *, init: Initializer) -> ValueStore:
        """Returns the value tables of all memory layers: [L_mem, N, D_v] and [L_mem, N, D_p]."""
        memory = config.memory
        rows = (len(config.placements), cls.table_rows(config))

        def table(name: str, width: int) -> Any:
            def draw(key: Key[Array, ""]) -> Float[Array, "l n d"]:
                std = initialization.memory_initialization(config).values_std
                return std * random.normal(key, (*rows, width))

            return init.value(name, (*rows, width), draw)

        pre_values = table("pre_values", memory.pre_value_dim) if memory.pre_value_dim else None
        return ValueStore(values=table("values", memory.value_dim), pre_values=pre_values)

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns the cost of one layer, including one table (with sharing, too, each owns one)."""
        h, memory = config.hidden_size, config.memory
        heads, rank, keys = memory.num_heads, memory.tucker_rank, memory.keys_per_side
        chunks = retrieval.query_chunks(memory.query, tucker_rank=rank, num_heads=heads)
        query, pooled = memory.key_dim * chunks, memory.num_slots * memory.value_dim
        projected, gated = memory.projection != "none", memory.output_gate != "none"
        norms = {"none": 0, "rms": 1, "layer": 2}
        cores, selection_flops = cls._selection(config)
        row = memory.value_dim + memory.pre_value_dim
        vectors = 2 * heads * rank * _FLOAT32_BYTES if memory.scoring == "tucker" else 0
        shuffle = keys**2 * _INT32_BYTES if memory.shuffle else 0
        return LayerCost(
            projections=h
            * (query + memory.pre_value_dim * memory.pre_projection + (projected + gated) * pooled),
            biases=(query + projected * h + gated * pooled) if memory.bias else 0,
            routing=heads * 2 * rank * keys * memory.key_dim,
            norms=cores + (norms[memory.query_norm] + norms[memory.key_norm]) * memory.key_dim,
            values=cls.table_rows(config) * row,
            selected=memory.num_selected * row,
            selection_flops=selection_flops,
            num_choices=memory.num_visible,
            num_picked=memory.top_m,
            num_draws=heads,
            copies=memory.num_blocks,
            counters=memory.num_visible,
            buffer_bytes=vectors,
            # Every token looks up its addresses in the shuffle, even if they map to few rows.
            address_bytes=memory.num_selected * _INT32_BYTES if memory.shuffle else 0,
            stored_bytes=vectors + shuffle,
        )

    @staticmethod
    def _selection(config: ModelConfig) -> tuple[int, int]:
        """Returns the number of core entries, and the FLOPs per token for selecting rows."""
        memory = config.memory
        heads, rank = memory.num_heads, memory.tucker_rank
        grid = memory.shortlist**2
        if memory.scoring == "sum":
            return 0, heads * (grid + memory.top_m)
        # S u and S v for every key; S_row C for the row candidates; its product with S_col for
        # every pair; and the per-core scores of the selected pairs.
        chosen = memory.num_cores * memory.top_m * (rank**2 + rank)
        candidates = 2 * rank * memory.keys_per_side + memory.shortlist * rank**2
        per_head = candidates + grid * rank + chosen
        return memory.num_cores * heads * rank**2, 2 * heads * per_head

    def refresh(self) -> None:
        """Recomputes u and v from the cores, with the sign that is closest to the previous pair."""
        if self.config.scoring == "tucker":
            u, v = retrieval.core_vectors(self.cores[...], self.core_u[...], self.core_v[...])
            self.core_u[...], self.core_v[...] = u, v

    def serve(self) -> None:
        """Replaces the keys by normalised keys, so that they are not normalised for every token."""
        if self.config.key_norm == "rms":
            keys = layers.rms_norm(self.keys[...], self.key_norm[...], self.norm_epsilon)
            self.keys[...] = keys
            self.config = dataclasses.replace(self.config, key_norm="none")

    def losses(self, stats: MemoryStats, config: LossConfig) -> dict[str, Float[Array, ""]]:
        """Returns the balance loss (Eq. 18-20) and the Tucker penalty (Eq. 17), weighted.

        Both are sums over layers, so that their strength per layer is independent of depth.
        """
        terms = {}
        if config.balance_loss > 0:
            assert stats.balance_loss is not None  # Observe.training requests it
            terms["balance_loss"] = config.balance_loss * jnp.sum(stats.balance_loss)
        if config.tucker_penalty > 0:
            penalties = jax.vmap(
                lambda cores: retrieval.tucker_penalty(cores, config.tucker_margin)
            )(self.cores[...])
            terms["tucker_penalty"] = config.tucker_penalty * jnp.sum(penalties)
        return terms

    def health(self) -> dict[str, Float[Array, " l"]]:
        """Returns lambda_1 and lambda_2, the head means of the summed cores' singular values."""
        if self.config.scoring != "tucker":
            return {}
        core = self.cores[...].sum(axis=1)  # [l, c, h, r, r] over cores
        singular = jnp.linalg.svd(core, compute_uv=False).mean(axis=1)
        return {f"lambda_{i + 1}": singular[:, i] for i in range(min(2, singular.shape[-1]))}

    def __call__(
        self, x: Float[Array, "b t d"], *, window: StoreWindow | None, observe: Observe
    ) -> tuple[Float[Array, "b t d"], MemoryStats]:
        """Returns the layer's output and the requested statistics.

        Args:
          x: normalised input, the same as the FFN's.
          window: this layer's window of the value tables, which may include tables of other layers.
          observe: the statistics to compute.
        """
        assert window is not None  # create_store always returns a store
        memory = self.config
        x = sharding.shard_sequence(x)
        query = layers.linear(x, self.query[...], self._optional("query_bias"))
        pre_inputs = None
        if memory.pre_value_dim:
            pre_inputs = layers.linear(x, self.pre[...]) if memory.has_pre_projection else x
        window = dataclasses.replace(
            window,
            start=jnp.asarray(window.start, jnp.int32),
            first_master=jnp.asarray(window.first_master, jnp.int32),
        )
        pooled, sums = sharding.shard_map_tokens(
            functools.partial(
                self._look_up,
                layout=sharding.table_layout(window.store.values),
                num_rows=window.store.num_rows,
                observe=observe,
            ),
            (query, pre_inputs),
            (self._retrieval_arrays(), window),
        )
        pooled = rematerialization.keep(pooled.astype(x.dtype))
        y = sharding.gather_sequence(self.project(x, pooled))
        selections = x.shape[0] * x.shape[1] * memory.num_heads
        stats = MemoryStats(
            balance_loss=retrieval.balance_loss(*sums["balance"]) if "balance" in sums else None,
            output_variance=jnp.var(y.astype(jnp.float32)) if observe.health else None,
            top_score=sums["top_score"] / selections if observe.health else None,
            last_score=sums["last_score"] / selections if observe.health else None,
            hits=sums.get("hits"),
        )
        return y, stats

    def project(
        self, x: Float[Array, "b t d"], pooled: Float[Array, "b t e"]
    ) -> Float[Array, "b t d"]:
        """Projects the pooled values to the layer's output."""
        if self.config.output_gate == "silu":
            gate = layers.linear(x, self.output_gate[...], self._optional("output_gate_bias"))
            pooled = pooled * jax.nn.silu(gate)
        if self.config.projection == "none":
            return pooled
        return layers.linear(pooled, self.output[...], self._optional("output_bias"))

    def locate(
        self, virtual: Int[Array, "t hk"], start: Int[Array, ""], num_rows: int
    ) -> tuple[Int[Array, "t hk"], Int[Array, "t hk"], Int[Array, "t hk"]]:
        """Maps virtual addresses to (block, row within the window, row of the store).

        Args:
          virtual: virtual addresses; the selections of each head are contiguous.
          start: first row of the layer's window.
          num_rows: number of rows in the store.

        Returns:
          The virtual block, the row as hits count it, and the row as the store numbers it.
        """
        return retrieval.table_rows(
            virtual, start, num_visible=self.config.num_visible, num_rows=num_rows
        )

    def _optional(self, name: str) -> Array | None:
        """Returns a variable's array, or None if this configuration does not have it."""
        return getattr(self, name)[...] if hasattr(self, name) else None

    def _retrieval_arrays(self) -> dict[str, Any]:
        names = ("key_norm", "query_norm", "query_norm_bias", "cores", "core_u", "core_v")
        arrays = {name: self._optional(name) for name in (*names, "shuffle")}
        return arrays | {"keys": sharding.gathered(self.keys[...])}

    def _look_up(
        self,
        batched: tuple,
        shared: tuple,
        *,
        layout: exchange.Layout,
        num_rows: int,
        observe: Observe,
    ) -> tuple[Float[Array, "b t e"], dict]:
        """Retrieves and pools the rows for one device's tokens."""
        memory, (query, pre_inputs), (weights, window) = self.config, batched, shared
        batch, length = query.shape[:2]
        num_tokens = batch * length
        query = query.reshape(num_tokens, -1, memory.key_dim)
        if query.dtype == jnp.bfloat16:
            # Otherwise XLA converts first, and lays out twice the bytes anew.
            query = jax.lax.optimization_barrier(query)
        query = retrieval.arrange_query(
            self._normalised_query(query, weights),
            memory.query,
            num_heads=memory.num_heads,
            tucker_rank=memory.tucker_rank,
        )
        keys = weights["keys"]
        if memory.key_norm == "rms":
            keys = layers.rms_norm(keys, weights["key_norm"], self.norm_epsilon)
        keys = keys.astype(query.dtype)
        u, v, cores = (weights[name] for name in ("core_u", "core_v", "cores"))
        with jax.named_scope("product_keys"):
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
        block, visible, rows = self.locate(virtual, window.start, num_rows)
        value_weights = retrieval.value_weights(
            scores, memory.score_activation, num_heads=memory.num_heads
        )
        tables, masters = jax.tree.map(
            lambda table: table.reshape(-1, *table.shape[-2:]), (window.store, window.masters)
        )
        if masters is not None:
            first = window.first_master.reshape(1)
            trained = (masters.values, masters.pre_values)
            masters = exchange.Masters(trained, first, window.packed)
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
            masters=masters,
        )
        sums: dict[str, Any] = {}
        if observe.key_balance:
            key_scores = retrieval.product_key_scores(query, keys)
            shortlisting = retrieval.shortlist_scores(key_scores, u, v)
            sums["balance"] = retrieval.balance_statistics(shortlisting, memory.shortlist)
        if observe.health:
            totals = jax.lax.stop_gradient(value_weights).sum(axis=-1)
            totals = totals.reshape(num_tokens, memory.num_heads, memory.top_m)
            sums["top_score"] = totals[..., 0].sum()
            sums["last_score"] = totals[..., -1].sum()
            sums["hits"] = jnp.zeros(self.num_counters, jnp.int32).at[visible].add(1)
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
