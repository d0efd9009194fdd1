"""Generation: prefill of a key-value cache, one token a step for every row, text as it comes.

Two programs do all the work. `prefill` reads the prompts, padded on the right to one length, into a
cache; `decode` takes one step of every row, each at its own position. Neither recompiles while
shapes stay the same: lengths of prompts are padded to powers of two, numbers of rows too.
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

# Prompts are padded to powers of two from here on: one compilation serves all lengths in between.
_SMALLEST_BUCKET = 32
# Experts hold top_k copies of each token that is read.
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
    """Returns a cache for `length` positions, the first of them filled by `tokens`.

    Rows may end in padding: no position sees a later one, and decoding overwrites the padding
    before it is seen. Many long rows are read one group after another, each of at most
    `tokens_at_once` if a row is not longer, so that what is in between does not grow with their
    number; on a mesh all at once, for they are sharded over its devices.
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
    """Takes one step: reads a token of each row and draws the one that follows it.

    A draw is a function of the row's key and its position.

    Args:
      served: the model.
      cache: of the positions before `positions`; its memory is used for the result.
      tokens: at `positions`, the last that is known of each row.
      positions: of the tokens.
      keys: of each row, the same at every step.
      sampling: how ids are drawn.

    Returns:
      The ids that follow, their positions, and the continued cache.
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
    """Returns a key for each row: of the generation, what is continued, and which sample of it."""

    def fold(key: Array, contexts: Array, samples: Array) -> Array:
        fold_in = jax.random.fold_in
        of_row = jax.vmap(lambda context, sample: fold_in(fold_in(key, context), sample))
        return of_row(contexts, samples)

    return sharding.shard_map(fold, key, contexts, samples, out_specs=sharding.spec(contexts))


def occurrences(items: Iterable[Hashable]) -> list[int]:
    """Returns how many equal items come before each."""
    seen = collections.Counter[Hashable]()
    counts = []
    for item in items:
        counts.append(seen[item])
        seen[item] += 1
    return counts


class Generator:
    """Continues prompts, one at a time or many together.

    A prompt is read as the beginning of a document, so end-of-text stands before it as it does in
    training. The text is a function of model, prompt, configuration and the number of the sample,
    and but for rounding not of the batch: equal prompts of a batch get samples 0, 1, 2 and so on,
    and `generate` gives sample 0.
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
          weights: trained, sharded over `mesh` as in training, or on one device.
          tokenizer: of the text.
          config: how ids are drawn, how many, and what ends a text.
          mesh: the devices that the work is sharded over; None: one device does all.

        Raises:
          ConfigError: when the tokenizer has ids that the model lacks.
        """
        if tokenizer.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model_config.vocab_size}: must be at least the"
                f" {tokenizer.vocab_size} ids of the tokenizer"
            )
        if mesh is None:
            # Arrays that were placed on a mesh keep to it; the copy of one device does not.
            weights = jax.tree.map(lambda x: x.addressable_data(0), weights)
        self._mesh, self._tokenizer, self._config = mesh, tokenizer, config
        self._sampling = Sampling.of(config, tokenizer.vocab_size)
        with self._on_mesh():
            self._served = jax.jit(serve, static_argnums=0)(model_config, weights)

    def generate(self, prompt: str) -> Iterator[str]:
        """Yields the continuation of a prompt piece by piece; no piece ends within a character.

        Raises:
          UserError: a prompt that is not Unicode, or too long for the device's memory.
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
        """Yields the ids that continue a prompt: `max_new_tokens`, or those before end-of-text."""
        end_of_text_id = self._tokenizer.end_of_text_id
        known = [end_of_text_id, *prompt.tolist()]
        for tokens in self._steps([known], [0], self._config.max_new_tokens, self._sampling):
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
          prompts: of any lengths; they are padded to the longest. Equal ones get different samples.
          max_new_tokens: at most so many each; None: as configured.
          stop: strings that end a text and are left out; None: as configured.

        Raises:
          ConfigError: `max_new_tokens` below 1, or a stop string that is empty.
          UserError: a prompt that is not Unicode, or more than the device's memory holds.
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
        """Does the same for contexts in ids, taken as they are: of one id or more each.

        Args:
          contexts: what is continued.
          max_new_tokens: at most so many each.
          stop: strings that end a text and are left out.
          sampling: how ids are drawn; None: as configured.
          samples: which sample of its context each is; None: equal contexts count from 0.

        Raises:
          ConfigError: `max_new_tokens` below 1, or a stop string that is empty.
          UserError: more than the device's memory holds.
        """
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be >= 1")
        strings = not isinstance(stop, str) and all(stop)
        require(strings, "stop", stop, "must be strings, none of them empty")
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
        known: Sequence[Sequence[int]],
        samples: Sequence[int],
        count: int,
        sampling: Sampling,
    ) -> Iterator[Int[np.ndarray, "_"]]:
        """Yields `count` times the ids that follow; the device is a step ahead of who reads them.

        Rows beyond those that are known are padding.
        """
        # The last token that is known is the first to decode: prefill needs no logits.
        end_of_text_id = self._tokenizer.end_of_text_id
        lengths = [len(ids) - 1 for ids in known]
        shards = 1 if self._mesh is None else sharding.num_batch_shards(self._mesh.shape)
        num_rows = -(-_power_of_two(len(known)) // shards) * shards
        bucket = padded_length(max(lengths))
        padded = np.full((num_rows, bucket), end_of_text_id, np.int32)
        last = np.full(num_rows, end_of_text_id, np.int32)
        starts = np.zeros(num_rows, np.int32)
        identities, numbers = (np.zeros(num_rows, np.uint32) for _ in range(2))
        for row, (ids, length) in enumerate(zip(known, lengths, strict=True)):
            padded[row, :length], last[row], starts[row] = ids[:-1], ids[-1], length
            identities[row] = zlib.crc32(np.array(ids, "<i4").tobytes())
            numbers[row] = samples[row]

        with _memory_errors(num_rows, bucket + count):
            with self._on_mesh():
                padded, tokens, positions = self._placed((padded, last, starts))
                key = jax.random.key(self._config.seed)
                keys = row_keys(key, *self._placed((identities, numbers)))
                cache = prefill(self._served, padded, length=bucket + count)
            waiting = None
            for _ in range(count):
                with self._on_mesh():
                    tokens, positions, cache = decode(
                        self._served, cache, tokens, positions, keys, sampling=sampling
                    )
                if waiting is not None:
                    yield self._read(waiting)
                waiting = tokens
            if waiting is not None:
                yield self._read(waiting)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _placed[T](self, batch: T) -> T:
        """Shards rows over the devices of the mesh."""
        if self._mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, sharding.batch_sharding(self._mesh))

    def _read(self, rows: Int[Array, " b"]) -> Int[np.ndarray, " b"]:
        """Returns rows, those on other processes too."""
        if self._mesh is None or rows.is_fully_addressable:
            return np.asarray(rows)
        return sharding.gather_to_hosts(self._mesh, rows)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text.

    Raises:
      UserError: a lone surrogate, which bytes of a command line that are not UTF-8 become.
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
    """Raises UserError where a cache of so many rows and positions is more than fits."""
    too_large = UserError(
        f"{num_rows} x {length:,} tokens, prompts and what follows them, do not fit the memory:"
        " shorten the prompts, lower max_new_tokens, or take fewer prompts at once"
    )
    if length > np.iinfo(np.int32).max:  # the type of positions
        raise too_large
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            raise
        raise too_large from error


def padded_length(length: int) -> int:
    """Returns the length that sequences are padded to: few lengths, so that few programs do."""
    return max(_SMALLEST_BUCKET, _power_of_two(length))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
