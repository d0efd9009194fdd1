"""Generation against the full forward pass."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests import meshes, slots
from tests.model.drawn import drawn_weights
from umv2 import sharding
from umv2.config import Config, ConfigError, GenerateConfig, ModelConfig, from_config_dict
from umv2.config.schema import UserError
from umv2.data.tokenizers import ByteTokenizer
from umv2.inference import decode, serving
from umv2.model.weights import Weights
from umv2.training import state

TOKENIZER = ByteTokenizer()
GREEDY = GenerateConfig(max_new_tokens=24, temperature=0.0, top_k=0, top_p=1.0, stop=(), seed=0)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)


def small_config(filled: str) -> Config:
    """Two blocks, scanned or unrolled."""
    config = base.get_config()
    config.model.update(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1)
    config.model.update(ffn_size=32, tie_embeddings=False, compute_dtype="float32")
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4, value_dim=12)
    config.model.memory.update(pre_value_dim=4, chunk_tokens=8)
    config.model.moe.update(num_experts=6, top_k=2, expert_size=16)
    slots.fill(config, filled, scan_layers=filled != "dense")
    return from_config_dict(config)


@functools.cache
def small_model(filled: str) -> tuple[ModelConfig, Weights]:
    """A model whose predictions vary with the token and with the preceding tokens."""
    config = small_config(filled).model
    weights = drawn_weights(config, embedding=10)
    params = jax.tree.map(lambda leaf: leaf, weights.params)
    params["blocks"]["attention"]["query_norm"]["weight"] *= 10
    params["blocks"]["attention"]["output"] *= 10
    return config, dataclasses.replace(weights, params=params)


def small_generator(filled: str, config: GenerateConfig = GREEDY) -> decode.Generator:
    """A generator with that model."""
    return decode.Generator(*small_model(filled), tokenizer=TOKENIZER, config=config)


def greedy_by_full_forward(
    config: ModelConfig, weights: Weights, prompt: list[int], count: int
) -> list[int]:
    """Greedy continuation without a cache: one forward pass over all previous ids per new id."""
    length = len(prompt) + count
    model = weights.model(config)
    forward = jax.jit(lambda tokens: model(tokens, store=weights.store))
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (length - len(ids))])
        output = forward(padded)
        assert output.cache is None
        ids.append(int(output.logits[0, len(ids) - 1, : TOKENIZER.vocab_size].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("filled", slots.SLOTS)
def test_greedy_decoding_with_the_cache_matches_full_forward_passes(filled: str) -> None:
    generator = small_generator(filled)
    prompt = TOKENIZER.encode("def f(x): return x")
    ids = list(generator.generate_ids(prompt))
    start = [TOKENIZER.end_of_text_id, *prompt.tolist()]
    expected = greedy_by_full_forward(*small_model(filled), start, GREEDY.max_new_tokens)
    # The same token is followed by different ones, so the text depends on the cache.
    followers = set(itertools.pairwise(expected))
    assert len(followers) > len(set(expected[:-1]))
    assert ids == expected[: len(ids)]
    assert len(ids) == GREEDY.max_new_tokens or expected[len(ids)] == TOKENIZER.end_of_text_id


@pytest.mark.slow(fast=["both"])
@pytest.mark.parametrize("filled", slots.SLOTS)
def test_prefill_and_decode_logits_match_the_full_forward_pass(filled: str) -> None:
    config, weights = small_model(filled)
    full_model = weights.model(config)
    served = jax.jit(serving.serve, static_argnums=0)(config, weights)
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 256)
    expected = jax.jit(lambda tokens: full_model(tokens, store=weights.store).logits)(tokens)
    # Rows of different lengths, with padding that must have no effect.
    lengths = jnp.array([9, 2, 5])
    padded = jnp.where(jnp.arange(9)[None] < lengths[:, None], tokens[:, :9], 200)
    cache = decode.prefill(served, padded, length=16)

    @jax.jit
    def step(cache: Any, positions: jax.Array) -> tuple[jax.Array, Any]:
        model, store = served.parts()
        read = jnp.take_along_axis(tokens, positions[:, None], axis=1)
        output = model(read, store=store, cache=cache, position=positions)
        return output.logits[:, 0], output.cache

    for offset in range(3):
        positions = lengths + offset
        logits, cache = step(cache, positions)
        expected_logits = jnp.take_along_axis(expected, positions[:, None, None], axis=1)[:, 0]
        np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)
        assert not np.allclose(logits, jnp.roll(expected_logits, 1, axis=0), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens_at_once", "rows"), [(35, 3), (26, 2), (7, 1), (54, 6)])
def test_many_long_prompts_are_prefilled_in_groups(tokens_at_once: int, rows: int) -> None:
    served = jax.jit(serving.serve, static_argnums=0)(*small_model("moe"))
    tokens = jax.random.randint(jax.random.key(1), (6, 9), 0, 256)
    read = functools.partial(decode.prefill, length=12)
    full, grouped = read(served, tokens), read(served, tokens, tokens_at_once=tokens_at_once)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, full, grouped)
    assert not np.allclose(full[1].keys[0, :, :9], full[1].keys[1, :, :9])
    program = jax.make_jaxpr(functools.partial(read, tokens_at_once=tokens_at_once))(served, tokens)
    assert (f"i32[{6 // rows},{rows},9]" in str(program)) == (rows < 6)


@pytest.mark.slow
def test_rows_of_a_batch_do_not_see_each_other() -> None:
    generator = small_generator("memory")
    prompts = ["def f(x): return x", "", "import numpy as np\n" * 4]
    single = ["".join(generator.generate(prompt)) for prompt in prompts]
    assert len(set(single)) == 3
    assert generator.generate_batch(prompts) == single
    assert generator.generate_batch([]) == []


@pytest.mark.slow
def test_a_batch_ends_each_text_at_its_own_stop_string() -> None:
    generator = small_generator("memory")
    prompts = ["def f(x): return x", "a"]
    full = generator.generate_batch(prompts)
    stop = full[0][8:10]
    expected = [text.split(stop)[0] for text in full]
    assert expected[0] != full[0]
    assert generator.generate_batch(prompts, stop=[stop]) == expected
    # The same with the stop string in the configuration, and when streaming.
    config = dataclasses.replace(GREEDY, stop=(stop,))
    generator = small_generator("memory", config)
    assert "".join(generator.generate(prompts[0])) == expected[0]
    assert generator.generate_batch(prompts[:1], max_new_tokens=5) == [full[0][:5]]


def test_a_bfloat16_model_is_served_in_bfloat16() -> None:
    config, weights = small_model("both")
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    served, store = jax.jit(serving.serve, static_argnums=0)(config, weights).parts()
    assert isinstance(store, list)
    keys, moe = served.memory[0].keys, served.blocks[0].moe
    narrow = (served.embedding, moe.gate_and_up, moe.down, keys, store[0].values)
    assert {str(array.dtype) for array in narrow} == {"bfloat16"}
    cores, query_norm = served.memory[0].cores, served.memory[0].query_norm
    wide = (served.final_norm.weight, moe.router, cores, query_norm)
    assert {str(array.dtype) for array in wide} == {"float32"}
    assert served.empty_cache(1, 8)[0].keys.dtype == jnp.bfloat16
    # The original model is unchanged.
    model = weights.model(config)
    assert model.memory.keys.dtype == jnp.float32
    assert model.memory.config.key_norm == "rms"


@pytest.mark.slow
def test_prompts_of_one_bucket_share_one_prefill_and_one_decode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = small_generator("memory", dataclasses.replace(SAMPLED, max_new_tokens=3))

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


def test_a_model_on_a_mesh_can_generate_on_one_device() -> None:
    config, weights = small_model("memory")
    replicated = meshes.replicate(weights, meshes.create(replica=8))
    generator = decode.Generator(config, replicated, tokenizer=TOKENIZER, config=GREEDY)
    assert list(generator.generate("a")) == list(small_generator("memory").generate("a"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(GREEDY, id="greedy"),
        pytest.param(SAMPLED, id="sampled", marks=pytest.mark.slow(minutes=1)),
    ],
)
@pytest.mark.parametrize("filled", ["memory", "moe", "both"])
def test_a_sharded_model_generates_the_same_text(filled: str, settings: GenerateConfig) -> None:
    settings = dataclasses.replace(settings, max_new_tokens=8)
    prompts = ["def f(x): return x", "", "import", "a", "b"]
    expected = small_generator(filled, settings).generate_batch(prompts)
    assert len(set(expected)) > 1

    mesh_config = meshes.config(fsdp=2, memory=4, table_sharding="columns")
    mesh, (model_config, weights) = sharding.create_mesh(mesh_config), small_model(filled)
    config = meshes.resolved(dataclasses.replace(small_config(filled), mesh=mesh_config))
    with jax.set_mesh(mesh):
        abstract = state.abstract_weights(config)
    weights = jax.device_put(weights, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    assert not weights.params["embedding"].is_fully_replicated
    sharded = decode.Generator(
        model_config, weights, tokenizer=TOKENIZER, config=settings, mesh=mesh
    )
    assert sharded.generate_batch(prompts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("filled", ["memory", pytest.param("moe", marks=pytest.mark.slow)])
def test_a_sample_depends_only_on_its_prompt_and_number(filled: str) -> None:
    generator = small_generator(filled, dataclasses.replace(SAMPLED, max_new_tokens=8))
    many = generator.generate_batch(["a"] * 6)
    assert len(set(many)) == 6
    assert "".join(generator.generate("a")) == many[0]
    # In a batch with longer and shorter prompts, in another order.
    among = generator.generate_batch(["import numpy as np\n" * 3, "a", "", "a"])
    assert [among[1], among[3]] == many[:2]

    context = [TOKENIZER.end_of_text_id, ord("a")]
    complete = functools.partial(generator.complete, max_new_tokens=8, stop=())
    assert complete([context] * 3, samples=[4, 1, 4]) == [many[4], many[1], many[4]]


@pytest.mark.slow
def test_prompts_with_equal_logits_get_different_samples() -> None:
    config, weights = small_model("memory")
    zeros = jax.tree.map(jnp.zeros_like, weights)  # all ids are equally likely
    generator = decode.Generator(config, zeros, tokenizer=TOKENIZER, config=SAMPLED)
    assert len(set(generator.generate_batch(["a", "b", "c", "a"]))) == 4


@pytest.mark.parametrize(
    ("items", "expected"), [("", []), ("aab", [0, 1, 0]), ("abaabb", [0, 0, 1, 2, 1, 2])]
)
def test_occurrences_count_earlier_equal_items(items: str, expected: list[int]) -> None:
    assert decode.occurrences(items) == expected


@pytest.mark.parametrize(
    ("prompt", "place"), [("caf\udce9", 3), ("\ud83d", 0), ("x" * 99 + "\udc80", 99)]
)
def test_prompts_that_are_not_unicode_are_rejected(prompt: str, place: int) -> None:
    generator = small_generator("memory")
    message = f"character {place} is a lone surrogate"
    with pytest.raises(UserError, match=message):
        next(generator.generate(prompt))
    with pytest.raises(UserError, match=message):
        generator.generate_batch(["a", prompt])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be >= 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3: must be >= 1"),
        ({"stop": [""]}, r"stop=\[''\]: must be strings, none of them empty"),
        ({"stop": "end"}, "stop='end': must be strings"),
        ({"max_new_tokens": 2**31}, "1 x 2,147,483,680 tokens.* do not fit in memory"),
        ({"max_new_tokens": 10**19}, "do not fit in memory"),
    ],
)
def test_an_invalid_batch_is_rejected(arguments: dict[str, Any], message: str) -> None:
    generator = small_generator("memory")
    with pytest.raises(UserError, match=message):
        generator.generate_batch(["a"], **arguments)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64000002048 bytes.",
        "INTERNAL: Error dispatching computation: Out of memory allocating 64000002048 bytes.",
        "INTERNAL: something else",
    ],
)
@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_out_of_memory_is_a_one_line_error_and_other_errors_are_not(
    monkeypatch: pytest.MonkeyPatch, function: str, message: str
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError(message)

    generator = small_generator("memory")
    monkeypatch.setattr(decode, function, failing)
    known = "memory" in message
    with pytest.raises(UserError if known else jax.errors.JaxRuntimeError) as caught:
        generator.generate_batch(["a", "b", "c"])
    if known:
        assert str(caught.value).startswith("4 x 56 tokens")


def texts_of_a_process(address: str, index: str) -> list[str]:
    """Returns the texts that one of two processes on a shared mesh gets; called by `python -c`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    config, weights = small_model("dense")
    mesh = meshes.create(fsdp=jax.device_count())
    weights = meshes.replicate(jax.tree.map(np.asarray, weights), mesh)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=6)
    generator = decode.Generator(config, weights, tokenizer=TOKENIZER, config=settings, mesh=mesh)
    return generator.generate_batch(["a", "import", "a"])


@pytest.mark.slow
def test_every_process_of_a_shared_mesh_gets_all_texts() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = f"import json, sys; from {__name__} import texts_of_a_process as texts;"
    code += " sys.stdout.write(json.dumps(texts(*sys.argv[1:])))"
    command = [sys.executable, "-c", code, address]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen([*command, index], stdout=subprocess.PIPE, text=True, env=environment)
        for index in "01"
    ]
    # The last line: the previous ones are from Gloo.
    outputs = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]

    single_process = small_generator("dense", dataclasses.replace(SAMPLED, max_new_tokens=6))
    assert (
        list(map(json.loads, outputs)) == [single_process.generate_batch(["a", "import", "a"])] * 2
    )


def test_a_seed_determines_the_text() -> None:
    def text(seed: int) -> str:
        generator = small_generator("memory", dataclasses.replace(SAMPLED, seed=seed))
        return "".join(generator.generate("import "))

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_generation_stops_before_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([72, 105, TOKENIZER.end_of_text_id, 33, 34])

    def scripted(_: Any, cache: Any, tokens: Any, positions: Any, *__: Any, **___: Any) -> Any:
        return jnp.array([next(script)], jnp.int32), positions + 1, cache

    monkeypatch.setattr(decode, "decode", scripted)
    generator = small_generator("memory")
    assert list(generator.generate("")) == ["H", "i"]
    # The device was one step ahead of the consumer.
    assert list(script) == [34]


def test_a_tokenizer_larger_than_the_model_is_rejected() -> None:
    class Larger(ByteTokenizer):
        vocab_size = 265

    with pytest.raises(ConfigError, match=r"model\.vocab_size=264.*at least the 265 ids"):
        decode.Generator(*small_model("memory"), tokenizer=Larger(), config=GREEDY)
