"""Sampling against numbers computed by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umv2.inference.sampling import Sampling

# Probabilities 1/10, 4/10, 2/10, 1/10, 2/10, with ties at both 0.2 and 0.1.
LOGITS = np.log(np.array([[1.0, 4.0, 2.0, 1.0, 2.0]], np.float32))


def draws(count: int, **arguments: float) -> np.ndarray:
    """Returns the frequencies of the five ids in `count` draws."""
    settings: Any = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocab_size": 5} | arguments
    keys = jax.random.split(jax.random.key(0), count)
    ids = Sampling(**settings).draw(jnp.tile(LOGITS, (count, 1)), keys)
    assert ids.dtype == jnp.int32
    return np.bincount(ids, minlength=5) / count


def test_temperature_zero_breaks_ties_by_the_lower_id() -> None:
    assert draws(4, temperature=0.0).tolist() == [0, 1, 0, 0, 0]
    tied = jnp.array([[1.0, 3.0, 2.0, 3.0, 3.0]])
    settings: Any = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "vocab_size": 5}
    keys = jax.random.split(jax.random.key(0), 1)
    assert Sampling(**settings).draw(tied, keys).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.1, 0.2]),
        # Squares: 1, 16, 4, 1, 4, of 26.
        ({"temperature": 0.5}, [1 / 26, 16 / 26, 4 / 26, 1 / 26, 4 / 26]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0, 0]),  # the lower id of the two with 0.2
        ({"top_k": 3}, [0, 0.5, 0.25, 0, 0.25]),
        ({"top_k": 4}, [1 / 9, 4 / 9, 2 / 9, 0, 2 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.1, 0.2]),
        ({"top_p": 1e-50}, [0, 1, 0, 0, 0]),  # 0 in float32
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.79}, [0, 0.5, 0.25, 0, 0.25]),
        ({"top_p": 0.81}, [1 / 9, 4 / 9, 2 / 9, 0, 2 / 9]),
        # After top_k = 3 the probabilities are 1/2, 1/4, 1/4: two of them reach 0.7.
        ({"top_k": 3, "top_p": 0.7}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"vocab_size": 3}, [1 / 7, 4 / 7, 2 / 7, 0, 0]),
        ({"vocab_size": 3, "top_k": 5}, [1 / 7, 4 / 7, 2 / 7, 0, 0]),
        ({"vocab_size": 1, "temperature": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution_computed_by_hand(
    arguments: dict[str, float], expected: list[float]
) -> None:
    frequencies = draws(20_000, **arguments)
    np.testing.assert_array_equal(frequencies == 0, np.array(expected) == 0)
    # Four standard deviations of a frequency are at most 4 sqrt(0.25 / 20000).
    np.testing.assert_allclose(frequencies, expected, atol=0.0142)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-40, 1.1e-38, 1.2e-38, 1e-30, 1e-3])
def test_small_temperatures_select_the_most_likely_id(
    temperature: float, cut: dict[str, Any]
) -> None:
    # Logits divided by the temperature overflow float32.
    logits = jnp.array([[-80.0, 30.0, 80.0, 79.0, -0.0], [-3.0, -1.0, -2.0, -9.0, -4.0]])
    settings: Any = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "vocab_size": 5} | cut
    ids = Sampling(**settings).draw(logits, jax.random.split(jax.random.key(0), 2))
    assert ids.tolist() == [2, 1]


def test_large_temperatures_make_all_ids_equally_likely() -> None:
    np.testing.assert_allclose(draws(20_000, temperature=1e300), [0.2] * 5, atol=0.0142)


def test_a_nucleus_reached_exactly_has_no_further_id() -> None:
    halves = jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]]))
    sampling = Sampling(temperature=1.0, top_k=0, top_p=0.75, vocab_size=4)
    keys = jax.random.split(jax.random.key(0), 2000)
    ids = sampling.draw(jnp.tile(halves, (2000, 1)), keys)
    assert set(ids.tolist()) == {0, 1}


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_only_truncation_sorts_the_vocabulary(top_p: float) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=top_p, vocab_size=5)
    keys = jax.random.split(jax.random.key(0), 1)
    program = str(jax.make_jaxpr(sampling.draw)(jnp.asarray(LOGITS), keys))
    assert ("top_k" in program) == (top_p < 1)
