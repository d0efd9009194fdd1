"""Generation: prefill a key-value cache, decode one token per step and row, stream the text.

Two compiled programs do all the work. `prefill` reads right-padded prompts into a cache; `decode`
takes one step for every row, each at its own position. To limit recompilation, prompt lengths and
numbers of rows are padded to powers of two.
"""

import collections
import contextlib
import functools
import re
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt32

from umv2 import sharding
from umv2.config import ConfigError, GenerateConfig, ModelConfig
from umv2.config.schema import UserError, require
from umv2.data.tokenizers import Tokenizer
from umv2.inference.sampling import Sampling
from umv2.inference.serving import ServedModel, serve
from umv2.inference.streaming import TextStream
from umv2.model.attention import KeyValueCache
from umv2.model.weights import Weights

# Prompts are padded to this length or a larger power of two, with one compilation each.
_SMALLEST_BUCKET = 32
# Bounds the memory of prefill: experts hold top_k copies of each token.
_TOKENS_AT_ONCE = 1 << 13

Cache = tuple[KeyValueCache, ...]


@functools.partial(jax.jit, static_argnames=("length", "tokens_at_once"))
def prefill(
    served: ServedModel,
    tokens: Int[Array, "b t"],
    *,
    length: int,
    tokens_at_once: int = _TOKENS_AT_ONCE,
) -> Cache:
    """Returns a cache for `length` positions, of which `tokens` fill the first ones.

    Rows may end in padding: attention is causal, and decoding overwrites the padding before it is
    read. Rows are processed in groups of at most `tokens_at_once` tokens, but at least one row, so
    that activations do not grow with the number of rows. On a mesh, all rows are processed
    together, sharded over the devices.
    """
    model, store = served.parts()

    def read(tokens: Int[Array, "_ t"]) -> Cache:
        empty = model.empty_cache(tokens.shape[0], length)
        cache = model(tokens, store=store, cache=empty, prefill=True).cache
        assert cache is not None  # because one was given
        return cache

    num_rows = tokens.shape[0]
    most = max(1, tokens_at_once // tokens.shape[1])
    if num_rows <= most or sharding.on_mesh():
        return read(tokens)
    rows = max(number for number in range(1, most + 1) if num_rows % number == 0)
    groups = jax.lax.map(read, tokens.reshape(-1, rows, tokens.shape[1]))
    return jax.tree.map(lambda array: array.reshape(num_rows, *array.shape[2:]), groups)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def decode(
    served: ServedModel,
    cache: Cache,
    tokens: Int[Array, " b"],
    positions: Int[Array, " b"],
    keys: Key[Array, " b"],
    *,
    sampling: Sampling,
) -> tuple[Int[Array, " b"], Int[Array, " b"], Cache]:
    """Takes one decode step: reads one token per row and draws the next one.

    A draw is a function of the row's key and position.

    Args:
      served: the model.
      cache: of the positions before `positions`; donated.
      tokens: the last known token of each row.
      positions: of `tokens`.
      keys: one per row, the same at every step.
      sampling: how ids are drawn.

    Returns:
      The next ids, their positions, and the updated cache.
    """
    model, store = served.parts()
    output = model(tokens[:, None], store=store, cache=cache, position=positions)
    assert output.cache is not None  # because one was given
    logits = sharding.shard_batch_only(output.logits[:, 0])

    def draw(logits: Array, positions: Array, keys: Array) -> Array:
        return sampling.draw(logits, jax.vmap(jax.random.fold_in)(keys, positions))

    following = sharding.shard_map(
        draw, logits, positions, keys, out_specs=sharding.spec(positions)
    )
    return following, positions + 1, output.cache


@jax.jit
def row_keys(
    key: Key[Array, ""], contexts: UInt32[Array, " b"], samples: UInt32[Array, " b"]
) -> Key[Array, " b"]:
    """Folds a hash of each row's context and its sample index into the key."""

    def fold(key: Array, contexts: Array, samples: Array) -> Array:
        fold_in = jax.random.fold_in
        of_row = jax.vmap(lambda context, sample: fold_in(fold_in(key, context), sample))
        return of_row(contexts, samples)

    return sharding.shard_map(fold, key, contexts, samples, out_specs=sharding.spec(contexts))


def occurrences(items: Iterable[Hashable]) -> list[int]:
    """Returns the number of equal items before each item."""
    seen = collections.Counter[Hashable]()
    counts = []
    for item in items:
        counts.append(seen[item])
        seen[item] += 1
    return counts


class Generator:
    """Continues prompts, one at a time or in batches.

    A prompt is the start of a document, so end-of-text precedes it as in training. The text is a
    function of the model, the prompt, the configuration and the sample index. Up to rounding, it
    does not depend on the batch: equal prompts in a batch get samples 0, 1, 2, ..., and `generate`
    returns sample 0.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        weights: Weights,
        *,
        tokenizer: Tokenizer,
        config: GenerateConfig,
        mesh: Mesh | None = None,
    ):
        """Lays the model out for inference.

        Args:
          model_config: of the model.
          weights: sharded over `mesh` as in training, or on one device.
          tokenizer: of the text.
          config: sampling, number of new tokens, and stop strings.
          mesh: shards the work over its devices; None: uses one device.

        Raises:
          ConfigError: the tokenizer has more ids than the model.
        """
        if tokenizer.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model_config.vocab_size}: must be at least the"
                f" {tokenizer.vocab_size} ids of the tokenizer"
            )
        if mesh is None:
            # Take the copy of one device: arrays on a mesh would stay on the mesh.
            weights = jax.tree.map(lambda x: x.addressable_data(0), weights)
        self._mesh, self._tokenizer, self._config = mesh, tokenizer, config
        self._sampling = Sampling.of(config, tokenizer.vocab_size)
        with self._on_mesh():
            self._served = jax.jit(serve, static_argnums=0)(model_config, weights)

    def generate(self, prompt: str) -> Iterator[str]:
        """Yields the continuation of a prompt in pieces; no piece ends inside a character.

        Raises:
          UserError: the prompt is not valid Unicode, or too long for the device's memory.
        """
        ids = encode(self._tokenizer, prompt)
        stream = TextStream(self._tokenizer, ids, self._config.stop)
        for token in self.generate_ids(np.array(ids, np.int32)):
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                return
        if rest := stream.finish():
            yield rest

    def generate_ids(self, prompt: Int[np.ndarray, " t"]) -> Iterator[int]:
        """Yields the ids that follow a prompt: `max_new_tokens`, or fewer up to end-of-text."""
        end_of_text_id = self._tokenizer.end_of_text_id
        context = [end_of_text_id, *prompt.tolist()]
        for tokens in self._steps([context], [0], self._config.max_new_tokens, self._sampling):
            if (token := int(tokens[0])) == end_of_text_id:
                return
            yield token

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> list[str]:
        """Returns the continuation of every prompt, up to end-of-text or a stop string.

        Args:
          prompts: of any lengths; padded to the longest. Equal prompts get different samples.
          max_new_tokens: limit per prompt; None: as configured.
          stop: strings that end a text and are not part of it; None: as configured.

        Raises:
          ConfigError: `max_new_tokens` is below 1, or a stop string is empty.
          UserError: a prompt is not valid Unicode, or the batch does not fit in memory.
        """
        end_of_text_id = self._tokenizer.end_of_text_id
        return self.complete(
            [[end_of_text_id, *encode(self._tokenizer, prompt)] for prompt in prompts],
            max_new_tokens=self._config.max_new_tokens
            if max_new_tokens is None
            else max_new_tokens,
            stop=self._config.stop if stop is None else stop,
        )

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        sampling: Sampling | None = None,
        samples: Sequence[int] | None = None,
    ) -> list[str]:
        """Like `generate_batch`, for contexts in ids, which are not preceded by end-of-text.

        Args:
          contexts: to continue; at least one id each.
          max_new_tokens: limit per context.
          stop: strings that end a text and are not part of it.
          sampling: how ids are drawn; None: as configured.
          samples: sample index of each context; None: equal contexts count from 0.

        Raises:
          ConfigError: `max_new_tokens` is below 1, or a stop string is empty.
          UserError: the batch does not fit in memory.
        """
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be >= 1")
        valid = not isinstance(stop, str) and all(stop)
        require(valid, "stop", stop, "must be strings, none of them empty")
        if not contexts:
            return []
        samples = occurrences(map(tuple, contexts)) if samples is None else samples
        streams = [TextStream(self._tokenizer, ids, stop) for ids in contexts]
        texts = [""] * len(contexts)
        running = set(range(len(contexts)))
        for tokens in self._steps(contexts, samples, max_new_tokens, sampling or self._sampling):
            for row in tuple(running):
                if (token := int(tokens[row])) == self._tokenizer.end_of_text_id:
                    running.discard(row)
                    continue
                texts[row] += streams[row].push(token)
                if streams[row].stopped:
                    running.discard(row)
            if not running:
                break
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]

    def _steps(
        self,
        contexts: Sequence[Sequence[int]],
        samples: Sequence[int],
        count: int,
        sampling: Sampling,
    ) -> Iterator[Int[np.ndarray, "_"]]:
        """Yields the next id of every row, `count` times; the device runs one step ahead.

        Rows beyond those of `contexts` are padding.
        """
        # `decode` reads the last token of each context, so `prefill` needs no logits.
        end_of_text_id = self._tokenizer.end_of_text_id
        lengths = [len(ids) - 1 for ids in contexts]
        shards = 1 if self._mesh is None else sharding.num_batch_shards(self._mesh.shape)
        num_rows = -(-_power_of_two(len(contexts)) // shards) * shards
        bucket = padded_length(max(lengths))
        padded = np.full((num_rows, bucket), end_of_text_id, np.int32)
        last = np.full(num_rows, end_of_text_id, np.int32)
        starts = np.zeros(num_rows, np.int32)
        context_hashes, sample_indices = (np.zeros(num_rows, np.uint32) for _ in range(2))
        for row, (ids, length) in enumerate(zip(contexts, lengths, strict=True)):
            padded[row, :length], last[row], starts[row] = ids[:-1], ids[-1], length
            context_hashes[row] = zlib.crc32(np.array(ids, "<i4").tobytes())
            sample_indices[row] = samples[row]

        with _memory_errors(num_rows, bucket + count):
            with self._on_mesh():
                padded, tokens, positions = self._sharded((padded, last, starts))
                key = jax.random.key(self._config.seed)
                keys = row_keys(key, *self._sharded((context_hashes, sample_indices)))
                cache = prefill(self._served, padded, length=bucket + count)
            pending = None
            for _ in range(count):
                with self._on_mesh():
                    tokens, positions, cache = decode(
                        self._served, cache, tokens, positions, keys, sampling=sampling
                    )
                if pending is not None:
                    yield self._read(pending)
                pending = tokens
            if pending is not None:
                yield self._read(pending)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _sharded[T](self, batch: T) -> T:
        """Shards rows over the devices of the mesh."""
        if self._mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, sharding.batch_sharding(self._mesh))

    def _read(self, rows: Int[Array, " b"]) -> Int[np.ndarray, " b"]:
        """Returns all rows on the host, including those of other processes."""
        if self._mesh is None or rows.is_fully_addressable:
            return np.asarray(rows)
        return sharding.gather_to_hosts(self._mesh, rows)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text.

    Raises:
      UserError: the text has a lone surrogate, as non-UTF-8 bytes on a command line produce.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise UserError(
            f"the text {around!r}: character {error.start} is a lone surrogate; text must be UTF-8"
        ) from error
    return tokenizer.encode(text).tolist()


@contextlib.contextmanager
def _memory_errors(num_rows: int, length: int) -> Iterator[None]:
    """Raises UserError if a cache of `num_rows` x `length` does not fit in memory."""
    too_large = UserError(
        f"{num_rows} x {length:,} tokens, prompts and new tokens, do not fit in memory: shorten the"
        " prompts, lower max_new_tokens, or use fewer prompts at once"
    )
    if length > np.iinfo(np.int32).max:  # the dtype of positions
        raise too_large
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            raise
        raise too_large from error


def padded_length(length: int) -> int:
    """Returns the length that sequences are padded to: a power of two, so few programs suffice."""
    return max(_SMALLEST_BUCKET, _power_of_two(length))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
