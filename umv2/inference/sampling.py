"""Which token follows: temperature, top-k, nucleus."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from umv2.config import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ids are drawn from softmax(logits / temperature), cut to the likeliest ids.

    First `top_k` ids remain, then the fewest of these whose probabilities, which sum to 1 again,
    reach `top_p` (nucleus sampling, arXiv 1904.09751); ties at a cut go to the lower id.

    Attributes:
      temperature: 0, and what float32 cannot divide by, takes the likeliest id, the lower one of
        equals.
      top_k: 0 for no limit.
      top_p: in (0, 1]; 1 for no limit.
      vocab_size: ids that the tokenizer knows; those from here on are padding and never drawn.
    """

    temperature: float
    top_k: int
    top_p: float
    vocab_size: int

    @classmethod
    def of(cls, config: GenerateConfig, vocab_size: int) -> "Sampling":
        """Reads the configuration."""
        return cls(config.temperature, config.top_k, config.top_p, vocab_size)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest id is taken, and no key is used."""
        return self.temperature < float(np.finfo(np.float32).tiny)

    def draw(self, logits: Float[Array, "b vocab"], keys: Key[Array, " b"]) -> Int[Array, " b"]:
        """Draws an id for each row, with a key of its own; keys are unused where greedy."""
        logits = logits[:, : self.vocab_size]
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.vmap(jax.random.categorical)
        # The greatest becomes 0, so that a small temperature makes the others -inf, and none nan.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if not self.top_k and self.top_p == 1:  # nothing to sort for
            return draw(keys, logits).astype(jnp.int32)
        count = min(self.top_k, self.vocab_size) if self.top_k else self.vocab_size
        ordered, ids = jax.lax.top_k(logits, count)
        if self.top_p < 1:
            probabilities = jax.nn.softmax(ordered, axis=-1)
            likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
            ordered = jnp.where(likelier < self.top_p, ordered, -jnp.inf)
        chosen = draw(keys, ordered)
        return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
