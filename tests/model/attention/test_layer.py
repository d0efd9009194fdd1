"""Attention: rotary scaling, windows, long sequences, and the cache read in blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from umv2.config import ModelConfig, from_config_dict
from umv2.model import attention, layers
from umv2.model.attention import cache, xla
from umv2.model.parameter import Initializer

_LENGTH = 24


def _config(**changes: Any) -> ModelConfig:
    config = base.get_config()
    config.model.update(hidden_size=16, num_heads=4, num_key_value_heads=2, num_layers=1)
    config.model.update(compute_dtype="float32", **changes)
    return from_config_dict(config).model


def _layer(**changes: Any) -> attention.Attention:
    layer = attention.Attention(_config(**changes), init=Initializer(jax.random.key(0)))
    layer.query_norm.weight[...] *= 4  # makes attention sharp enough to distinguish positions
    return layer


def _inputs(length: int = _LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (3, length, 16))


def test_linear_scaling_divides_positions_and_ntk_keeps_the_highest_frequency() -> None:
    plain = layers.Rope(1e4).frequencies(8)
    np.testing.assert_allclose(layers.Rope(1e4, "linear", 4.0).frequencies(8), plain / 4)
    ntk = layers.Rope(1e4, "ntk", 4.0).frequencies(8)
    np.testing.assert_allclose(ntk[0], plain[0])
    np.testing.assert_allclose(ntk[-1], plain[-1] / 4)
    assert np.all(np.diff(np.log(plain / ntk)) > 0)


def test_linear_scaling_reads_a_stretched_sequence_like_the_original() -> None:
    x = _inputs(4)
    rope, stretched = layers.Rope(1e4), layers.Rope(1e4, "linear", 2.0)
    heads = x.reshape(3, 4, 4, 4)
    positions = jnp.arange(4)[None]
    np.testing.assert_allclose(
        stretched.rotate(heads, 2 * positions), rope.rotate(heads, positions), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(stretched.rotate(heads, positions), rope.rotate(heads, positions))


def test_a_window_masks_earlier_positions() -> None:
    layer, windowed = _layer(), _layer(attention_window=5)
    x = _inputs()
    moved = x.at[:, 3].add(1.0)
    changed = np.abs(layer(moved)[0] - layer(x)[0]).max(axis=(0, 2)) > 1e-6
    assert changed[3:].all()
    changed = np.abs(windowed(moved)[0] - windowed(x)[0]).max(axis=(0, 2)) > 1e-6
    assert np.flatnonzero(changed).tolist() == [3, 4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 7])
def test_queries_in_chunks_equal_queries_at_once(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = _layer(attention_window=window), _inputs()
    segments = jnp.broadcast_to(jnp.arange(_LENGTH)[None, :] // 10, (3, _LENGTH))

    def output(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(layer(x)[0])) + jnp.sum(jnp.sin(layer(x, segment_ids=segments)[0]))

    expected = jax.value_and_grad(output)(x)
    monkeypatch.setattr(xla, "_LONG", 8)
    monkeypatch.setattr(xla, "_QUERY_CHUNK", 8)
    assert "scan" in str(jax.make_jaxpr(output)(x))
    for got, want in zip(jax.value_and_grad(output)(x), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_to_the_cache_in_blocks_equals_attention_to_all_of_it(
    window: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four rows with two queries each at different positions; the last block is partial.
    monkeypatch.setattr(cache, "_CACHE_BLOCK", 8)
    draws = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(draws[0], (4, 2, 6, 8))
    keys, values = (jax.random.normal(k, (4, 2, 21, 8)).astype(dtype) for k in draws[1:])
    places = jnp.array([[0, 1], [7, 8], [15, 16], [19, 20]]).repeat(3, axis=1)
    wide = (keys.astype("float32"), values.astype("float32"))
    at_once = cache._attend_dense(query, *wide, places, window=window)
    by_blocks = functools.partial(cache._attend_blockwise, window=window)
    got = by_blocks(query, keys, values, places)
    np.testing.assert_allclose(got, at_once, rtol=1e-4, atol=1e-5)
    # Blocks after all queries of a row are not read.
    keys, values = keys.at[:, :, 16:].set(jnp.nan), values.at[:, :, 16:].set(jnp.nan)
    got = by_blocks(query, keys, values, places)
    np.testing.assert_allclose(got[:2], at_once[:2], rtol=1e-4, atol=1e-5)
    assert np.isnan(got[2:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4])
def test_a_sequence_read_in_parts_equals_one_read_at_once(window: int) -> None:
    layer, x = _layer(attention_window=window), _inputs(10)
    expected, _ = layer(x)
    empty = jnp.zeros((3, 2, 12, 4))
    first, filled = layer(x[:, :4], cache=attention.KeyValueCache(keys=empty, values=empty))
    # Several positions at once after a cache, then a single one.
    second, filled = layer(x[:, 4:9], cache=filled, position=jnp.full(1, 4))
    third, _ = layer(x[:, 9:], cache=filled, position=jnp.full(3, 9))
    got = jnp.concatenate([first, second, third], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
