"""How likely a model finds given tokens, and whether they are its first choice."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from umv2 import sharding
from umv2.config import ModelConfig
from umv2.model.weights import Weights
from umv2.types import AnyArray, struct


@struct
class ScoringBatch:
    """Sequences of one length, padded on the right, and tokens whose likelihood is wanted.

    `targets` may be what follows the inputs at `places`. Padding is scored like the rest, and is
    for the caller to leave out.
    """

    inputs: Int[AnyArray, "b t"]
    places: Int[AnyArray, "b a"]
    targets: Int[AnyArray, "b a"]

    @classmethod
    def padded(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        *,
        num_rows: int,
        length: int,
        num_targets: int,
        fill: int,
    ) -> "ScoringBatch":
        """Pads (inputs, places, targets) of each row to arrays of the given sizes."""
        inputs = np.full((num_rows, length), fill, np.int32)
        places, targets = (np.zeros((num_rows, num_targets), np.int32) for _ in range(2))
        for row, (tokens, at, wanted) in enumerate(rows):
            inputs[row, : len(tokens)] = tokens
            places[row, : len(at)], targets[row, : len(wanted)] = at, wanted
        return cls(inputs=inputs, places=places, targets=targets)


class Scorer:
    """A model on a mesh that scores tokens."""

    def __init__(self, model_config: ModelConfig, weights: Weights, mesh: Mesh):
        """Takes weights that lie on the mesh."""
        self.model_config, self.mesh = model_config, mesh
        self._weights = weights

    def padded_rows(self, count: int) -> int:
        """Returns the least number of rows, at least `count`, that the mesh can shard."""
        shards = sharding.num_batch_shards(self.mesh.shape)
        return -(-count // shards) * shards

    def score(
        self, batch: ScoringBatch, model_config: ModelConfig | None = None
    ) -> tuple[Bool[np.ndarray, "b a"], Float[np.ndarray, "b a"]]:
        """Returns whether each target is the likeliest token, and its log-probability in nats.

        Args:
          batch: all rows; their number is one that `padded_rows` returns.
          model_config: as the model is to be read, where that differs (positions, window).
        """
        score = _score_function(model_config or self.model_config)
        rows = list(sharding.local_rows(self.mesh, len(batch.inputs)))
        local = jax.tree.map(lambda array: array[rows], batch)
        with jax.set_mesh(self.mesh):
            scores = score(self._weights, sharding.local_to_global(self.mesh, local))
            exact, likelihood = (sharding.gather_to_hosts(self.mesh, x) for x in scores)
        return exact, likelihood


@functools.lru_cache(maxsize=16)
def _score_function(
    model_config: ModelConfig,
) -> Callable[[Weights, ScoringBatch], tuple[Bool[Array, "b a"], Float[Array, "b a"]]]:
    """Returns the compiled (weights, batch) -> (exact, log-probability)."""

    @jax.jit
    def score(
        weights: Weights, ask: ScoringBatch
    ) -> tuple[Bool[Array, "b a"], Float[Array, "b a"]]:
        model = weights.model(model_config)
        output = model(ask.inputs, store=weights.store, logits_at=ask.places)

        def compare(logits: Array, targets: Array) -> tuple[Array, Array]:
            right = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
            likelihood = right - jax.nn.logsumexp(logits, axis=-1)
            return jnp.argmax(logits, axis=-1) == targets, likelihood

        logits, like = sharding.shard_batch_only(output.logits), sharding.spec(ask.targets)
        return sharding.shard_map(compare, logits, ask.targets, out_specs=(like, like))

    return score
