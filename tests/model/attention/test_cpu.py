"""Attention in blocks of queries, against `jax.nn.dot_product_attention` on all scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umv2.model.attention import cpu

# (batch, length, heads, key-value heads, width), window, whether documents are packed.
CASES = {
    "several blocks": ((2, 256, 4, 4, 8), 0, False),
    "a ragged last block, grouped heads, documents": ((2, 200, 4, 2, 8), 0, True),
    "a window": ((1, 70, 2, 1, 4), 9, False),
    "blocks that begin within a window, documents": ((1, 600, 2, 2, 4), 100, True),
    "one token": ((1, 1, 2, 2, 4), 0, False),
}


def _arrays(shape: tuple[int, ...], packed: bool, dtype: Any) -> tuple[list[jax.Array], Any]:
    batch, length, heads, groups, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (batch, length, count, width), jnp.float32).astype(dtype)
        for key, count in zip(keys, (heads, groups, groups, heads), strict=True)
    ]
    documents = jnp.broadcast_to(jnp.arange(length)[None, :] // 37, (batch, length))
    return arrays, documents if packed else None


def _reference(query: Any, keys: Any, values: Any, documents: Any, window: int) -> jax.Array:
    mask = None if documents is None else documents[:, None, :, None] == documents[:, None, None]
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        query, keys, values, mask=mask, is_causal=True, local_window_size=local
    )


def _results(function: Any, case: str, dtype: Any = jnp.float32) -> list[np.ndarray]:
    """Returns the output and the gradients of queries, keys and values."""
    shape, window, packed = CASES[case]
    (query, keys, values, direction), documents = _arrays(shape, packed, dtype)

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = function(*arrays, documents, window)
        return (output * direction).sum(), output

    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, output), gradients = differentiate(query, keys, values)
    assert output.dtype == dtype
    return [np.asarray(array, np.float32) for array in (output, *gradients)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_match_attention_on_all_scores(case: str) -> None:
    for ours, theirs in zip(_results(cpu.attend, case), _results(_reference, case), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    case = "a ragged last block, grouped heads, documents"
    exact = _results(_reference, case)
    ours = _results(cpu.attend, case, jnp.bfloat16)
    for wide, narrow in zip(exact, ours, strict=True):
        assert np.abs(narrow - wide).max() < 2**-6 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("case", "position", "first"),
    [
        ("several blocks", 200, 0),
        ("a window", 60, 60 - 8),
        ("blocks that begin within a window, documents", 300, 300 // 37 * 37),
    ],
)
def test_a_query_sees_nothing_after_it_outside_its_window_or_in_another_document(
    case: str, position: int, first: int
) -> None:
    shape, window, packed = CASES[case]
    (query, keys, values, _), documents = _arrays(shape, packed, jnp.float32)

    def output_at(values: jax.Array) -> jax.Array:
        return cpu.attend(query, keys, values, documents, window)[0, position].sum()

    reached = np.flatnonzero(np.asarray(jax.grad(output_at)(values))[0].any(axis=(1, 2)))
    np.testing.assert_array_equal(reached, np.arange(first, position + 1))
