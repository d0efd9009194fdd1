"""Parity with the published PyTorch layers, for every file in tests/golden (see its README.md).

A file says in `meta_json` which case it is; the case begins with its family, and the rest of the
metadata gives the sizes. A new file of a known family is a new test, with nothing to add here.

`python -m tests.parity.test_golden` prints the worst relative error of each file.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from umv2 import config as config_lib
from umv2 import parallel
from umv2.model import layers, memory, retrieval

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

Dtype = Literal["float32", "float64"]
Meta = dict[str, Any]
Arrays = dict[str, np.ndarray]
Traced = dict[str, jax.Array]

# Of the largest entry: (values, gradients).
TOLERANCES: dict[Dtype, tuple[float, float]] = {"float32": (1e-5, 1e-4), "float64": (1e-10, 1e-10)}
TUCKER_MARGIN = 0.15  # fixed in the published code

INPUTS = {"meta_json", "x", "g", "buffer.shuffle_index"}  # and param.*
# Out of reach from outside the layer, but what is computed from them is compared.
INTERNAL = {"inter.query_normed", "inter.keys_normed", "score.pre", "singular_values"}


def run_layer(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Runs our layer of UltraMem, V1 or V2, and returns its results under the golden names."""
    config, coefficient = _model_config(meta, dtype), _balance_coefficient(meta)
    offset, x, g = meta["derived"]["offset"], golden["x"], golden["g"]
    buffers = {
        "core_u": jnp.asarray(golden["buffer.tucker_core_u"][0, :, 0]),
        "core_v": jnp.asarray(golden["buffer.tucker_core_v"][0, :, 0]),
        "shuffle": jnp.asarray(golden["buffer.shuffle_index"]),
    }

    # Takes parameters in the golden layout, so that gradients come out in it too.
    def forward(given: Traced, x: jax.Array) -> tuple[Traced, dict[str, Any]]:
        layer = memory.MemoryLayer(config, key=jax.random.key(0))
        tables: dict[str, Any] = {"pre_values": None}
        parameters = {}
        for name, array in given.items():
            if name.endswith("values_for_look_up"):
                tables[name.removeprefix("full.").removesuffix("_for_look_up")] = array
            else:
                ours, convert = PARAMETERS[name]
                parameters[ours] = convert(array)
        _replace(layer, nnx.Param, parameters)
        _replace(layer, layers.Buffer, buffers)
        store = memory.ValueStore(**tables)
        seen: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            for module, name in OBSERVED:
                patch.setattr(module, name, _observed(getattr(module, name), seen))
            y, stats = layer(x, store=store, start=offset)
        objectives = {
            "output": jnp.sum(y * g),
            "key_balance": stats.balance_loss,
            "tucker_svd_penalty": retrieval.tucker_penalty(given["tucker_core"], TUCKER_MARGIN),
        }
        seen["core_vectors"] = retrieval.core_vectors(
            given["tucker_core"], buffers["core_u"], buffers["core_v"]
        )
        seen["top_k"] = jax.lax.top_k(seen["shortlist_scores"], config.memory.shortlist)
        seen["selection"] = dataclasses.asdict(seen.pop("select"))
        return objectives, {"y": y, **objectives, **seen}

    @jax.jit
    def run(given: Traced, x: jax.Array) -> tuple[dict[str, Any], dict[str, Traced]]:
        objectives, pull_back, results = jax.vjp(forward, given, x, has_aux=True)
        gradients = {}
        for name in objectives:
            chosen = {
                other: jnp.full_like(objectives[other], other == name) for other in objectives
            }
            of_parameters, of_x = pull_back(chosen)
            gradients[name] = of_parameters | {"x": of_x}
        return results, gradients

    given = {name.removeprefix("param."): golden[name] for name in golden if "param." in name}
    seen, gradients = jax.device_get(run(given, x))
    selection, shortlisting = seen["selection"], seen["shortlist_scores"]
    block, _, rows = seen["table_rows"]
    u, v = seen["core_vectors"]
    ours = {
        "y": seen["y"],
        "idx.grid": _heads_last(
            selection["rows"] * config.memory.keys_per_side + selection["columns"]
        ),
        "idx.virtual": seen["virtual_addresses"],
        "idx.group": block,
        "idx.real": rows,
        "score.best": _heads_last(selection["scores"]),
        "score.total": selection["scores"].sum(axis=-1).swapaxes(0, 1),
        "inter.pooled": seen["value_aggregation"],
        "buffer.tucker_core_u": u[None, :, None],
        "buffer.tucker_core_v": v[None, :, None],
        "aux.tucker_svd_penalty": seen["tucker_svd_penalty"],
        "aux.key_balance_loss": seen["key_balance"],
        "aux.key_balance_coef": np.asarray(coefficient),
    }
    best, candidates = seen["top_k"]
    for side, name in enumerate(["row", "col"]):
        refined = seen["product_key_scores"][:, side]
        ours[f"inter.{name}_refined"] = refined.transpose(2, 0, 3, 1)
        ours[f"inter.{name}_approx"] = shortlisting[:, side].swapaxes(0, 1)
        ours[f"idx.{name}_topk"] = candidates[:, side].swapaxes(0, 1)
        ours[f"score.{name}_topk"] = best[:, side].swapaxes(0, 1)
    for name, gradient in gradients["output"].items():
        balance = gradients["key_balance"][name]
        ours[f"grad.{name}"] = gradient + coefficient * balance
        ours[f"gradaux.key_balance.{name}"] = balance
        ours[f"gradaux.tucker_svd_penalty.{name}"] = gradients["tucker_svd_penalty"][name]
    return ours


def run_core_vectors(golden: Arrays, meta: Meta, dtype: Dtype) -> Arrays:
    """Follows a sequence of cores from its second pair on: the sign of the first is free."""
    del meta, dtype
    cores = golden["param.tucker_core"]
    pair = tuple(golden[f"buffer.tucker_core_{side}"][0, 0, :, 0] for side in "uv")
    pairs = [pair]
    for core in cores[1:]:
        pair = jax.jit(retrieval.core_vectors)(core, *pair)
        pairs.append(pair)
    u, v = (np.stack(side)[:, None, :, None] for side in zip(*pairs, strict=True))
    penalty = jax.value_and_grad(lambda core: retrieval.tucker_penalty(core, TUCKER_MARGIN))
    penalties, gradients = jax.device_get(jax.jit(jax.vmap(penalty))(cores))
    return {
        "buffer.tucker_core_u": u,
        "buffer.tucker_core_v": v,
        "aux.tucker_svd_penalty": penalties,
        "gradaux.tucker_svd_penalty.tucker_core": gradients,
    }


FAMILIES: dict[str, Callable[[Arrays, Meta, Dtype], Arrays]] = {
    "ultramem_v1": run_layer,
    "ultramem_v2": run_layer,
    "ultramem_tucker_uv_update": run_core_vectors,
}
PENDING = {
    "memory_plus": "Memory+ is not built yet",
    "peer": "PEER is not built yet",
    "pkm": "PKM is not built yet",
    "olmoe": "the mixture of experts is not built yet",
}
# Golden name: (our name, from the golden layout to ours).
PARAMETERS: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "query_proj.weight": ("query", jnp.transpose),
    "values_proj.weight": ("output", jnp.transpose),
    "pre_values_proj.weight": ("pre", jnp.transpose),
    "query_norm.weight": ("query_norm", jnp.asarray),
    "keys_norm.weight": ("key_norm", jnp.asarray),
    "keys": ("keys", lambda keys: jnp.moveaxis(keys, -1, 2)),
    "tucker_core": ("cores", jnp.asarray),
}
QUERY_LAYOUTS = {"v1": "shared", "v2_chunk": "released", "per_rank": "per_rank"}
# Functions whose results inside the layer are compared too.
OBSERVED: list[tuple[ModuleType, str]] = [
    (retrieval, "product_key_scores"),
    (retrieval, "shortlist_scores"),
    (retrieval, "select"),
    (retrieval, "virtual_addresses"),
    (retrieval, "table_rows"),
    (parallel, "value_aggregation"),
]


def relative_errors(path: pathlib.Path, dtype: Dtype) -> dict[str, float]:
    """Returns the error of each result in a file, relative to its largest entry.

    Infinite for indices that differ, and for what is in the file but not in our results.
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
        if name not in INPUTS | INTERNAL and not name.startswith("param.")
    }


def excesses(path: pathlib.Path, dtype: Dtype) -> dict[str, float]:
    """Returns the results of a file whose error is above its tolerance."""
    values, gradients = TOLERANCES[dtype]
    errors = relative_errors(path, dtype)
    assert errors, f"{path.name} holds nothing to compare"
    return {
        name: error
        for name, error in errors.items()
        if not error <= (gradients if name.startswith("grad") else values)
    }


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_results_equal_those_of_the_published_layer(path: pathlib.Path, dtype: Dtype) -> None:
    family = _family(_read_meta(path))
    if family in PENDING:
        pytest.skip(PENDING[family])
    assert excesses(path, dtype) == {}


def test_files_of_every_family_are_found() -> None:
    families = {_family(_read_meta(path)) for path in GOLDEN.glob("*.npz")}
    assert families == FAMILIES.keys() | PENDING.keys()


def test_what_differs_or_is_new_is_noticed(tmp_path: pathlib.Path) -> None:
    def alter(array: np.ndarray) -> np.ndarray:
        return np.where(array == array.max(), array + array.dtype.type(1), array)

    altered = ["y", "idx.real", "score.best", "grad.keys", "aux.key_balance_loss"]
    path = _altered_copy(tmp_path, dict.fromkeys(altered, alter), {"grad.novelty": np.zeros(3)})
    assert set(excesses(path, "float32")) == {*altered, "grad.novelty"}


def test_an_unknown_family_is_an_error(tmp_path: pathlib.Path) -> None:
    meta = json.dumps({"case": "mixture_of_mixtures", "config": {}})
    path = _altered_copy(tmp_path, {}, {"meta_json": np.asarray(meta)})
    with pytest.raises(ValueError, match="mixture_of_mixtures"):
        relative_errors(path, "float32")


def _family(meta: Meta) -> str:
    matching = [name for name in [*FAMILIES, *PENDING] if meta["case"].startswith(name)]
    if not matching:
        raise ValueError(f"case {meta['case']!r} is of no family in FAMILIES or PENDING")
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


def _model_config(meta: Meta, dtype: Dtype) -> config_lib.ModelConfig:
    """Returns a model whose memory layers have the sizes of the file."""
    given, derived = meta["config"], meta["derived"]
    config = base.get_config()
    model, sizes = config.model, config.model.memory
    model.hidden_size = given["hidden_size"]
    model.num_heads = model.num_key_value_heads = 1
    model.norm_epsilon = given["rms_eps"]
    model.compute_dtype = dtype
    # A layer sees some rows of a store and does not ask whose tables they are.
    sizes.num_keys = math.isqrt(derived["value_num"])
    sizes.key_dim = given["kdim"]
    sizes.tucker_rank = given["tucker_rank"]
    sizes.num_cores = given["tucker_multihead"]
    sizes.num_heads = given["head"]
    sizes.top_m = sizes.shortlist = given["knn"]
    sizes.query = QUERY_LAYOUTS[derived["query_mode"]]
    sizes.key_expansion = math.isqrt(derived["groups"])
    sizes.projection = "single" if given["value_expand_time"] == 1 else "per_block"
    sizes.value_dim = given["vdim"]
    sizes.pre_value_dim = given.get("pre_vdim", 0)
    sizes.activation = "gelu" if given.get("mem_use_glu_act") else "none"
    sizes.initialization = "released"  # spares the calibration: every parameter is replaced
    result = config_lib.from_config_dict(config).model
    assert result.memory.keys_per_side == derived["key_num"]
    assert result.memory.num_slots == given["value_expand_time"]
    return result


def _balance_coefficient(meta: Meta) -> float:
    return meta["config"].get("mem_key_balance_reg_coef", 0.0)


def _replace(layer: nnx.Module, kind: type[nnx.Variable], arrays: Traced) -> None:
    """Replaces all variables of a kind, so that nothing is left as it was drawn."""
    old = nnx.to_pure_dict(nnx.state(layer, kind))
    assert jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, arrays)
    nnx.update(layer, arrays)


def _observed(function: Callable[..., Any], seen: dict[str, Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen[function.__name__] = function(*args, **kwargs)
        return seen[function.__name__]

    return wrapper


def _heads_last(x: np.ndarray) -> np.ndarray:
    """[h, t, k, ...] -> [t, h * k, ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _cast(array: np.ndarray, dtype: Dtype) -> np.ndarray:
    return array.astype(dtype if np.issubdtype(array.dtype, np.floating) else np.int32)


def _relative_error(ours: np.ndarray | None, golden: np.ndarray) -> float:
    if ours is None or np.shape(ours) != np.shape(golden):
        return math.inf
    if not np.issubdtype(golden.dtype, np.floating):
        return 0.0 if np.array_equal(ours, golden) else math.inf
    if np.array_equal(ours, golden, equal_nan=True):  # also where all is zero
        return 0.0
    return float(np.max(np.abs(ours - golden)) / np.max(np.abs(golden)))


def main() -> None:
    """Prints the worst relative error of each file: values and gradients, both dtypes."""
    columns = [(dtype, kind) for dtype in TOLERANCES for kind in ("values", "gradients")]
    lines = ["file".ljust(40) + "".join(f"{' '.join(column):>20}" for column in columns)]
    for path in sorted(GOLDEN.glob("*.npz")):
        family = _family(_read_meta(path))
        if family in PENDING:
            lines.append(f"{path.stem:40}  {PENDING[family]}")
            continue
        cells = []
        for dtype in TOLERANCES:
            errors = relative_errors(path, dtype)
            for gradient in (False, True):
                worst = [e for name, e in errors.items() if name.startswith("grad") == gradient]
                cells.append(f"{max(worst):20.1e}")
        lines.append(path.stem.ljust(40) + "".join(cells))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
