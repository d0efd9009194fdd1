"""The memory layer: what it reads, what it adds up, and how large it is at the start."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.model.drawn import drawn
from umv2 import config as config_lib
from umv2.model import initialization, layers, memory, retrieval

_SMALL = {
    "num_keys": 6,
    "key_dim": 8,
    "value_dim": 12,
    "pre_value_dim": 4,
    "top_m": 4,
    "shortlist": 4,
    "initialization": "released",  # spares the calibration
}


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def _config(*, hidden_size: int = 16, num_layers: int = 2, **sizes: Any) -> config_lib.ModelConfig:
    config = base.get_config()
    config.model.hidden_size, config.model.num_layers = hidden_size, num_layers
    config.model.compute_dtype = "float32"
    config.model.memory.update(_SMALL | sizes)
    return config_lib.from_config_dict(config).model


def _layer(config: config_lib.ModelConfig, seed: int = 0) -> memory.MemoryLayer:
    return drawn(lambda: memory.MemoryLayer(config, key=jax.random.key(0)), seed)


def _store(config: config_lib.ModelConfig) -> memory.ValueStore:
    rows, sizes = len(config.placements) * config.memory.num_values, config.memory
    generator = np.random.default_rng(1)
    return memory.ValueStore(
        values=jnp.asarray(generator.normal(size=(rows, sizes.value_dim)), jnp.float32),
        pre_values=jnp.asarray(generator.normal(size=(rows, sizes.pre_value_dim)), jnp.float32),
    )


def _inputs(config: config_lib.ModelConfig, num_tokens: int = 10, seed: int = 2) -> jax.Array:
    shape = (2, num_tokens, config.hidden_size)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def _apply(
    layer: memory.MemoryLayer, x: jax.Array, store: memory.ValueStore, start: int = 0
) -> tuple[jax.Array, Any]:
    return layer(x, store=store, start=start)


def _assert_close(left: jax.Array, right: np.ndarray | jax.Array) -> None:
    largest = float(np.abs(right).max())
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * largest)


def _rows_read(config: config_lib.ModelConfig, start: int = 0) -> set[int]:
    """Rows of the store that the output of the layer depends on."""
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


@pytest.mark.parametrize(
    ("activation", "scoring", "rank", "cores"),
    [
        ("none", "tucker", 2, 2),
        ("gelu", "tucker", 3, 1),
        ("silu", "sum", 1, 1),
        ("relu", "sum", 1, 1),
    ],
)
def test_output_is_the_sum_over_selected_rows(
    activation: str, scoring: str, rank: int, cores: int
) -> None:
    config = _config(
        activation=activation, scoring=scoring, tucker_rank=rank, num_cores=cores, num_heads=2
    )
    sizes, layer, store = config.memory, _layer(config), _store(config)
    x = _inputs(config, num_tokens=3)
    y, _ = _apply(layer, x, store, 7)

    flat = x.reshape(-1, x.shape[-1])
    chunks = (flat @ layer.query[...]).reshape(6, -1, sizes.key_dim)
    query = layers.rms_norm(chunks, layer.query_norm[...], config.norm_epsilon)
    query = query.reshape(6, 2, rank, sizes.key_dim)
    keys = layers.rms_norm(layer.keys[...], layer.key_norm[...], config.norm_epsilon)
    scores = np.einsum("tsrq,hsrnq->hsrtn", query, keys)
    activate = {"none": lambda z: z, "gelu": lambda z: jax.nn.gelu(z, approximate=False)}
    act = activate.get(activation) or getattr(jax.nn, activation)
    u, v = np.asarray(layer.core_u[...]), np.asarray(layer.core_v[...])
    expected = np.zeros((6, sizes.value_dim), np.float32)
    for head in range(2):
        for token in range(6):
            row, column = scores[head, 0, :, token], scores[head, 1, :, token]
            kept = [np.argsort(-(w[head] @ s))[:4] for w, s in ((u, row), (v, column))]
            if scoring == "tucker":
                core = np.asarray(layer.cores[:, head])
                grid = np.einsum("ri,crq,qj->ijc", row[:, kept[0]], core, column[:, kept[1]])
            else:
                grid = (row[0, kept[0]][:, None] + column[0, kept[1]][None, :])[..., None]
            for flat_index in np.argsort(-grid.sum(-1).reshape(-1))[:4]:
                i, j = divmod(int(flat_index), 4)
                address = int(kept[0][i]) * sizes.keys_per_side + int(kept[1][j])
                table_row = (int(layer.shuffle[address]) + 7) % store.num_rows
                assert store.pre_values is not None
                gate = act(jnp.dot(flat[token] @ layer.pre[...], store.pre_values[table_row]))
                weight = np.repeat(grid[i, j], sizes.value_dim // cores)
                expected[token] += weight * float(gate) * np.asarray(store.values[table_row])
    expected = (expected @ np.asarray(layer.output[...])).reshape(y.shape)
    _assert_close(y, expected)


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
        if group in (1, 4):  # n sqrt(g) is whole: every table of the window is read
            assert {row // sizes.num_values for row in rows} == set(window)
            assert len(rows) > 0.9 * sizes.num_visible
        else:
            assert {row // sizes.num_values for row in rows} <= set(window)


def test_statistics_count_what_was_selected() -> None:
    config = _config(num_heads=2, key_expansion=2)
    _, stats = _apply(_layer(config), _inputs(config), _store(config))
    assert stats.row_hits.shape == (config.memory.num_visible,)
    assert int(stats.row_hits.sum()) == 2 * 10 * config.memory.num_selected
    assert float(stats.top_score) > float(stats.last_score)


def test_output_variance_is_that_of_the_output() -> None:
    config = _config()
    y, stats = _apply(_layer(config), _inputs(config), _store(config))
    np.testing.assert_allclose(stats.output_variance, np.var(y), rtol=1e-5)


def test_refreshed_core_vectors_follow_the_cores() -> None:
    layer = memory.MemoryLayer(_config(), key=jax.random.key(0))
    first = layer.core_u[...]
    layer.refresh_core_vectors()
    np.testing.assert_allclose(layer.core_u[...], first, atol=1e-6)
    layer.cores[...] = jnp.stack([jnp.diag(jnp.asarray([1.0, 4.0]))[None]] * 2)
    layer.refresh_core_vectors()
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
# The cores alone, eight numbers a layer, spread a layer's variance by 30 % of its mean.
_LAYERS = 40
_SEEDS = 10


def _principled(size: str, **overrides: Any) -> config_lib.ModelConfig:
    sizes = _SIZES[size] | {"initialization": "principled"}
    value_dim = sizes["hidden_size"] // 4
    widths = {"value_dim": value_dim, "pre_value_dim": value_dim // 2}
    return _config(**sizes | widths | overrides, num_layers=_LAYERS)


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: config_lib.ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Variances of memory and FFN outputs and mean per-core scores, over seeds and layers."""
    std = initialization.linear_std(config.hidden_size)
    down_std = std * initialization.residual_scale(config.num_layers)
    sizes = config.memory

    def of_layer(seed: jax.Array, index: jax.Array, store: memory.ValueStore) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), index)
        x = jax.random.normal(key, (1, 32, config.hidden_size))
        x = layers.rms_norm(x, jnp.ones(config.hidden_size), config.norm_epsilon)
        layer = memory.MemoryLayer(config, key=key)
        with pytest.MonkeyPatch.context() as patch:
            scores = _record_scores(patch)
            y, _ = layer(x, store=store, start=index * sizes.num_values)
        ffn = layers.SwiGLU(
            config.hidden_size, config.ffn_size, std=std, down_std=down_std, key=key
        )
        return jnp.mean(y**2), jnp.mean(ffn(x) ** 2), jnp.mean(scores[0])

    def of_seed(seed: jax.Array) -> Any:
        store = memory.create_store(config, key=jax.random.key(seed))
        return jax.lax.map(lambda index: of_layer(seed, index, store), jnp.arange(_LAYERS))

    return jax.lax.map(of_seed, jnp.arange(_SEEDS))


def _record_scores(patch: pytest.MonkeyPatch) -> list[jax.Array]:
    scores: list[jax.Array] = []
    per_core_scores = retrieval.per_core_scores

    def recording(selection: retrieval.Selection) -> jax.Array:
        scores.append(per_core_scores(selection))
        return scores[0]

    patch.setattr(retrieval, "per_core_scores", recording)
    return scores


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
    ],
    ids=str,
)
def test_initial_variances_are_those_of_the_formulas(size: str, overrides: dict[str, Any]) -> None:
    config = _principled(size, **overrides)
    memory_variances, ffn_variances, scores = _initial(config)
    score_std = initialization.calibrate(config.memory).score_std
    values_std = initialization.memory_initialization(config).values_std
    expected = initialization.memory_variance(config, values_std, score_std)
    np.testing.assert_allclose(
        expected, initialization.ffn_variance(config, linear_gate=True), rtol=1e-6
    )
    np.testing.assert_allclose(memory_variances.mean(), expected, rtol=0.05)
    np.testing.assert_allclose(
        ffn_variances.mean(), initialization.ffn_variance(config, linear_gate=False), rtol=0.05
    )
    np.testing.assert_allclose(scores.mean(), 1, rtol=0.05)


def test_arms_differ_in_what_they_name() -> None:
    def start(arm: str) -> initialization.MemoryInitialization:
        return initialization.memory_initialization(_principled("small", initialization=arm))

    principled, released, unit = start("principled"), start("released"), start("unit")
    assert unit == dataclasses.replace(principled, values_std=1.0)
    assert released.values_std == 0.02
    assert released.norm_weight == 32**-0.4
    assert released.query_std == 32**-0.5
    assert released.output_std == 16**-0.5
    assert principled.query_std == principled.output_std == principled.pre_std == (2 / 320) ** 0.5
    assert principled.key_std == released.key_std == 32**-0.5


@pytest.mark.parametrize("expansion", [1, 2])
def test_the_store_has_the_drawn_deviation_and_one_table_for_each_layer(expansion: int) -> None:
    config = _config(num_layers=3, num_keys=20, key_expansion=expansion)
    store = memory.create_store(config, key=jax.random.key(1))
    assert store.values.shape == (3 * 400, 12)
    assert store.pre_values is not None
    assert store.pre_values.shape == (3 * 400, 4)
    np.testing.assert_allclose(store.values.std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(store.pre_values.std(), 0.02, rtol=0.05)
