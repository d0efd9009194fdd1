"""Named workloads of value aggregation, shared by tests and benchmarks."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.value_aggregation.reference import Activation

Ids = Literal["uniform", "zipf", "equal", "ends"]

_HOST_ELEMENTS = 2**24  # larger arrays are drawn on the device


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call; "ci" shapes are tiny, "model" shapes are those of models and benchmarks."""

    name: str
    tag: Literal["ci", "model"]
    num_tokens: int
    num_selected: int
    num_values: int
    value_dim: int
    pre_value_dim: int = 0  # 0: no pre-values
    num_cores: int = 1
    activation: Activation | None = None
    num_slots: int = 1  # 1: no slots
    ids: Ids = "uniform"  # for tests; a benchmark sets them explicitly

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operator that are not arrays."""
        return {"activation": self.activation, "num_slots": self.num_slots}

    def arguments(self, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays, by argument name. `dtype` is that of the tables."""
        selections = (self.num_tokens, self.num_selected)
        arrays: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "values": ((self.num_values, self.value_dim), dtype),
            "indices": (selections, jnp.int32),
            "scores": ((*selections, self.num_cores), jnp.float32),
        }
        if self.pre_value_dim:
            arrays["pre_values"] = ((self.num_values, self.pre_value_dim), dtype)
            arrays["pre_inputs"] = ((self.num_tokens, self.pre_value_dim), jnp.float32)
        if self.num_slots > 1:
            arrays["slots"] = (selections, jnp.int32)
        return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}

    def inputs(
        self, seed: int = 0, ids: Ids | None = None, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Random arrays by argument name: ids as drawn by `draw_ids`, everything else normal.

        Pre-inputs are scaled so that their inner products with pre-values have unit variance.
        """
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for name, array in self.arguments(dtype).items():
            if name == "indices":
                drawn = draw_ids(ids or self.ids, array.shape, self.num_values, rng)
                arrays[name] = jnp.asarray(drawn, array.dtype)
            elif name == "slots":
                drawn = rng.integers(0, self.num_slots, array.shape)
                arrays[name] = jnp.asarray(drawn, array.dtype)
            elif math.prod(array.shape) > _HOST_ELEMENTS:
                key = jax.random.key(rng.integers(2**31))
                draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
                arrays[name] = draw(key, array.shape, array.dtype)
            else:
                drawn = rng.standard_normal(array.shape, np.float32)
                scale = self.pre_value_dim**-0.5 if name == "pre_inputs" else 1.0
                arrays[name] = jnp.asarray(scale * drawn, array.dtype)
        return arrays


def draw_ids(
    kind: Ids, shape: tuple[int, ...], num_values: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws ids of rows: uniform, Zipf-distributed, all equal, or only the first and last row.

    Under "zipf" the k-th most frequent row has a probability of about 1 / (k ln N), and frequent
    rows are spread over the table. A token may draw a row twice, which retrieval never does.
    """
    match kind:
        case "uniform":
            return rng.integers(0, num_values, shape)
        case "zipf":
            # Inverse transform sampling from the CDF ln(k + 1) / ln(N + 1).
            ranks = np.exp(rng.random(shape) * math.log(num_values + 1)).astype(np.int64) - 1
            return rng.permutation(num_values)[np.clip(ranks, 0, num_values - 1)]
        case "equal":
            return np.full(shape, rng.integers(num_values))
        case "ends":
            return rng.choice([0, num_values - 1], shape)


SHAPES = (
    # No size is a multiple of a block size. The number of rows is even because bfloat16 rows may be
    # fetched in pairs. Three cores share 24 lanes, and 264 lanes exceed two registers.
    Shape("ragged", "ci", 19, 5, 22, 24, 16, num_cores=3, activation="silu"),
    Shape("both_ends", "ci", 5, 6, 1030, 40, 16, num_cores=2, ids="ends"),
    Shape("one_token", "ci", 1, 1, 8, 8),
    Shape("wide_rows", "ci", 3, 9, 10, 264, 136, num_cores=2),
    Shape("equal_ids", "ci", 6, 7, 12, 16, 8, num_cores=2, activation="gelu", ids="equal"),
    Shape("slots", "ci", 4, 3, 10, 16, 8, num_cores=2, activation="relu", num_slots=2),
    # UltraMemV2 (arXiv 2508.18756): one head, N = n^2, two cores.
    Shape("227M", "model", 8192, 32, 360**2, 192, 192, num_cores=2),
    Shape("1B", "model", 8192, 128, 528**2, 768, 384, num_cores=2),
    Shape("500M", "model", 8192, 94, 964**2, 216, 72, num_cores=2),
    # The table of values has more than 2^31 elements.
    Shape("120B", "model", 8192, 256, 1696**2, 960, 320, num_cores=2),
    # A fraction of a second on CPU: one table with rows of 384, and the same split into two tables.
    Shape("cpu_384", "model", 2048, 32, 360**2, 384),
    Shape("cpu_192_192", "model", 2048, 32, 360**2, 192, 192, num_cores=2),
)
PAPER = ("227M", "1B", "500M", "120B")
CPU = ("cpu_384", "cpu_192_192")
