"""Held-out metrics against numbers computed by hand, and on one device against eight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests import meshes
from tests.model.drawn import drawn_weights
from umv2.config import ModelConfig, from_config_dict
from umv2.data.corpus import Corpus, Identity
from umv2.data.documents import InMemoryDocuments
from umv2.data.tokenizers import ByteTokenizer
from umv2.model.weights import Weights
from umv2.training import held_out as held_out_module
from umv2.training.held_out import HeldOut, evaluate_corpus, make_evaluation_step
from umv2.types import Batch

VOCABULARY = 16
LENGTH = 12


@functools.cache
def model_parts() -> tuple[ModelConfig, Weights]:
    """Two blocks with an untied head."""
    config = base.get_config()
    config.model.update(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, num_key_value_heads=2
    )
    config.model.update(ffn_size=16, tie_embeddings=False, compute_dtype="float32")
    config.model.memory.update(num_keys=4, key_dim=4, top_m=2, shortlist=2, value_dim=6)
    config.model.memory.update(pre_value_dim=2)
    model_config = from_config_dict(config).model
    return model_config, drawn_weights(model_config)


def batch_of(rows: int, seed: int = 0, padding_rows: int = 0) -> Batch:
    """Random tokens in two documents per row; the last rows are padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    counted = np.ones((rows, LENGTH), np.float32)
    counted[rows - padding_rows :] = 0
    segments = np.tile((np.arange(LENGTH) >= 5).astype(np.int32), (rows, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, counted)


def evaluate(
    batches: list[Batch], *, replicas: int = 1, mask: bool = True, head_scale: float = 1.0
) -> HeldOut:
    config, drawn = model_parts()
    params = drawn.params | {"head": drawn.params["head"] * head_scale}
    mesh = meshes.create(replica=replicas)
    step = make_evaluation_step(config, mask_across_documents=mask)
    scaled = meshes.replicate(dataclasses.replace(drawn, params=params), mesh)
    return held_out_module.evaluate(
        functools.partial(step, scaled), batches, mesh=mesh, num_bytes=None
    )


@pytest.mark.slow
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    held_out = evaluate([batch_of(4), batch_of(4, seed=1)], head_scale=0.0)
    assert held_out.loss_nats_per_token == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert held_out.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert held_out.num_tokens == 2 * 4 * LENGTH
    assert evaluate([batch_of(4)]).perplexity != pytest.approx(VOCABULARY, rel=1e-3)


def test_bits_per_byte_by_hand() -> None:
    # Two batches, 3 + 1 tokens, 6 + 2 nats; 4 bytes.
    sums = iter([(jnp.float32(6.0), jnp.float32(3.0)), (jnp.float32(2.0), jnp.float32(1.0))])
    mesh = meshes.create(replica=1)
    held_out = held_out_module.evaluate(
        lambda batch: next(sums), [batch_of(1), batch_of(1)], mesh=mesh, num_bytes=4
    )
    # e^2 = 7.389..., 8 / ln 2 / 4 = 2.885...
    expected = (2.0, 7.38905609893065, 2.8853900817779268, 4, 4)
    assert dataclasses.astuple(held_out) == pytest.approx(expected, rel=1e-12)
    assert str(held_out) == "loss 2.0000 nats per token, perplexity 7.389, 2.8854 bits per byte"
    assert held_out.metrics().keys() == {
        "held_out_loss",
        "held_out_perplexity",
        "held_out_bits_per_byte",
    }


def test_without_bytes_there_is_no_bits_per_byte() -> None:
    held_out = evaluate([batch_of(2)])
    assert held_out.bits_per_byte is None
    assert held_out.metrics().keys() == {"held_out_loss", "held_out_perplexity"}


def test_batches_add_up_in_float64() -> None:
    # In float32, 2^24 + 1 = 2^24.
    sums = iter(jnp.float32([2.0**24, 1.0, 1.0]))
    mesh = meshes.create(replica=1)
    held_out = held_out_module.evaluate(
        lambda batch: (jnp.float32(0.0), next(sums)),
        [batch_of(1)] * 3,
        mesh=mesh,
        num_bytes=None,
    )
    assert held_out.num_tokens == 2**24 + 2


def test_padding_rows_do_not_count() -> None:
    batch, padded = batch_of(2), batch_of(4, padding_rows=2)
    np.testing.assert_array_equal(batch.inputs, padded.inputs[:2])
    expected, actual = evaluate([batch]), evaluate([padded])
    assert actual.num_tokens == expected.num_tokens == 2 * LENGTH
    assert actual.loss_nats_per_token == pytest.approx(expected.loss_nats_per_token, rel=1e-6)
    unpadded = evaluate([batch_of(4)])
    assert unpadded.loss_nats_per_token != pytest.approx(expected.loss_nats_per_token, rel=1e-4)


def test_documents_are_masked_if_configured() -> None:
    masked, unmasked = evaluate([batch_of(4)]), evaluate([batch_of(4)], mask=False)
    assert masked.loss_nats_per_token != pytest.approx(unmasked.loss_nats_per_token, rel=1e-5)
    single = dataclasses.replace(batch_of(4), segment_ids=np.zeros((4, LENGTH), np.int32))
    assert evaluate([single]) == evaluate([single], mask=False)


@pytest.mark.slow
def test_one_device_and_eight_give_the_same_number() -> None:
    assert jax.device_count() == 8
    batches = [batch_of(8), batch_of(8, seed=1, padding_rows=3)]
    one, eight = evaluate(batches), evaluate(batches, replicas=8)
    assert one.num_tokens == eight.num_tokens == 13 * LENGTH
    assert eight.loss_nats_per_token == pytest.approx(one.loss_nats_per_token, rel=1e-6)
    assert evaluate(batches, replicas=8) == eight


def test_every_held_out_byte_counts_once() -> None:
    config = base.get_config()
    config.data.sequence_length = 3
    config.evaluation.batch_size = 2
    tokens = np.frombuffer(b"abcde", np.uint8)
    documents = InMemoryDocuments(tokens, np.array([3, 2]), np.zeros(2, np.uint64))
    end = ByteTokenizer.end_of_text_id
    identity = Identity(tokenizer="bytes", documents="", held_out="", description={})
    corpus = Corpus(documents, documents, end, ByteTokenizer(), (b"abc", b"de"), identity)

    def one_bit_a_token(batch: Batch) -> tuple[jax.Array, jax.Array]:
        weight = jnp.sum(batch.weights)
        return weight * math.log(2), weight

    held_out = evaluate_corpus(
        one_bit_a_token,
        corpus,
        from_config_dict(config),
        mesh=meshes.create(replica=2),
    )
    # Five bytes and an end-of-text per document, for two documents.
    assert (held_out.num_tokens, held_out.num_bytes) == (7, 5)
    assert held_out.bits_per_byte == pytest.approx(7 / 5)
