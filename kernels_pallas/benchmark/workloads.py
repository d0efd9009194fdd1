"""The workloads of the benchmark: an operator at a shape, with its minimum bytes and FLOPs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.benchmark import plain
from kernels_pallas.product_key_top_k import api as top_k_api
from kernels_pallas.product_key_top_k import shapes as top_k_shapes
from kernels_pallas.value_aggregation import api as aggregation_api
from kernels_pallas.value_aggregation import shapes as aggregation_shapes

Pass = Literal["forward", "backward", "both"]
PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the package, its naive implementation, its shapes and its costs.

    Attributes:
        name: as in the package.
        function: the operator; takes arrays and options by name.
        plain: its naive implementation.
        backends: its implementations, by name.
        shapes: all named shapes.
        paper: names of the shapes that run by default on an accelerator.
        cpu: names of the shapes that run by default on CPU.
        differentiable: arguments that have a gradient.
        cost: maps a shape and an item size to (bytes, FLOPs) by pass.
    """

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    backends: Mapping[str, Any]
    shapes: tuple[Any, ...]
    paper: tuple[str, ...]
    cpu: tuple[str, ...]
    differentiable: tuple[str, ...]
    cost: Callable[[Any, int], dict[str, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """An operator at one shape, dtype and distribution of ids (None if it takes no ids)."""

    operator: Operator
    shape: Any
    dtype: str
    ids: str | None = None

    def inputs(self) -> dict[str, Any]:
        """Random arrays, by argument name."""
        chosen = {} if self.ids is None else {"ids": self.ids}
        return self.shape.inputs(dtype=jnp.dtype(self.dtype), **chosen)

    def call(self, implementation: str) -> Callable[[dict[str, Any]], Any]:
        """The operator as a function of its arrays: the naive form, or an implementation."""
        if implementation == PLAIN:
            return lambda arrays: self.operator.plain(**arrays, **self.shape.options)
        return lambda arrays: self.operator.function(
            **arrays, **self.shape.options, implementation=implementation
        )

    def split(self, arrays: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        """Splits arrays into those to differentiate with respect to, and the others."""
        names = self.operator.differentiable
        chosen = {n: x for n, x in arrays.items() if n in names and x is not None}
        return chosen, {n: x for n, x in arrays.items() if n not in chosen}

    def cost(self, pass_name: Pass) -> tuple[int, int]:
        """Minimum bytes moved, and FLOPs, by formula."""
        costs = self.operator.cost(self.shape, jnp.dtype(self.dtype).itemsize)
        forward, backward = costs["forward"], costs["backward"]
        if pass_name == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return costs[pass_name]

    def describe(self) -> dict[str, Any]:
        """The fields that identify the workload in a record."""
        sizes = dataclasses.asdict(self.shape)
        if self.ids is not None:
            sizes["ids"] = self.ids
        return {"operator": self.operator.name, "dtype": self.dtype, "shape": sizes}


def differentiated(
    call: Callable[[dict[str, Any]], Any], others: dict[str, Any]
) -> Callable[[dict[str, Array]], tuple[Array, Any]]:
    """The floating-point result of a call, as a function of its differentiable arguments.

    Selections are returned as an auxiliary result, so that they are computed too.
    """

    def function(chosen: dict[str, Array]) -> tuple[Array, Any]:
        result = call(chosen | others)
        return result if isinstance(result, tuple) else (result, None)

    return function


def aggregation_cost(shape: aggregation_shapes.Shape, itemsize: int) -> dict[str, tuple[int, int]]:
    """(Bytes, FLOPs) of value aggregation by pass.

    Bytes: every selection fetches its rows once in each pass; ids, scores, pre-inputs, outputs and
    their gradients, 4 bytes each, move once; the dense gradients of the tables are written once.
    Caches may hold frequent rows, so with non-uniform ids the bandwidth can exceed that of a copy.
    """
    selections = shape.num_tokens * shape.num_selected
    row = shape.value_dim + shape.pre_value_dim
    rows = itemsize * selections * row
    ids = selections * (2 if shape.num_slots > 1 else 1)
    scores = selections * shape.num_cores
    pre_inputs = shape.num_tokens * shape.pre_value_dim
    output = shape.num_tokens * shape.num_slots * shape.value_dim
    tables = itemsize * shape.num_values * row
    forward = rows + 4 * (ids + scores + pre_inputs + output)
    backward = rows + 4 * (ids + 2 * scores + 2 * pre_inputs + output) + tables
    backward_terms = 2 * shape.value_dim + 3 * shape.pre_value_dim
    return {
        "forward": (forward, 2 * selections * row),
        "backward": (backward, 2 * selections * backward_terms),
    }


def top_k_cost(shape: top_k_shapes.Shape, itemsize: int) -> dict[str, tuple[int, int]]:
    """(Bytes, FLOPs) of product-key top-k by pass.

    Bytes: query, keys, results and their gradients move once; the backward pass also reads S of the
    chosen keys. FLOPs: products of queries with all keys (forward) or with the chosen keys
    (backward); comparisons are not counted.
    """
    arguments = shape.arguments()
    arrays = arguments["query"].size + arguments["keys"].size
    pairs = shape.num_tokens * shape.num_heads * shape.top_m
    scores = pairs * max(1, shape.num_cores)
    sides = 2 * shape.rank * shape.key_dim
    forward = itemsize * arrays + 4 * (scores + pairs)
    backward = 2 * itemsize * arrays + 4 * (scores + pairs + 2 * shape.rank * pairs)
    return {
        "forward": (
            forward,
            2 * shape.num_tokens * shape.num_heads * shape.num_keys * sides,
        ),
        "backward": (backward, 2 * 2 * pairs * sides),
    }


OPERATORS = {
    "value_aggregation": Operator(
        name="value_aggregation",
        function=aggregation_api.value_aggregation,
        plain=plain.value_aggregation,
        backends=aggregation_api.BACKENDS,
        shapes=aggregation_shapes.SHAPES,
        paper=aggregation_shapes.PAPER,
        cpu=aggregation_shapes.CPU,
        differentiable=("values", "scores", "pre_values", "pre_inputs"),
        cost=aggregation_cost,
    ),
    "product_key_top_k": Operator(
        name="product_key_top_k",
        function=top_k_api.product_key_top_k,
        plain=plain.product_key_top_k,
        backends=top_k_api.BACKENDS,
        shapes=top_k_shapes.SHAPES,
        paper=top_k_shapes.PAPER,
        cpu=top_k_shapes.CPU,
        differentiable=("query", "keys", "cores"),
        cost=top_k_cost,
    ),
}


def named_shapes(operator: Operator, names: str | None) -> list[Any]:
    """Shapes by comma-separated names or tags; None selects the defaults of the default device.

    Raises:
        ValueError: there is no shape or tag of that name.
    """
    default = operator.cpu if jax.default_backend() == "cpu" else operator.paper
    chosen: list[Any] = []
    for name in default if names is None else names.split(","):
        matches = [s for s in operator.shapes if name in (s.name, s.tag, "all")]
        if not matches:
            known = ", ".join(["all", "ci", "model", *(s.name for s in operator.shapes)])
            raise ValueError(f"--shapes: got {name!r}, must be one of {known}")
        chosen += [shape for shape in matches if shape not in chosen]
    return chosen
