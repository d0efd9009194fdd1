"""Generation against the full forward pass, sampling against numbers computed by hand."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests import meshes
from umv2.config import ConfigError, GenerateConfig, from_config_dict
from umv2.data.tokenizers import ByteTokenizer, Ids
from umv2.inference import decode
from umv2.model.memory import ValueStore
from umv2.model.transformer import Transformer
from umv2.training.state import create_model

TOKENIZER = ByteTokenizer()
GREEDY = GenerateConfig(max_new_tokens=24, temperature=0.0, top_k=0, top_p=1.0, seed=0)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
# Probabilities 1/10, 4/10, 2/10, 1/10, 2/10: ties on purpose, both of 0.2 and of 0.1.
LOGITS = np.log(np.array([[1.0, 4.0, 2.0, 1.0, 2.0]], np.float32))


@functools.cache
def small_model(family: str) -> tuple[Transformer, ValueStore | None]:
    """Two blocks, scanned or not, whose text varies with the token and with what precedes it."""
    config = base.get_config()
    config.model.update(
        hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, ffn_size=32
    )
    config.model.update(family=family, scan_layers=family != "dense")
    config.model.update(tie_embeddings=False, compute_dtype="float32")
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4, value_dim=12)
    config.model.memory.update(pre_value_dim=4, chunk_tokens=8)
    config.model.moe.update(num_experts=6, top_k=2, expert_size=16)
    model_config = from_config_dict(config).model
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in half the time
    model, store = jax.jit(lambda: create_model(model_config, key))()
    model.embedding[...] *= 10
    model.blocks.attention.query_norm.weight[...] *= 10
    model.blocks.attention.output[...] *= 10
    return model, store


def greedy_by_full_forward(
    model: Transformer, store: ValueStore | None, prompt: list[int], count: int
) -> list[int]:
    """The likeliest continuation, each id from a pass without cache over all that precedes it."""
    length = len(prompt) + count
    forward = jax.jit(lambda tokens: model(tokens, store=store))
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (length - len(ids))])
        output = forward(padded)
        assert output.cache is None
        ids.append(int(output.logits[0, len(ids) - 1, : TOKENIZER.vocab_size].argmax()))
    return ids[len(prompt) :]


def draws(count: int, **arguments: float) -> np.ndarray:
    """Frequencies of the five ids in `count` draws."""
    settings: Any = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocab_size": 5} | arguments
    ids = decode.sample(jnp.tile(LOGITS, (count, 1)), jax.random.key(0), **settings)
    assert ids.dtype == jnp.int32
    return np.bincount(ids, minlength=5) / count


def test_temperature_zero_takes_the_lower_of_equal_ids() -> None:
    assert draws(4, temperature=0.0).tolist() == [0, 1, 0, 0, 0]
    tied = jnp.array([[1.0, 3.0, 2.0, 3.0, 3.0]])
    settings: Any = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "vocab_size": 5}
    assert decode.sample(tied, jax.random.key(0), **settings).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.1, 0.2]),
        # Squares: 1, 16, 4, 1, 4 of 26.
        ({"temperature": 0.5}, [1 / 26, 16 / 26, 4 / 26, 1 / 26, 4 / 26]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0, 0]),  # of the two 0.2 the lower id
        ({"top_k": 3}, [0, 0.5, 0.25, 0, 0.25]),
        ({"top_k": 4}, [1 / 9, 4 / 9, 2 / 9, 0, 2 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.1, 0.2]),
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


def test_a_nucleus_reached_exactly_holds_no_further_id() -> None:
    halves = jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]]))
    ids = decode.sample(
        jnp.tile(halves, (2000, 1)),
        jax.random.key(0),
        temperature=1.0,
        top_k=0,
        top_p=0.75,
        vocab_size=4,
    )
    assert set(ids.tolist()) == {0, 1}


@pytest.mark.parametrize("family", ["memory", "dense", "moe"])
def test_decoding_with_the_cache_equals_the_argmax_of_full_forward_passes(family: str) -> None:
    model, store = small_model(family)
    generator = decode.Generator(model, store, tokenizer=TOKENIZER, config=GREEDY)
    prompt = TOKENIZER.encode("def f(x): return x")
    ids = list(generator.generate_ids(prompt))
    start = [TOKENIZER.end_of_text_id, *prompt.tolist()]
    expected = greedy_by_full_forward(model, store, start, GREEDY.max_new_tokens)
    # The same token is followed by different ones: the text shows what the cache holds.
    followers = set(itertools.pairwise(expected))
    assert len(followers) > len(set(expected[:-1]))
    assert ids == expected[: len(ids)]
    assert len(ids) == GREEDY.max_new_tokens or expected[len(ids)] == TOKENIZER.end_of_text_id


def test_padding_of_the_prompt_leaves_no_trace_in_the_logits() -> None:
    model, store = small_model("memory")
    forward = jax.jit(lambda tokens, **past: model(tokens, store=store, **past).logits[:, -1])
    tokens = jnp.array([[256, 65, 66, 67, 68]])
    expected = forward(tokens)
    for padding in (0, 200):
        padded = jnp.full((1, 32), padding, jnp.int32).at[:, :4].set(tokens[:, :4])
        cache = decode.prefill(model, store, padded, length=44)
        logits = forward(tokens[:, 4:], cache=cache, position=4)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_prompts_of_one_bucket_share_one_prefill_and_one_decode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, store = small_model("memory")
    config = dataclasses.replace(SAMPLED, max_new_tokens=3)
    generator = decode.Generator(model, store, tokenizer=TOKENIZER, config=config)

    def compilations(*prompts: str) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for prompt in prompts:
                list(generator.generate_ids(TOKENIZER.encode(prompt)))
        messages = [record.getMessage() for record in caplog.records]
        names = [m.split()[4] for m in messages if m.startswith("Finished XLA compilation of")]
        return sorted(name for name in names if "prefill" in name or "decode" in name)

    assert compilations("a", "", "abcd" * 8) == ["jit(decode)", "jit(prefill)"]
    assert compilations("abcd" * 8 + "a") == ["jit(decode)", "jit(prefill)"]
    assert compilations("abcd" * 16, "b") == []


def test_a_model_that_lies_on_a_mesh_generates_on_one_device() -> None:
    model, store = small_model("memory")
    mesh = meshes.create(replica=8)
    replicated = meshes.replicate((model, store), mesh)
    texts = [
        list(decode.Generator(*parts, tokenizer=TOKENIZER, config=GREEDY).generate("a"))
        for parts in (replicated, (model, store))
    ]
    assert texts[0] == texts[1]


def test_a_seed_names_a_text() -> None:
    model, store = small_model("memory")

    def text(seed: int) -> str:
        config = dataclasses.replace(SAMPLED, seed=seed)
        generator = decode.Generator(model, store, tokenizer=TOKENIZER, config=config)
        return "".join(generator.generate("import "))

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_generation_stops_before_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = small_model("memory")
    script = iter([72, 105, TOKENIZER.end_of_text_id, 33])

    def scripted(*arguments: Any, **_: Any) -> tuple[np.ndarray, Any]:
        return np.array([next(script)], np.int32), arguments[2]

    monkeypatch.setattr(decode, "decode", scripted)
    generator = decode.Generator(model, store, tokenizer=TOKENIZER, config=GREEDY)
    assert list(generator.generate("")) == ["H", "i"]
    assert list(script) == [33]


def test_text_arrives_in_whole_characters() -> None:
    script = "aé€".encode() + b"\xff" + "😀b".encode() + b"\xe2\x82"
    seen: list[int] = []

    def ids() -> Iterator[int]:
        for byte in script:
            seen.append(byte)
            yield byte

    arrived = [(len(seen), piece) for piece in decode.stream_text(TOKENIZER, [], ids())]
    # One bad byte waits for the next whole character; what never becomes one ends the text.
    assert arrived == [(1, "a"), (3, "é"), (6, "€"), (11, "\ufffd😀"), (12, "b"), (14, "\ufffd")]
    assert "".join(piece for _, piece in arrived) == TOKENIZER.decode(list(script))


def test_a_piece_keeps_the_space_that_a_decoder_drops_at_the_start_of_a_text() -> None:
    class Words(ByteTokenizer):
        def decode(self, ids: Ids) -> str:
            return " ".join(f"w{i}" for i in ids)

    assert list(decode.stream_text(Words(), [7], [8, 9])) == [" w8", " w9"]


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    class Larger(ByteTokenizer):
        vocab_size = 265

    model, store = small_model("memory")
    with pytest.raises(ConfigError, match=r"model\.vocab_size=264.*at least the 265 ids"):
        decode.Generator(model, store, tokenizer=Larger(), config=GREEDY)
