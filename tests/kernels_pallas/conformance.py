"""Tests every backend of every operator, at every "ci" shape and dtype, against the reference.

    python -m pytest tests/kernels_pallas/conformance.py [-k PART_OF_A_NAME]

runs all cases, with kernels in the interpreter of their platform; `python -m
experiments.benchmarks.conformance` shows their errors. The test suite runs a subset, in
test_conformance.py. New entries in an operator's BACKENDS are tested automatically.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.benchmark.workloads import OPERATORS, Operator, differentiated
from kernels_pallas.dispatch import Platform, UnsupportedError
from kernels_pallas.product_key_top_k.reference import product_key_top_k_reference
from kernels_pallas.value_aggregation.reference import value_aggregation_reference
from tests.kernels_pallas.sparsecore_interpreter import interpreted_sparsecore

REFERENCES = {
    "value_aggregation": value_aggregation_reference,
    "product_key_top_k": product_key_top_k_reference,
}
PLATFORMS: dict[str, Platform] = {
    "xla": "cpu",
    "pallas_tpu": "tpu",
    "pallas_sparsecore": "tpu",
    "pallas_gpu": "gpu",
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One backend of an operator at one shape and dtype (of tables, or of query and keys)."""

    operator: str
    backend: str
    shape: Any
    dtype: str

    def __str__(self) -> str:
        return "-".join((self.operator, self.backend, self.shape.name, self.dtype))

    def inputs(self) -> dict[str, Any]:
        """Random arrays; top-k gets integers, so that the selection is exact."""
        if self.operator == "product_key_top_k":
            return self.shape.inputs(dtype=jnp.dtype(self.dtype), numbers="integer")
        return self.shape.inputs(dtype=jnp.dtype(self.dtype))

    @property
    def reduction(self) -> int:
        """The approximate number of products in the longest sum of a result or a gradient."""
        shape = self.shape
        if self.operator == "value_aggregation":
            # A sum over selections, each with a pre-score; or all selections of one row.
            return shape.num_selected * max(shape.value_dim + shape.pre_value_dim, shape.num_tokens)
        # The gradient of a core sums over all chosen pairs.
        return max(shape.key_dim, shape.num_tokens * shape.num_heads * shape.top_m)


@dataclasses.dataclass(frozen=True)
class Error:
    """The array with the largest error in units of its tolerance.

    Attributes:
        largest: its error, relative to the largest number of the array.
        share: its error as a multiple of the tolerance; above 1, the case has failed.
        array: its name.
    """

    largest: float
    share: float
    array: str


def cases() -> list[Case]:
    """All cases."""
    return [
        Case(name, backend, shape, dtype)
        for name, operator in OPERATORS.items()
        for backend in operator.backends
        for shape in operator.shapes
        for dtype in DTYPES
        if shape.tag == "ci"
    ]


@contextlib.contextmanager
def interpreter(backend: str) -> Iterator[None]:
    """Runs the kernels of a backend on CPU; detects races and reads of uninitialized memory."""
    if backend == "pallas_sparsecore":
        with interpreted_sparsecore():
            yield
    elif PLATFORMS[backend] == "tpu":
        params = pltpu.InterpretParams(
            num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan"
        )
        with pltpu.force_tpu_interpret_mode(params):
            yield
        pltpu.reset_tpu_interpret_mode_state()
    elif PLATFORMS[backend] == "gpu":
        gpu_params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
        with plgpu.force_gpu_interpret_mode(gpu_params):
            yield
    else:
        yield


def run(case: Case) -> dict[str, Error] | str:
    """The errors of a case by pass, or why its backend does not support it."""
    operator = OPERATORS[case.operator]
    arrays = case.inputs()
    platform = PLATFORMS[case.backend]
    options = case.shape.options | {"implementation": case.backend, "platform": platform}
    with interpreter(case.backend):
        try:
            jax.eval_shape(lambda: operator.function(**arrays, **options))
        except UnsupportedError as error:
            return str(error).rpartition(f"{case.backend!r}: ")[2]
        got = results(operator, operator.function, arrays, options)
    want = reference(dataclasses.replace(case, backend=""))
    return {name: compare(got[name], want[name], case.reduction) for name in got}


@functools.cache
def reference(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """The expected results of a case: the reference on the same inputs, cast to float32."""
    arrays = {
        name: x.astype(jnp.float32) if x is not None and x.dtype == jnp.bfloat16 else x
        for name, x in case.inputs().items()
    }
    operator = OPERATORS[case.operator]
    return results(operator, REFERENCES[case.operator], arrays, case.shape.options)


def results(
    operator: Operator, function: Any, arrays: dict[str, Any], options: dict[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """The results of a call, and the gradients of a weighted sum of them, by name."""
    chosen = {n: x for n, x in arrays.items() if n in operator.differentiable and x is not None}
    others = {n: x for n, x in arrays.items() if n not in chosen}

    @jax.jit
    def both(chosen: dict[str, Array]) -> Any:
        call = differentiated(lambda arrays: function(**arrays, **options), others)
        result, vjp, selection = jax.vjp(call, chosen, has_aux=True)
        weights = jnp.cos(jnp.arange(result.size, dtype=result.dtype)).reshape(result.shape)
        return result, selection, vjp(weights)[0]

    result, selection, gradients = both(chosen)
    forward = {"result": result} | ({} if selection is None else {"selection": selection})
    return jax.tree.map(np.asarray, {"forward": forward, "gradients": gradients})


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], reduction: int) -> Error:
    """The largest error in units of its tolerance; integers must be equal."""
    assert got.keys() == want.keys()
    errors = []
    for name, expected in want.items():
        ours, theirs = (x.astype(np.float64) for x in (got[name], expected))
        assert np.isfinite(theirs).all(), f"the reference of {name} is not finite"
        assert ours.shape == theirs.shape, name
        if jnp.issubdtype(expected.dtype, jnp.integer):
            wrong = float(np.mean(ours != theirs))
            errors.append(Error(wrong, float("inf") if wrong else 0.0, name))
            continue
        # A bfloat16 result is rounded once more.
        returned = 0.0 if got[name].dtype == jnp.float32 else jnp.finfo(got[name].dtype).eps
        tolerance = 2 * jnp.finfo(jnp.float32).eps * reduction**0.5 + returned
        largest = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
        largest = float(largest) if np.isfinite(ours).all() else float("inf")
        errors.append(Error(largest, largest / float(tolerance), name))
    return max(errors, key=lambda error: error.share)


def check(case: Case, record_property: Callable[[str, str], None]) -> None:
    """Checks a case against its tolerances and records the errors; skips unsupported cases."""
    outcome = run(case)
    measured: dict[str, Any] = {
        "case": str(case),
        "operator": case.operator,
        "backend": case.backend,
        "dtype": case.dtype,
        "shape": dataclasses.asdict(case.shape),
    }
    if isinstance(outcome, str):
        record_property("measured", json.dumps(measured | {"refused": outcome}))
        pytest.skip(outcome)
    errors = {name: dataclasses.asdict(error) for name, error in outcome.items()}
    record_property("measured", json.dumps(measured | errors))
    for pass_name, error in outcome.items():
        assert error.share <= 1, (pass_name, error)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case(case: Case, record_property: Callable[[str, str], None]) -> None:
    check(case, record_property)
    jax.clear_caches()  # interpreted kernels fill them quickly
