"""Generation: prefill of a key-value cache, one token a step, sampling, text as it arrives."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from umv2.config import ConfigError, GenerateConfig
from umv2.data.tokenizers import Tokenizer
from umv2.model.attention import KeyValueCache
from umv2.model.memory import ValueStore
from umv2.model.transformer import Transformer

# Prompts are padded to powers of two from here on: one compilation serves all lengths in between.
_SMALLEST_BUCKET = 32
# What decoders write for bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def sample(
    logits: Float[Array, "b vocab"],
    key: Key[Array, ""],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    vocab_size: int,
) -> Int[Array, " b"]:
    """Draws an id for each row from softmax(logits / temperature), cut to its likeliest ids.

    First `top_k` ids remain, then the fewest of these whose probabilities, which sum to 1 again,
    reach `top_p` (nucleus sampling, arXiv 1904.09751); ties at a cut go to the lower id.

    Args:
      logits: ids from `vocab_size` on are padding and never drawn.
      key: of the draw; unused where `temperature` is 0.
      temperature: 0 takes the likeliest id, the lower one of equals.
      top_k: 0 for no limit.
      top_p: in (0, 1]; 1 for no limit.
      vocab_size: ids that the tokenizer knows.
    """
    logits = logits[:, :vocab_size]
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    count = min(top_k, vocab_size) if top_k else vocab_size
    ordered, ids = jax.lax.top_k(logits / temperature, count)
    if top_p < 1:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        ordered = jnp.where(likelier < top_p, ordered, -jnp.inf)
    chosen = jax.random.categorical(key, ordered, axis=-1)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="length")
def prefill(
    model: Transformer, store: ValueStore | None, tokens: Int[Array, "b t"], *, length: int
) -> KeyValueCache:
    """Returns a cache for `length` positions, the first of them filled by `tokens`.

    `tokens` may end in padding: no position sees a later one, and decoding overwrites the padding
    before it is seen.
    """
    empty = model.empty_cache(tokens.shape[0], length)
    cache = model(tokens, store=store, cache=empty).cache
    assert cache is not None  # because one was given
    return cache


@functools.partial(
    jax.jit,
    static_argnames=("temperature", "top_k", "top_p", "vocab_size"),
    donate_argnames="cache",
)
def decode(
    model: Transformer,
    store: ValueStore | None,
    cache: KeyValueCache,
    tokens: Int[Array, " b"],
    position: Int[Array, ""] | int,
    key: Key[Array, ""],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    vocab_size: int,
) -> tuple[Int[Array, " b"], KeyValueCache]:
    """Returns the ids that follow `tokens` at `position`, and the continued cache.

    The draw is a function of (key, position); `sample` documents the rest.
    """
    output = model(tokens[:, None], store=store, cache=cache, position=position)
    following = sample(
        output.logits[:, 0],
        jax.random.fold_in(key, position),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=vocab_size,
    )
    assert output.cache is not None  # because one was given
    return following, output.cache


class Generator:
    """Continues prompts, one at a time, on one device.

    A prompt is read as the beginning of a document, so end-of-text stands before it as it does in
    training. The text is a function of model, prompt and configuration. Call it outside a mesh.
    """

    def __init__(
        self,
        model: Transformer,
        store: ValueStore | None,
        *,
        tokenizer: Tokenizer,
        config: GenerateConfig,
    ):
        """Takes a model whose arrays every device holds whole.

        Raises:
          ConfigError: when the tokenizer has ids that the model lacks.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model.config.vocab_size}: must be at least the"
                f" {tokenizer.vocab_size} ids of the tokenizer"
            )
        # Arrays that were placed on a mesh keep to it; the copy of one device does not.
        self._model, self._store = jax.tree.map(lambda x: x.addressable_data(0), (model, store))
        self._tokenizer = tokenizer
        self._config = config

    def generate(self, prompt: str) -> Iterator[str]:
        """Yields the continuation of a prompt piece by piece, each one whole characters."""
        ids = self._tokenizer.encode(prompt)
        return stream_text(self._tokenizer, ids.tolist(), self.generate_ids(ids))

    def generate_ids(self, prompt: Int[np.ndarray, " t"]) -> Iterator[int]:
        """Yields the ids that continue a prompt: `max_new_tokens`, or those before end-of-text."""
        config, end_of_text_id = self._config, self._tokenizer.end_of_text_id
        # The last token of the prompt is the first to decode: prefill needs no logits.
        ids: list[int] = [end_of_text_id, *prompt.tolist()]
        read, last = ids[:-1], ids[-1]
        bucket = max(_SMALLEST_BUCKET, 1 << (len(read) - 1).bit_length())
        padded = np.full((1, bucket), end_of_text_id, np.int32)
        padded[0, : len(read)] = read
        cache = prefill(self._model, self._store, padded, length=bucket + config.max_new_tokens)

        key = jax.random.key(config.seed)
        following = np.full(1, last, np.int32)
        for position in range(len(read), len(read) + config.max_new_tokens):
            following, cache = decode(
                self._model,
                self._store,
                cache,
                following,
                position,
                key,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                vocab_size=self._tokenizer.vocab_size,
            )
            if (token := int(following[0])) == end_of_text_id:
                return
            yield token


def stream_text(tokenizer: Tokenizer, context: list[int], ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids that continue `context`, as soon as its characters are complete.

    A token may end within a character, and a tokenizer may write a token differently at the start
    of a text, so each piece is the difference that its tokens make to those before them.
    """
    settled, pending, text = context, list[int](), ""
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(settled + pending)[len(tokenizer.decode(settled)) :]
        if text and not text.endswith(_REPLACEMENT):
            yield text
            settled, pending, text = pending, [], ""
    if text:
        yield text
