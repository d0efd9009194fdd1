"""Loss, perplexity and bits per byte on held-out text."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from umv2 import sharding
from umv2.config import Config, ModelConfig
from umv2.data.corpus import Corpus
from umv2.data.loader import held_out_batches
from umv2.model.weights import Weights
from umv2.training import losses
from umv2.training.progress import show_progress
from umv2.types import Batch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The loss on a text; fields in bytes are None if the number of bytes is unknown."""

    loss_nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None

    def metrics(self) -> dict[str, float]:
        """Returns the metrics under the names by which they are logged."""
        metrics = {
            "held_out_loss": self.loss_nats_per_token,
            "held_out_perplexity": self.perplexity,
            "held_out_bits_per_byte": self.bits_per_byte,
        }
        return {name: value for name, value in metrics.items() if value is not None}

    def __str__(self) -> str:
        text = f"loss {self.loss_nats_per_token:.4f} nats per token"
        text += f", perplexity {self.perplexity:.3f}"
        if self.bits_per_byte is not None:
            text += f", {self.bits_per_byte:.4f} bits per byte"
        return text


def make_evaluation_step(
    config: ModelConfig, *, mask_across_documents: bool
) -> Callable[[Weights, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Returns the jitted function (weights, batch) -> (nats, weight).

    Both results are sums over the tokens of the global batch, replicated on every process.
    """

    @jax.jit
    def evaluation_step(
        weights: Weights, batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        model = weights.model(config)
        segment_ids = batch.segment_ids if mask_across_documents else None
        x = model.hidden(batch.inputs, store=weights.store, segment_ids=segment_ids).x
        nats, _ = losses.cross_entropy(x, model.output_embedding, batch.targets, batch.weights)
        return nats, jnp.sum(batch.weights)

    return evaluation_step


def evaluate(
    evaluation_step: Callable[[Batch], tuple[Float[Array, ""], Float[Array, ""]]],
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
    num_bytes: int | None,
) -> HeldOut:
    """Evaluates one pass over a text, summing over batches in float64.

    Args:
      evaluation_step: the function of `make_evaluation_step`, with the weights bound.
      batches: the `sharding.local_rows` of each batch, all of the same shape, padded with rows of
        weight 0.
      mesh: mesh over which batches are sharded.
      num_bytes: number of UTF-8 bytes of the text, each of whose tokens must be a target with
        weight 1 once; None if unknown.
    """
    total_nats = total_weight = 0.0
    with jax.set_mesh(mesh):
        for batch in batches:
            nats, weight = evaluation_step(sharding.local_to_global(mesh, batch))
            total_nats += float(nats)
            total_weight += float(weight)
    loss = total_nats / total_weight
    return HeldOut(
        loss_nats_per_token=loss,
        perplexity=float(np.exp(loss)),  # math.exp would raise OverflowError after divergence
        bits_per_byte=total_nats / (math.log(2) * num_bytes) if num_bytes else None,
        num_tokens=round(total_weight),
        num_bytes=num_bytes,
    )


def evaluate_corpus(
    evaluation_step: Callable[[Batch], tuple[Float[Array, ""], Float[Array, ""]]],
    corpus: Corpus,
    config: Config,
    *,
    mesh: Mesh,
) -> HeldOut:
    """Evaluates one pass over the held-out documents of a corpus, with a progress bar.

    The end-of-text token after each document is predicted too, but counts no bytes.
    """
    batch_size = config.evaluation.batch_size
    rows = sharding.local_rows(mesh, batch_size)
    batches = held_out_batches(corpus, config.data, batch_size=batch_size, rows=rows)
    with (
        contextlib.closing(batches),
        show_progress("evaluating", batches.num_batches, "batches") as advance,
    ):

        def step(batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
            sums = evaluation_step(batch)
            advance()
            return sums

        return evaluate(step, batches, mesh=mesh, num_bytes=corpus.held_out_bytes)
