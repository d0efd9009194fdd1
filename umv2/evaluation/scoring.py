"""Log-probabilities that a model assigns to given tokens, and whether they are its argmax."""

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
    """Right-padded sequences, and the target tokens to score.

    `targets[:, i]` is scored as the token that follows the input at `positions[:, i]`. Padding is
    scored too; the caller discards it.
    """

    inputs: Int[AnyArray, "b t"]
    positions: Int[AnyArray, "b a"]
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
        """Pads the (inputs, positions, targets) of each row to arrays of the given sizes."""
        inputs = np.full((num_rows, length), fill, np.int32)
        positions, targets = (np.zeros((num_rows, num_targets), np.int32) for _ in range(2))
        for row, (row_inputs, row_positions, row_targets) in enumerate(rows):
            inputs[row, : len(row_inputs)] = row_inputs
            positions[row, : len(row_positions)] = row_positions
            targets[row, : len(row_targets)] = row_targets
        return cls(inputs=inputs, positions=positions, targets=targets)


class Scorer:
    """Scores tokens with a model on a mesh."""

    def __init__(self, model_config: ModelConfig, weights: Weights, mesh: Mesh):
        """Takes weights that are sharded over the mesh."""
        self.model_config, self.mesh = model_config, mesh
        self._weights = weights

    def padded_rows(self, count: int) -> int:
        """Rounds up a number of rows to one that the mesh can shard."""
        shards = sharding.num_batch_shards(self.mesh.shape)
        return -(-count // shards) * shards

    def score(
        self, batch: ScoringBatch, model_config: ModelConfig | None = None
    ) -> tuple[Bool[np.ndarray, "b a"], Float[np.ndarray, "b a"]]:
        """Returns whether each target is the most likely token, and its log-probability in nats.

        Args:
          batch: all rows; `padded_rows` gives valid numbers of rows.
          model_config: overrides the configuration of the model (e.g. RoPE scaling, window).
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
    """Returns the compiled function (weights, batch) -> (exact, log-probability)."""

    @jax.jit
    def score(
        weights: Weights, batch: ScoringBatch
    ) -> tuple[Bool[Array, "b a"], Float[Array, "b a"]]:
        model = weights.model(model_config)
        output = model(batch.inputs, store=weights.store, logits_at=batch.positions)

        def compare(logits: Array, targets: Array) -> tuple[Array, Array]:
            target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
            likelihood = target_logits - jax.nn.logsumexp(logits, axis=-1)
            return jnp.argmax(logits, axis=-1) == targets, likelihood

        logits, spec = sharding.shard_batch_only(output.logits), sharding.spec(batch.targets)
        return sharding.shard_map(compare, logits, batch.targets, out_specs=(spec, spec))

    return score
