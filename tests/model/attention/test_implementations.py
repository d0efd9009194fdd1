"""The implementations of attention against one that forms all scores, and the choice of one."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umv2.config import ConfigError
from umv2.model.attention import cudnn, implementations, splash, xla
from umv2.model.attention.shapes import Shapes

BFLOAT16 = Shapes(
    length=256,
    head_dim=64,
    dtype=jnp.dtype("bfloat16"),
    window=0,
    packed=False,
    platform="cpu",
    compute_capability=None,
)

# Window, whether documents are packed, key-value heads.
CASES = {
    "causal": (0, False, 2),
    "a window": (100, False, 2),
    "documents": (0, True, 2),
    "documents, a window, grouped heads": (70, True, 1),
}


def _arrays(packed: bool, groups: int, length: int = 256) -> tuple[list[jax.Array], Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        2 * jax.random.normal(key, (2, length, count, 16), jnp.float32)
        for key, count in zip(keys, (2, groups, groups, 2), strict=True)
    ]
    documents = jnp.stack([jnp.arange(length) // 37, jnp.arange(length) // 130 + 3])
    return arrays, documents if packed else None


def _reference(query: Any, keys: Any, values: Any, documents: Any, shapes: Shapes) -> jax.Array:
    """Attends with an explicit mask of every pair of positions."""
    positions = np.arange(query.shape[1])
    distance = positions[:, None] - positions[None, :]
    mask = jnp.asarray((distance >= 0) & (distance < (shapes.window or query.shape[1])))[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return jax.nn.dot_product_attention(query, keys, values, mask=mask)


def _results(attend: Any, case: str) -> list[np.ndarray]:
    """Returns the output and the gradients of queries, keys and values."""
    window, packed, groups = CASES[case]
    (query, keys, values, direction), documents = _arrays(packed, groups)
    shapes = BFLOAT16._replace(window=window, packed=packed)

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = attend(*arrays, documents, shapes)
        return (output * direction).sum(), output

    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, output), gradients = differentiate(query, keys, values)
    return [np.asarray(array, np.float32) for array in (output, *gradients)]


def _differ(case: str, other: str) -> bool:
    pairs = zip(_results(_reference, case), _results(_reference, other), strict=True)
    return all(np.abs(a - b).max() > 0.1 for a, b in pairs)


def test_windows_and_documents_change_the_reference() -> None:
    assert _differ("causal", "a window")
    assert _differ("causal", "documents")


@pytest.mark.parametrize("case", CASES)
def test_plain_attention_matches_the_reference(case: str) -> None:
    for platform in ("cpu", "gpu"):

        def attend(
            q: Any, k: Any, v: Any, ids: Any, shapes: Shapes, platform: str = platform
        ) -> jax.Array:
            return xla.attend(q, k, v, ids, shapes._replace(platform=platform))

        for ours, theirs in zip(_results(attend, case), _results(_reference, case), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.slow(fast=["documents, a window, grouped heads"])
@pytest.mark.parametrize("case", CASES)
def test_splash_attention_matches_the_reference(case: str) -> None:
    attend = functools.partial(splash.attend, interpret=True)
    for ours, theirs in zip(_results(attend, case), _results(_reference, case), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-4)


@pytest.mark.parametrize("case", CASES)
def test_documents_told_apart_by_features_match_the_reference(case: str) -> None:
    # What is passed to cuDNN, given to the plain implementation of the same function.
    attend = functools.partial(cudnn.attend, implementation="xla")
    for ours, theirs in zip(_results(attend, case), _results(_reference, case), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_scores_within_a_document_keep_their_bits() -> None:
    (query, keys, _, _), documents = _arrays(packed=True, groups=2)
    query, keys = query.astype(jnp.bfloat16), keys.astype(jnp.bfloat16)
    wide_query, wide_keys, _ = cudnn._with_documents(query, keys, keys, documents, 0.25)

    def scores(query: jax.Array, keys: jax.Array) -> np.ndarray:
        return np.asarray(
            jnp.einsum("bthq,bshq->bhts", query, keys, preferred_element_type=jnp.float32)
        )

    same = np.asarray(documents[:, None, :, None] == documents[:, None, None, :])
    same = np.broadcast_to(same, (2, 2, 256, 256))
    plain, extended = scores(query, keys), scores(wide_query, wide_keys)
    np.testing.assert_array_equal(extended[same], plain[same])
    assert (0.25 * (extended - plain)[~same]).max() <= -(2**12) + 1


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "xla"),
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "gpu", "packed": True}, "cudnn"),
        ({"platform": "gpu", "packed": True, "head_dim": 128}, "xla"),
        (
            {"platform": "gpu", "packed": True, "head_dim": 128, "compute_capability": "9.0"},
            "cudnn",
        ),
        ({"platform": "gpu", "compute_capability": "7.0"}, "xla"),
        ({"platform": "gpu", "dtype": jnp.dtype("float32")}, "xla"),
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "length": 200}, "xla"),
        ({"platform": "tpu", "head_dim": 24}, "xla"),
        ({"platform": "tpu", "dtype": jnp.dtype("float64")}, "xla"),
    ],
)
def test_the_first_implementation_that_supports_a_call_is_chosen(
    changes: dict[str, Any], chosen: str
) -> None:
    assert implementations.choose("auto", BFLOAT16._replace(**changes)) == chosen


def test_a_choice_is_logged_with_the_reasons_against_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        for _ in range(2):  # logged once
            implementations.choose("auto", BFLOAT16._replace(platform="tpu", length=72))
    (line,) = [line for line in caplog.messages if "72" in line]
    assert line == (
        "model.attention on tpu: implementation xla"
        " (not splash: takes lengths that are multiples of 128, not 72)"
    )


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_named_implementation_says_why_it_does_not_support_a_call(name: str) -> None:
    runs_on = {"cudnn": "GPUs", "splash": "TPUs"}[name]
    with pytest.raises(ConfigError, match=f"model.attention='{name}': runs on {runs_on}, not on"):
        implementations.choose(name, BFLOAT16)
