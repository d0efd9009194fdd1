"""Sampling of the next token: temperature, top-k, nucleus."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from umv2.config import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws ids from softmax(logits / temperature), truncated to the most likely ids.

    Keeps the `top_k` most likely ids, renormalizes, then keeps the smallest set of them whose
    probability reaches `top_p` (nucleus sampling, arXiv 1904.09751). Ties go to the lower id.

    Attributes:
      temperature: 0, or a value too small for a float32 division, takes the most likely id.
      top_k: 0 for no limit.
      top_p: in (0, 1]; 1 for no limit.
      vocab_size: number of ids of the tokenizer; larger ids are padding and never drawn.
    """

    temperature: float
    top_k: int
    top_p: float
    vocab_size: int

    @classmethod
    def of(cls, config: GenerateConfig, vocab_size: int) -> "Sampling":
        """Returns the sampling that the configuration describes."""
        return cls(config.temperature, config.top_k, config.top_p, vocab_size)

    @property
    def greedy(self) -> bool:
        """Whether the most likely id is taken, without using a key."""
        return self.temperature < float(np.finfo(np.float32).tiny)

    def draw(self, logits: Float[Array, "b vocab"], keys: Key[Array, " b"]) -> Int[Array, " b"]:
        """Draws an id for each row with the key of that row; keys are unused if greedy."""
        logits = logits[:, : self.vocab_size]
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.vmap(jax.random.categorical)
        # Shift the maximum to 0: then a small temperature makes the others -inf, but none nan.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if not self.top_k and self.top_p == 1:  # no need to sort
            return draw(keys, logits).astype(jnp.int32)
        count = min(self.top_k, self.vocab_size) if self.top_k else self.vocab_size
        ordered, ids = jax.lax.top_k(logits, count)
        if self.top_p < 1:
            probabilities = jax.nn.softmax(ordered, axis=-1)
            preceding = jnp.cumsum(probabilities, axis=-1) - probabilities
            ordered = jnp.where(preceding < self.top_p, ordered, -jnp.inf)
        ranks = draw(keys, ordered)
        return jnp.take_along_axis(ids, ranks[:, None], axis=-1)[:, 0].astype(jnp.int32)
