"""Parity with the published PyTorch layers, for every file in tests/golden (see its README.md).

The `meta_json` of a file has its case, which begins with the family, and the sizes. A new file of a
known family is tested without changes here.

`python -m experiments.benchmarks.parity` shows the worst relative errors of each file.
"""

import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest

from tests.parity import olmoe, product_keys, ultramem, write_goldens
from tests.parity.common import GOLDEN, Arrays, Dtype, Meta

# Relative to the largest entry: (values, gradients).
TOLERANCES: dict[Dtype, tuple[float, float]] = {"float32": (1e-5, 1e-4), "float64": (1e-10, 1e-10)}

# And param.*
INPUTS = {"meta_json", "x", "g", "g0", "g1", "input_ids", "labels", "buffer.shuffle_index"}
# Not accessible from outside some layers, but results computed from them are compared.
INTERNAL = {
    "inter.query_normed",
    "inter.keys_normed",
    "inter.hidden",
    "score.pre",
    "singular_values",
    "inter.hidden_embed",
    "inter.hidden_layer0",
    "inter.hidden_layer1",
    "inter.hidden_final_norm",
    "inter.rope_cos",
    "inter.rope_sin",
    "inter.rope_inv_freq",
}

FAMILIES: dict[str, Callable[[Arrays, Meta, Dtype], Arrays]] = {
    "ultramem_v1": ultramem.run_layer,
    "ultramem_v2": ultramem.run_layer,
    "ultramem_tucker_uv_update": ultramem.run_core_vectors,
    "memory_plus": product_keys.run,
    "peer": product_keys.run,
    "memory_plus_meta": product_keys.run,
    "pkm": product_keys.run,
    "olmoe_block": olmoe.run_block,
    "olmoe_lm": olmoe.run_model,
}


def relative_errors(path: pathlib.Path, dtype: Dtype) -> dict[str, float]:
    """Returns the error of each result in a file, relative to its largest entry.

    Infinite if indices differ, and for arrays that our results lack.
    """
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta_json"]))
    run = FAMILIES[_family(meta)]
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        golden = {name: _cast(a, dtype) for name, a in arrays.items() if name != "meta_json"}
        ours = run(golden, meta, dtype)
    return {
        name: _relative_error(ours.get(name), array)
        for name, array in arrays.items()
        if name not in INPUTS and "param." not in name and name not in INTERNAL - ours.keys()
    }


def worst_errors(errors: dict[str, float]) -> dict[str, float]:
    """Returns the worst error of the values and of the gradients, if there are any."""
    gradients = {name for name in errors if name.startswith("grad")}
    by_kind = {"values": errors.keys() - gradients, "gradients": gradients}
    return {kind: max(errors[n] for n in names) for kind, names in by_kind.items() if names}


def excesses(errors: dict[str, float], dtype: Dtype) -> dict[str, float]:
    """Returns the errors above their tolerance."""
    values, gradients = TOLERANCES[dtype]
    return {
        name: error
        for name, error in errors.items()
        if not error <= (gradients if name.startswith("grad") else values)
    }


@pytest.mark.slow(fast=["float64"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_results_match_the_published_layer(
    path: pathlib.Path, dtype: Dtype, record_property: Callable[[str, str], None]
) -> None:
    errors = relative_errors(path, dtype)
    assert errors, f"{path.name} has nothing to compare"
    measured = {"file": path.stem, "dtype": dtype} | worst_errors(errors)
    record_property("measured", json.dumps(measured))
    assert excesses(errors, dtype) == {}


def test_files_of_every_family_are_found() -> None:
    families = {_family(_read_meta(path)) for path in GOLDEN.glob("*.npz")}
    assert families == FAMILIES.keys()


@pytest.mark.parametrize("case", write_goldens.CASES)
def test_files_written_from_the_formulas_are_reproduced(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as file:
        stored = dict(file)
    written = write_goldens.golden(case, with_gradients=False)
    for name, array in written.items():
        np.testing.assert_allclose(
            array, stored[name], rtol=1e-12
        ) if array.dtype.kind == "f" else (np.testing.assert_array_equal(array, stored[name]))


def test_differing_or_additional_arrays_are_detected(tmp_path: pathlib.Path) -> None:
    def alter(array: np.ndarray) -> np.ndarray:
        return np.where(array == array.max(), array + array.dtype.type(1), array)

    altered = ["y", "idx.real", "score.best", "grad.keys", "aux.key_balance_loss"]
    path = _altered_copy(tmp_path, dict.fromkeys(altered, alter), {"grad.novelty": np.zeros(3)})
    errors = relative_errors(path, "float32")
    assert set(excesses(errors, "float32")) == {*altered, "grad.novelty"}


def test_an_unknown_family_is_an_error(tmp_path: pathlib.Path) -> None:
    meta = json.dumps({"case": "mixture_of_mixtures", "config": {}})
    path = _altered_copy(tmp_path, {}, {"meta_json": np.asarray(meta)})
    with pytest.raises(ValueError, match="mixture_of_mixtures"):
        relative_errors(path, "float32")


def _family(meta: Meta) -> str:
    matching = [name for name in FAMILIES if meta["case"].startswith(name)]
    if not matching:
        raise ValueError(f"case {meta['case']!r} belongs to no family in FAMILIES")
    return max(matching, key=len)


def _read_meta(path: pathlib.Path) -> Meta:
    with np.load(path) as file:
        return json.loads(str(file["meta_json"]))


def _altered_copy(
    folder: pathlib.Path, changes: dict[str, Callable[[np.ndarray], np.ndarray]], extra: Arrays
) -> pathlib.Path:
    with np.load(GOLDEN / "ultramem_v2_balance.npz") as file:
        arrays = {name: changes.get(name, np.asarray)(array) for name, array in file.items()}
    path = folder / "altered.npz"
    np.savez(path, allow_pickle=False, **arrays | extra)
    return path


def _cast(array: np.ndarray, dtype: Dtype) -> np.ndarray:
    return array.astype(dtype if np.issubdtype(array.dtype, np.floating) else np.int32)


def _relative_error(ours: np.ndarray | None, golden: np.ndarray) -> float:
    if ours is None or np.shape(ours) != np.shape(golden):
        return math.inf
    if not np.issubdtype(golden.dtype, np.floating):
        return 0.0 if np.array_equal(ours, golden) else math.inf
    if np.array_equal(ours, golden, equal_nan=True):  # also if all entries are zero
        return 0.0
    return float(np.max(np.abs(ours - golden)) / np.max(np.abs(golden)))
