"""The memory layer: which rows it reads, its output, and its initial variance."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from tests.model.drawn import drawn
from umv2.config import ConfigError, ModelConfig, from_config_dict
from umv2.model import layers
from umv2.model.memory import initialization, retrieval
from umv2.model.memory.layer import MemoryLayer
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import ABSTRACT, Initializer
from umv2.model.slots import Observe

_SMALL = {
    "num_keys": 6,
    "key_dim": 8,
    "value_dim": 12,
    "pre_value_dim": 4,
    "top_m": 4,
    "shortlist": 4,
}


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def _config(*, hidden_size: int = 16, num_layers: int = 2, **sizes: Any) -> ModelConfig:
    config = base.get_config()
    config.model.hidden_size, config.model.num_layers = hidden_size, num_layers
    config.model.compute_dtype = "float32"
    config.model.memory.update(_SMALL | sizes)
    return from_config_dict(config).model


def _layer(config: ModelConfig, seed: int = 0) -> MemoryLayer:
    return drawn(MemoryLayer(config, init=ABSTRACT), seed)


def _store(config: ModelConfig) -> ValueStore:
    rows, sizes = len(config.placements) * config.memory.num_values, config.memory
    generator = np.random.default_rng(1)
    return ValueStore(
        values=jnp.asarray(generator.normal(size=(rows, sizes.value_dim)), jnp.float32),
        pre_values=jnp.asarray(generator.normal(size=(rows, sizes.pre_value_dim)), jnp.float32),
    )


def _inputs(config: ModelConfig, num_tokens: int = 10, seed: int = 2) -> jax.Array:
    shape = (2, num_tokens, config.hidden_size)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def _apply(
    layer: MemoryLayer, x: jax.Array, store: ValueStore, start: int = 0
) -> tuple[jax.Array, Any]:
    window = StoreWindow(store=store, start=start)
    return layer(x, window=window, observe=Observe(health=True, key_balance=True))


def _assert_close(left: jax.Array, right: np.ndarray | jax.Array) -> None:
    largest = float(np.abs(right).max())
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * largest)


def _rows_read(config: ModelConfig, start: int = 0) -> set[int]:
    """Returns the rows of the store that affect the output of the layer."""
    layer, store = _layer(config), _store(config)
    x = _inputs(config, num_tokens=200)
    gradient = jax.grad(
        lambda values: jnp.sum(
            _apply(layer, x, dataclasses.replace(store, values=values), start)[0] ** 2
        )
    )(store.values)
    return set(np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=1)).tolist())


def test_rows_may_be_permuted_with_the_shuffle() -> None:
    config = _config()
    layer, store, x = _layer(config), _store(config), _inputs(config)
    rows = config.memory.num_visible
    table = jax.tree.map(lambda leaf: leaf[:rows], store)
    before, _ = _apply(layer, x, table)

    new_place = jax.random.permutation(jax.random.key(5), rows)
    moved = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[new_place].set(leaf), table)
    assert float(jnp.abs(_apply(layer, x, moved)[0] - before).max()) > 1e-3
    layer.shuffle[...] = new_place[layer.shuffle[...]]
    _assert_close(_apply(layer, x, moved)[0], before)


def test_rows_may_be_permuted_within_every_virtual_block() -> None:
    config = _config(key_expansion=2, projection="per_block")
    layer, store, x = _layer(config), _store(config), _inputs(config)
    rows = config.memory.num_visible
    table = jax.tree.map(lambda leaf: leaf[:rows], store)
    before, _ = _apply(layer, x, table)
    new_place = jax.random.permutation(jax.random.key(5), rows)
    moved = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[new_place].set(leaf), table)
    block, row = jnp.divmod(layer.shuffle[...], rows)
    layer.shuffle[...] = block * rows + new_place[row]
    _assert_close(_apply(layer, x, moved)[0], before)


def test_per_block_projection_with_equal_blocks_is_the_single_projection() -> None:
    single = _config(key_expansion=2, projection="single")
    per_block = _config(key_expansion=2, projection="per_block")
    shared, separate = _layer(single), _layer(per_block)
    assert separate.output.shape[0] == 4 * shared.output.shape[0]
    separate.output[...] = jnp.tile(shared.output[...], (4, 1))
    store, x = _store(single), _inputs(single)
    _assert_close(_apply(separate, x, store)[0], _apply(shared, x, store)[0])
    separate.output[...] = separate.output[...].at[: single.memory.value_dim].set(0.0)
    assert not np.allclose(_apply(separate, x, store)[0], _apply(shared, x, store)[0])


_ADDITIVE: dict[str, Any] = {"scoring": "sum", "tucker_rank": 1, "num_cores": 1}
_PRODUCT_KEYS: dict[str, Any] = _ADDITIVE | {
    "score_activation": "softmax",
    "query": "per_head",
    "query_norm": "none",
    "key_norm": "none",
    "shuffle": False,
}
_PKM = _PRODUCT_KEYS | {
    "query_norm": "layer",
    "value_dim": 16,
    "pre_value_dim": 0,
    "projection": "none",
}
_PEER: dict[str, Any] = _PRODUCT_KEYS | {
    "value_dim": 16,
    "pre_value_dim": 16,
    "pre_projection": False,
    "activation": "gelu",
    "projection": "none",
}
_MEMORY_PLUS = _PRODUCT_KEYS | {"output_gate": "silu", "bias": True, "pre_value_dim": 0}
_KINDS: dict[str, dict[str, Any]] = {
    "tucker": {},
    "tucker of rank 3": {"tucker_rank": 3, "num_cores": 1, "activation": "gelu"},
    "tucker, query per head, gate": {"query": "per_head", "output_gate": "silu"},
    "additive, silu": _ADDITIVE | {"activation": "silu"},
    "additive, relu": _ADDITIVE | {"activation": "relu", "query": "shared"},
    "PKM": _PKM,
    "PEER": _PEER,
    "PEER without competition": _PEER | {"score_activation": "relu"},
    "Memory+": _MEMORY_PLUS,
    "Memory+ with query norm": _MEMORY_PLUS | {"query_norm": "rms", "bias": False},
}


def _tucker_grid(
    row: np.ndarray, column: np.ndarray, u: np.ndarray, v: np.ndarray, cores: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    shortlists = [np.argsort(-(w @ s))[:4] for w, s in ((u, row), (v, column))]
    return shortlists, np.einsum(
        "ri,crq,qj->ijc", row[:, shortlists[0]], cores, column[:, shortlists[1]]
    )


def _normalised(
    z: np.ndarray, kind: str, weight: np.ndarray | None, bias: np.ndarray | None, epsilon: float
) -> np.ndarray:
    if weight is None:
        return z
    z = z - z.mean(-1, keepdims=True) if kind == "layer" else z
    z = z / np.sqrt(np.square(z).mean(-1, keepdims=True) + epsilon)
    return z * np.broadcast_to(weight, z.shape) + (0 if bias is None else bias.reshape(1, 1, -1))


def _literal(
    config: ModelConfig,
    layer: MemoryLayer,
    x: jax.Array,
    store: ValueStore,
    start: int,
) -> np.ndarray:
    """Computes the layer's output from the equations, token by token and value by value."""
    sizes, rank = config.memory, config.memory.tucker_rank
    flat = np.asarray(x.reshape(-1, x.shape[-1]))
    weights = {name: np.asarray(value[...]) for name, value in nnx.state(layer).items()}
    pooled = np.zeros((len(flat), sizes.value_dim), np.float32)

    def normalised(z: np.ndarray, name: str, kind: str) -> np.ndarray:
        given = weights.get(name), weights.get(f"{name}_bias")
        return _normalised(z, kind, *given, config.norm_epsilon)

    def projected(name: str) -> np.ndarray:
        bias = weights.get(f"{name}_bias", np.zeros(weights[name].shape[1], np.float32))
        return flat @ weights[name] + bias[None]

    chunks = projected("query").reshape(len(flat), -1, sizes.key_dim)
    chunks = normalised(chunks, "query_norm", sizes.query_norm)
    keys = normalised(weights["keys"], "key_norm", sizes.key_norm)
    activations = {"none": lambda z: z, "gelu": lambda z: jax.nn.gelu(z, approximate=False)}
    act = activations.get(sizes.activation) or getattr(jax.nn, sizes.activation)
    for token, head in np.ndindex(len(flat), sizes.num_heads):
        match sizes.query:
            case "per_rank":
                query = chunks[token].reshape(2, rank, -1)
            case "shared":
                query = np.repeat(chunks[token][:, None], rank, axis=1)
            case _:
                query = np.repeat(chunks[token].reshape(-1, 2, 1, sizes.key_dim)[head], rank, 1)
        row, column = np.einsum("srq,srnq->srn", query, keys[head])
        if sizes.scoring == "tucker":
            u, v = weights["core_u"][head], weights["core_v"][head]
            shortlists, grid = _tucker_grid(row, column, u, v, weights["cores"][:, head])
        else:
            shortlists = [np.argsort(-s[0])[:4] for s in (row, column)]
            grid = (row[0, shortlists[0]][:, None] + column[0, shortlists[1]][None, :])[..., None]
        best = np.argsort(-grid.sum(-1).reshape(-1))[:4]
        scores = grid.reshape(16, -1)[best]
        if sizes.score_activation == "softmax":
            scores = np.exp(scores) / np.exp(scores).sum(axis=0, keepdims=True)
        elif sizes.score_activation == "relu":
            scores = np.maximum(scores, 0)
        for flat_index, score in zip(best, scores, strict=True):
            i, j = divmod(int(flat_index), 4)
            address = int(shortlists[0][i]) * sizes.keys_per_side + int(shortlists[1][j])
            address = int(weights["shuffle"][address]) if sizes.shuffle else address
            table_row = (address + start) % store.num_rows
            gate = 1.0
            if sizes.pre_value_dim:
                assert store.pre_values is not None
                pre_input = projected("pre")[token] if sizes.pre_projection else flat[token]
                gate = float(act(np.dot(pre_input, store.pre_values[table_row])))
            weight = np.repeat(score, sizes.value_dim // sizes.num_cores)
            pooled[token] += weight * gate * np.asarray(store.values[table_row])
    if sizes.output_gate == "silu":
        pooled *= np.asarray(jax.nn.silu(projected("output_gate")))
    if sizes.projection == "none":
        return pooled.reshape(x.shape)
    bias = weights.get("output_bias", np.zeros(x.shape[-1], np.float32))
    return (pooled @ weights["output"] + bias[None]).reshape(x.shape)


@pytest.mark.parametrize("kind", _KINDS)
def test_output_is_the_weighted_sum_of_selected_rows(kind: str) -> None:
    config = _config(num_heads=2, **_KINDS[kind])
    layer, store, x = _layer(config), _store(config), _inputs(config, num_tokens=3)
    if not config.memory.pre_value_dim:
        store = dataclasses.replace(store, pre_values=None)
    y, _ = _apply(layer, x, store, 7)
    _assert_close(y, _literal(config, layer, x, store, 7))


def test_peer_is_a_loop_over_experts_of_one_neuron() -> None:
    """D_p = D_v = h and no projections: expert e is gelu(<x, P_e>) V_e."""
    config = _config(num_heads=2, **_PEER)
    layer, store, x = _layer(config), _store(config), _inputs(config, num_tokens=3)
    assert {"pre", "output"}.isdisjoint(nnx.state(layer))
    assert store.pre_values is not None
    y, _ = _apply(layer, x, store)

    sizes, tokens = config.memory, np.asarray(x.reshape(-1, 16))
    queries = (tokens @ layer.query[...]).reshape(len(tokens), 2, 2, sizes.key_dim)
    row, column = np.einsum("thsq,hsrnq->shtn", queries, layer.keys[...])
    expected = np.zeros_like(tokens)
    for head, token in np.ndindex(2, len(tokens)):
        scores = (row[head, token][:, None] + column[head, token][None, :]).reshape(-1)
        chosen = set(np.argsort(-scores)[: sizes.top_m].tolist())
        total = sum(np.exp(scores[expert]) for expert in chosen)
        for expert in range(sizes.num_visible):  # all of them
            neuron = jax.nn.gelu(np.dot(tokens[token], store.pre_values[expert]), approximate=False)
            share = np.exp(scores[expert]) / total if expert in chosen else 0.0
            expected[token] += share * float(neuron) * np.asarray(store.values[expert])
    _assert_close(y, expected.reshape(x.shape))


def test_only_softmax_weights_sum_to_one() -> None:
    """The softmax weights of a head sum to 1 for any scores."""
    x = _inputs(_config(), num_tokens=3)
    tops = {}
    for name in ("softmax", "relu"):
        config = _config(num_heads=2, **_PEER | {"score_activation": name, "top_m": 1})
        _, stats = _apply(_layer(config), x, _store(config))
        tops[name] = float(stats.top_score)
    assert tops["softmax"] == pytest.approx(1.0, abs=1e-6)
    assert tops["relu"] != pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(
    ("sharing", "group", "tables"),
    [
        ("none", 1, [[0], [1], [2], [3]]),
        ("ring", 4, [[3, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1]]),
        ("no_ring", 2, [[0, 1], [1, 2], [2, 3], [2, 3]]),
        _slow("block", 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
    ],
)
def test_layers_read_the_tables_of_their_window(
    sharing: str, group: int, tables: list[list[int]]
) -> None:
    config = _config(num_layers=4, num_keys=4, sharing=sharing, share_group=group)
    sizes = config.memory
    starts = retrieval.window_starts(4, sizes.sharing, group) * sizes.num_values
    for start, window in zip(starts.tolist(), tables, strict=True):
        rows = _rows_read(config, start)
        assert rows <= {(start + row) % 64 for row in range(sizes.num_visible)}
        if group in (1, 4):  # n sqrt(g) is an integer: every table of the window is read
            assert {row // sizes.num_values for row in rows} == set(window)
            assert len(rows) > 0.9 * sizes.num_visible
        else:
            assert {row // sizes.num_values for row in rows} <= set(window)


def test_statistics_count_what_was_selected() -> None:
    config = _config(num_heads=2, key_expansion=2)
    _, stats = _apply(_layer(config), _inputs(config), _store(config))
    assert stats.hits.shape == (config.memory.num_visible,)
    assert int(stats.hits.sum()) == 2 * 10 * config.memory.num_selected
    assert float(stats.top_score) > float(stats.last_score)


def test_output_variance_matches_the_output() -> None:
    config = _config()
    y, stats = _apply(_layer(config), _inputs(config), _store(config))
    np.testing.assert_allclose(stats.output_variance, np.var(y), rtol=1e-5)


@pytest.mark.parametrize("operator", ["product_key_top_k", "value_aggregation"])
def test_an_implementation_for_other_hardware_is_an_error_that_names_the_field(
    operator: str,
) -> None:
    named: dict[str, Any] = {operator: "pallas_tpu"}
    config = _config(**named)
    message = rf"model\.memory\.{operator}='pallas_tpu': {operator}, .*: it compiles for TPU, not"
    with pytest.raises(ConfigError, match=message):
        _apply(_layer(config), _inputs(config), _store(config))


def test_refreshed_core_vectors_follow_the_cores() -> None:
    layer = MemoryLayer(_config(), init=Initializer(jax.random.key(0)))
    first = layer.core_u[...]
    layer.refresh()
    np.testing.assert_allclose(layer.core_u[...], first, atol=1e-6)
    layer.cores[...] = jnp.stack([jnp.diag(jnp.asarray([1.0, 4.0]))[None]] * 2)
    layer.refresh()
    np.testing.assert_allclose(jnp.abs(layer.core_u[...]), [[0, 1]], atol=1e-6)


def test_bfloat16_layers_score_and_sum_in_float32() -> None:
    config = dataclasses.replace(_config(), compute_dtype="bfloat16")
    x = _inputs(config).astype(jnp.bfloat16)
    layer, store = _layer(config), _store(config)
    y, stats = _apply(layer, x, store)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    gradient = jax.grad(lambda store: jnp.sum(_apply(layer, x, store)[0].astype(jnp.float32)))(
        store
    )
    assert gradient.values.dtype == jnp.float32


# --- initialisation ---

_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "num_keys": 24, "key_dim": 32, "top_m": 16, "shortlist": 16},
    "larger": {"hidden_size": 128, "num_keys": 32, "key_dim": 64, "top_m": 32, "shortlist": 32},
}
# The cores alone, eight numbers per layer, give a layer's variance a deviation of 30 % of its mean.
_LAYERS = 40
_SEEDS = 10


def _principled(size: str, **overrides: Any) -> ModelConfig:
    sizes = _SIZES[size] | {"initialization": "principled"}
    value_dim = sizes["hidden_size"] // 4
    widths = {"value_dim": value_dim, "pre_value_dim": value_dim // 2}
    return _config(**sizes | widths | overrides, num_layers=_LAYERS)


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns variances of memory and FFN outputs and mean per-core scores, by seed and layer."""
    std = layers.linear_std(config.hidden_size)
    down_std = std * layers.residual_scale(config.num_layers)
    sizes = config.memory

    def of_layer(seed: jax.Array, index: jax.Array, store: ValueStore) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), index)
        x = jax.random.normal(key, (1, 32, config.hidden_size))
        x = layers.rms_norm(x, jnp.ones(config.hidden_size), config.norm_epsilon)
        init = Initializer(key)
        layer = MemoryLayer(config, init=init)
        with pytest.MonkeyPatch.context() as patch:
            scores = _record_scores(patch)
            window = StoreWindow(store=store, start=index * sizes.num_values)
            y, _ = layer(x, window=window, observe=Observe())
        ffn = layers.SwiGLU(
            config.hidden_size, config.ffn_size, std=std, down_std=down_std, init=init
        )
        return jnp.mean(y**2), jnp.mean(ffn(x) ** 2), jnp.mean(scores[0])

    def of_seed(seed: jax.Array) -> Any:
        store = MemoryLayer.create_store(config, init=Initializer(jax.random.key(seed)))
        return jax.lax.map(lambda index: of_layer(seed, index, store), jnp.arange(_LAYERS))

    return jax.lax.map(of_seed, jnp.arange(_SEEDS))


def _record_scores(patch: pytest.MonkeyPatch) -> list[jax.Array]:
    scores: list[jax.Array] = []
    value_weights = retrieval.value_weights

    def recording(given: jax.Array, *options: Any, **named: Any) -> jax.Array:
        scores.append(given)
        return value_weights(given, *options, **named)

    patch.setattr(retrieval, "value_weights", recording)
    return scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        ("small", {}),
        ("larger", {}),
        _slow("small", {"pre_value_dim": 0}),
        _slow("small", {"activation": "gelu"}),
        _slow("small", {"num_heads": 2}),
        _slow("small", {"scoring": "sum", "tucker_rank": 1, "num_cores": 1}),
        _slow("larger", {"query": "shared"}),
        _slow("small", _PKM | {"value_dim": 64}),
        _slow("small", _PEER | {"value_dim": 64, "pre_value_dim": 64}),
        _slow("small", _MEMORY_PLUS | {"query_norm": "rms"}),
    ],
    ids=str,
)
def test_initial_variances_match_the_formulas(size: str, overrides: dict[str, Any]) -> None:
    config = _principled(size, **overrides)
    memory_variances, ffn_variances, scores = _initial(config)
    weight_square = initialization.calibrate(config.memory).weight_square
    values_std = initialization.memory_initialization(config).values_std
    expected = initialization.memory_variance(config, values_std, weight_square)
    np.testing.assert_allclose(
        expected, initialization.ffn_variance(config, linear_gate=True), rtol=1e-6
    )
    np.testing.assert_allclose(memory_variances.mean(), expected, rtol=0.05)
    np.testing.assert_allclose(
        ffn_variances.mean(), initialization.ffn_variance(config, linear_gate=False), rtol=0.05
    )
    if config.memory.score_activation == "none":
        np.testing.assert_allclose(scores.mean(), 1, rtol=0.05)


def test_initializations_differ_as_documented() -> None:
    def start(arm: str) -> initialization.MemoryInitialization:
        return initialization.memory_initialization(_principled("small", initialization=arm))

    principled, released, unit = start("principled"), start("released"), start("unit")
    assert unit == dataclasses.replace(principled, values_std=1.0)
    assert released.values_std == 0.02
    assert released.query_norm == released.key_norm == 32**-0.4
    assert released.query_std == 32**-0.5
    assert released.output_std == 16**-0.5
    assert principled.query_std == principled.output_std == principled.pre_std == (2 / 320) ** 0.5
    assert principled.key_std == released.key_std == 32**-0.5


@pytest.mark.parametrize("expansion", [1, 2])
def test_the_store_has_the_initial_deviation_and_one_table_per_layer(expansion: int) -> None:
    config = _config(num_layers=3, num_keys=20, key_expansion=expansion, initialization="released")
    store = MemoryLayer.create_store(config, init=Initializer(jax.random.key(1)))
    assert store.values.shape == (3, 400, 12)
    assert store.pre_values is not None
    assert store.pre_values.shape == (3, 400, 4)
    np.testing.assert_allclose(store.values.std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(store.pre_values.std(), 0.02, rtol=0.05)
