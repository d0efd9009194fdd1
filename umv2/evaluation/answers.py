"""How likely a model finds given tokens, and whether they are its first choice."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from umv2 import sharding
from umv2.config import ModelConfig
from umv2.model.memory.store import ValueStore
from umv2.training.state import merge_model, model_structure
from umv2.types import AnyArray, struct


@struct
class Questions:
    """Sequences of one length, padded on the right, and tokens that are asked for.

    `targets` may be what follows the inputs at `places`. What fills a row up is answered like the
    rest, and is for the caller to leave out.
    """

    inputs: Int[AnyArray, "b t"]
    places: Int[AnyArray, "b a"]
    targets: Int[AnyArray, "b a"]

    @classmethod
    def lined_up(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        *,
        num_rows: int,
        length: int,
        num_targets: int,
        fill: int,
    ) -> "Questions":
        """Pads (inputs, places, targets) of each row to arrays of the given sizes."""
        inputs = np.full((num_rows, length), fill, np.int32)
        places, targets = (np.zeros((num_rows, num_targets), np.int32) for _ in range(2))
        for row, (tokens, at, wanted) in enumerate(rows):
            inputs[row, : len(tokens)] = tokens
            places[row, : len(at)], targets[row, : len(wanted)] = at, wanted
        return cls(inputs=inputs, places=places, targets=targets)


class Respondent:
    """A model on a mesh that answers questions."""

    def __init__(
        self,
        model_config: ModelConfig,
        params: dict[str, Any],
        buffers: dict[str, Any],
        store: ValueStore | None,
        mesh: Mesh,
    ):
        """Takes arrays that lie on the mesh."""
        self.model_config, self.mesh = model_config, mesh
        self._arrays = (params, buffers, store)

    def rows_that_divide(self, count: int) -> int:
        """Returns the least number of rows, at least `count`, that the mesh divides."""
        shares = sharding.num_batch_shards(self.mesh.shape)
        return -(-count // shares) * shares

    def answer(
        self, questions: Questions, model_config: ModelConfig | None = None
    ) -> tuple[Bool[np.ndarray, "b a"], Float[np.ndarray, "b a"]]:
        """Returns whether each target is the likeliest token, and its log-probability in nats.

        Args:
          questions: all rows; their number is one that `rows_that_divide` returns.
          model_config: as the model is to be read, where that differs (positions, window).
        """
        answer = _answer_function(model_config or self.model_config)
        rows = list(sharding.local_rows(self.mesh, len(questions.inputs)))
        local = jax.tree.map(lambda array: array[rows], questions)
        with jax.set_mesh(self.mesh):
            answers = answer(*self._arrays, sharding.local_to_global(self.mesh, local))
            exact, likelihood = (sharding.gather_to_hosts(self.mesh, x) for x in answers)
        return exact, likelihood


@functools.lru_cache(maxsize=16)
def _answer_function(
    model_config: ModelConfig,
) -> Callable[..., tuple[Bool[Array, "b a"], Float[Array, "b a"]]]:
    """Returns the compiled (params, buffers, store, questions) -> (exact, log-probability)."""
    graphdef = model_structure(model_config)

    @jax.jit
    def answer(
        params: dict[str, Any], buffers: dict[str, Any], store: ValueStore | None, ask: Questions
    ) -> tuple[Bool[Array, "b a"], Float[Array, "b a"]]:
        model = merge_model(graphdef, params, buffers)
        output = model(ask.inputs, store=store, logits_at=ask.places)

        def compare(logits: Array, targets: Array) -> tuple[Array, Array]:
            right = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
            likelihood = right - jax.nn.logsumexp(logits, axis=-1)
            return jnp.argmax(logits, axis=-1) == targets, likelihood

        logits, like = sharding.shard_batch_only(output.logits), sharding.spec(ask.targets)
        return sharding.shard_map(compare, logits, ask.targets, out_specs=(like, like))

    return answer
