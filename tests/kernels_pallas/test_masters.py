"""Tables that are copies of trained rows, their masters, which get the gradients."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import row_products, value_aggregation
from kernels_pallas.value_aggregation.tpu import backend as pallas_tpu
from tests.kernels_pallas.value_aggregation.test_api import make_inputs

FIRST, NUM_MASTERS, NUM_ROWS = 6, 11, 24


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pallas_tpu, "_LANES", 8)
    with pltpu.force_tpu_interpret_mode():
        yield
    pltpu.reset_tpu_interpret_mode_state()


def _copies(inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Returns the tables as rows [FIRST, FIRST + NUM_MASTERS) of larger ones, and their masters."""
    changed = dict(inputs, indices=inputs["indices"] + FIRST, first_master=jnp.array([FIRST]))
    for name in ("values", "pre_values"):
        others = ((FIRST, NUM_ROWS - FIRST - NUM_MASTERS), (0, 0))
        # A table that is read outside its masters, or a master that is read, gives NaN.
        padded = jnp.pad(inputs[name].astype(dtype), others, constant_values=jnp.nan)
        changed |= {name: padded, f"master_{name}": jnp.full_like(inputs[name], jnp.nan)}
    return changed


def _gradients(function: Any, inputs: dict[str, Any], names: dict[str, str]) -> dict[str, Array]:
    """Returns the output and the gradients of the arguments `names`, under their new names."""
    arrays = {name: inputs[name] for name in names}
    others = {name: value for name, value in inputs.items() if name not in names}

    def loss(arrays: dict[str, Array]) -> tuple[Array, Array]:
        output = function(**arrays, **others)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size)).reshape(output.shape)), output

    (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return {"output": output} | {names[name]: grad for name, grad in gradients.items()}


def _assert_close(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("backend", ["xla", "pallas_tpu"])
@pytest.mark.usefixtures("interpreter")
def test_masters_get_the_gradients_of_the_rows_that_are_read(backend: Any) -> None:
    inputs = make_inputs(num_values=NUM_MASTERS)
    # The tables are read in bfloat16: their rounded rows, in float32, are what to compare with.
    rounded = {
        name: inputs[name].astype(jnp.bfloat16).astype(jnp.float32)
        for name in ("values", "pre_values")
    }
    names = {name: name for name in ("values", "pre_values", "scores", "pre_inputs")}
    want = _gradients(value_aggregation, inputs | rounded, names)
    assert not np.allclose(want["output"], _gradients(value_aggregation, inputs, {})["output"])
    platform = "cpu" if backend == "xla" else "tpu"
    copies = _copies(inputs, jnp.bfloat16 if backend == "xla" else jnp.float32)
    if backend != "xla":
        want = _gradients(value_aggregation, inputs, names)
    masters = {"master_values": "values", "master_pre_values": "pre_values"}
    names = masters | {"scores": "scores", "pre_inputs": "pre_inputs"}
    copies |= {"implementation": backend, "platform": platform}
    _assert_close(_gradients(value_aggregation, copies, names), want)


def test_the_table_that_is_read_gets_no_gradient() -> None:
    copies = _copies(make_inputs(num_values=NUM_MASTERS), jnp.float32)
    gradients = _gradients(value_aggregation, copies, {"values": "values"})
    assert not np.any(gradients["values"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_master_gets_the_gradient_of_row_products(dtype: Any) -> None:
    inputs = make_inputs(num_values=NUM_MASTERS)
    copies = _copies(inputs, dtype)
    shared = {"inputs": inputs["pre_inputs"]}
    plain = {"table": inputs["pre_values"].astype(dtype).astype(jnp.float32)}
    want = _gradients(
        row_products,
        shared | plain | {"indices": inputs["indices"]},
        {"table": "table", "inputs": "inputs"},
    )
    got = _gradients(
        row_products,
        shared
        | {
            "table": copies["pre_values"],
            "indices": copies["indices"],
            "master": copies["master_pre_values"],
            "first_master": copies["first_master"],
        },
        {"master": "table", "inputs": "inputs"},
    )
    _assert_close(got, want)


@pytest.mark.usefixtures("no_runtime_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_master": None}, "first_master: got absent with given masters, must be with both"),
        ({"first_master": jnp.array([1, 2])}, r"first_master.shape: got \(2,\), must be \[1\]"),
        ({"master_pre_values": None}, "master_pre_values: got absent, must be given with"),
        ({"master_values": jnp.ones((11, 4))}, r"master_values.shape: got \(11, 4\), must be as"),
        ({"master_values": jnp.ones((5, 12))}, r"rows of masters: got \[5, 11\], must be equal"),
    ],
)
def test_inconsistent_masters_are_refused(changes: dict[str, Any], message: str) -> None:
    copies = _copies(make_inputs(num_values=NUM_MASTERS), jnp.float32)
    with pytest.raises(ValueError, match=message):
        value_aggregation(**copies | changes)
