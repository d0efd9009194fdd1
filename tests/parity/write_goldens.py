"""Writes golden files of layers whose published code is not available, from their formulas.

    python -m tests.parity.write_goldens

An independent forward pass in float64 NumPy that shares no code with the package. Gradients are
complex-step derivatives, exact to rounding, one entry at a time, which the small sizes allow.
Selections are held fixed, as top-k has no derivative. The formulas are in tests/golden/README.md.
"""

import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

Arrays = dict[str, np.ndarray]
Forward = Callable[[Arrays, np.ndarray, Arrays | None], tuple[np.ndarray, Arrays]]
TOKENS, DIM, HEADS, KEYS, KEY_DIM, TOP_K = (2, 3), 16, 2, 8, 6, 3
_STEP = 1e-30
_GAP = 1e-3  # between neighbouring scores, so that float32 makes the same selection in order
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _gelu(z: np.ndarray) -> np.ndarray:
    return z * (1 + scipy.special.erf(z / np.sqrt(2))) / 2


def _softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.real.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _retrieve(query: np.ndarray, keys: np.ndarray, fixed: Arrays | None) -> Arrays:
    """Selects the best pairs of keys: query [t, side, h, d], keys [h, side, n, d]."""
    scores = [np.einsum("thd,hnd->thn", query[:, side], keys[:, side]) for side in range(2)]
    if fixed is None:
        best = [np.argsort(-s, axis=-1, kind="stable")[..., :TOP_K] for s in scores]
    else:
        best = [fixed["idx.row_topk"], fixed["idx.col_topk"]]
    row, col = (np.take_along_axis(s, b, axis=-1) for s, b in zip(scores, best, strict=True))
    grid = (row[..., :, None] + col[..., None, :]).reshape(*row.shape[:2], -1)
    places = (
        np.argsort(-grid, axis=-1, kind="stable")[..., :TOP_K] if fixed is None else fixed["places"]
    )
    rows = np.take_along_axis(best[0], places // TOP_K, axis=-1)
    cols = np.take_along_axis(best[1], places % TOP_K, axis=-1)
    ordered = [np.sort(s.real, axis=-1)[..., -TOP_K - 1 :] for s in (*scores, grid)]
    return {
        "gap": min(np.diff(s, axis=-1).min() for s in ordered),
        "idx.row_topk": best[0],
        "idx.col_topk": best[1],
        "places": places,
        "ids": rows * KEYS + cols,
        "score.raw": np.take_along_axis(grid, places, axis=-1),
    }


def _memory_plus_meta(given: Arrays, x: np.ndarray, fixed: Arrays | None) -> Any:
    """Meta's layer: gated (`gating`), or with experts instead of values (`values_u`)."""
    query = x @ given["query_proj.weight"].T + given["query_proj.bias"]
    query = query.reshape(len(x), HEADS, 2, KEY_DIM).swapaxes(1, 2)
    seen = _retrieve(query, given["keys"].reshape(HEADS, 2, KEYS, KEY_DIM), fixed)
    weights = _softmax(seen["score.raw"])
    results = {"idx.real": seen["ids"].reshape(len(x), -1)}
    results["score.best"] = weights.reshape(len(x), -1)
    if "values_u.weight" in given:
        hidden = _gelu(np.einsum("td,thkd->thk", x, given["values_u.weight"][seen["ids"]]))
        y = np.einsum("thk,thkd->td", weights * hidden, given["values_v.weight"][seen["ids"]])
    else:
        pooled = np.einsum("thk,thkd->td", weights, given["values.weight"][seen["ids"]])
        gate = x @ given["swilu_projection.weight"].T + given["swilu_projection.bias"]
        y = (pooled * gate * _sigmoid(gate)) @ given["value_proj.weight"].T
        y = y + given["value_proj.bias"]
        results["inter.pooled"] = pooled
    if "gating.weight" in given:
        y = y * _sigmoid(x @ given["gating.weight"].T + given["gating.bias"])
    return y, seen | results


def _memory_plus(given: Arrays, x: np.ndarray, fixed: Arrays | None) -> Any:
    """The layer of the UltraMem repository: normalised queries, raw keys, no biases."""
    query = (x @ given["query_proj.weight"].T).reshape(len(x), HEADS, 2, KEY_DIM)
    query = query / np.sqrt(np.mean(query**2, axis=-1, keepdims=True) + 1e-5)
    query = (query * given["query_norm.weight"]).swapaxes(1, 2)
    seen = _retrieve(query, given["keys"], fixed)
    weights = _softmax(seen["score.raw"])
    pooled = np.einsum("thk,thkd->td", weights, given["values.weight"][seen["ids"]])
    gate = x @ given["swilu_projection.weight"].T
    y = (pooled * gate * _sigmoid(gate)) @ given["value_proj.weight"].T
    results = {"idx.real": seen["ids"], "score.best": weights, "inter.pooled": pooled}
    return y, seen | results


def _peer_own_experts(given: Arrays, x: np.ndarray, fixed: Arrays | None) -> Any:
    """PEER with separate embeddings per head, and its norm before the layer."""
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)) * (given["norm.gamma"] + 1)
    query = (x @ given["to_queries.weight"].T).reshape(len(x), 2, HEADS, KEY_DIM)
    seen = _retrieve(query, given["keys"].swapaxes(1, 2), fixed)
    weights = _softmax(seen["score.raw"])
    rows = seen["ids"] + (np.arange(HEADS) * KEYS**2)[None, :, None]
    hidden = _gelu(np.einsum("td,thkd->thk", x, given["weight_down_embed.weight"][rows]))
    y = np.einsum("thk,thkd->td", weights * hidden, given["weight_up_embed.weight"][rows])
    return y, seen | {"idx.real": rows, "score.best": weights}


_META = {
    "input_dim": DIM,
    "output_dim": DIM,
    "mem_heads": HEADS,
    "mem_k_dim": 2 * KEY_DIM,
    "mem_knn": TOP_K,
    "mem_n_keys": KEYS,
    "mem_v_dim": -1,
    "swilu_projection": True,
}
_QUERY = {"query_proj.weight": (2 * HEADS * KEY_DIM, DIM), "query_proj.bias": (24,)}
_PROJECTED = {
    "value_proj.weight": (DIM, DIM),
    "value_proj.bias": (DIM,),
    "swilu_projection.weight": (DIM, DIM),
    "swilu_projection.bias": (DIM,),
}
CASES: dict[str, tuple[Forward, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "memory_plus_meta_gated": (
        _memory_plus_meta,
        _META | {"mem_gated": True},
        {
            **_QUERY,
            **_PROJECTED,
            "keys": (HEADS * 2 * KEYS, KEY_DIM),
            "values.weight": (KEYS**2, DIM),
            "gating.weight": (1, DIM),
            "gating.bias": (1,),
        },
    ),
    "memory_plus_meta_peer": (
        _memory_plus_meta,
        _META | {"peer_variant": True, "swilu_projection": False},
        {
            **_QUERY,
            "keys": (HEADS * 2 * KEYS, KEY_DIM),
            "values_u.weight": (KEYS**2, DIM),
            "values_v.weight": (KEYS**2, DIM),
        },
    ),
    "memory_plus_normed": (
        _memory_plus,
        {
            "hidden_size": DIM,
            "head": HEADS,
            "kdim": KEY_DIM,
            "knn": TOP_K,
            "knum": KEYS,
            "vdim": DIM,
        },
        {
            "query_proj.weight": (2 * HEADS * KEY_DIM, DIM),
            "query_norm.weight": (KEY_DIM,),
            "keys": (HEADS, 2, KEYS, KEY_DIM),
            "values.weight": (KEYS**2, DIM),
            "value_proj.weight": (DIM, DIM),
            "swilu_projection.weight": (DIM, DIM),
        },
    ),
    "peer_separate_embed_per_head": (
        _peer_own_experts,
        {
            "dim": DIM,
            "dim_key": KEY_DIM,
            "heads": HEADS,
            "num_experts": KEYS**2,
            "num_experts_per_head": TOP_K,
            "non_competing_scores": False,
            "pre_rmsnorm": True,
            "separate_embed_per_head": True,
        },
        {
            "keys": (HEADS, KEYS, 2, KEY_DIM),
            "norm.gamma": (DIM,),
            "to_queries.weight": (2 * HEADS * KEY_DIM, DIM),
            "weight_down_embed.weight": (HEADS * KEYS**2, DIM),
            "weight_up_embed.weight": (HEADS * KEYS**2, DIM),
        },
    ),
}


def golden(case: str, *, with_gradients: bool = True) -> Arrays:
    """Returns the arrays of one file; inputs are exact in float32."""
    forward, config, shapes = CASES[case]

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        centre = 1.0 if "norm.weight" in name else 0.0
        return generator.normal(centre, 0.5, shape).astype(np.float32).astype(np.float64)

    for attempt in itertools.count():
        generator = np.random.default_rng([attempt, *case.encode()])
        given = {name: draw(name, shape) for name, shape in shapes.items()}
        x, g = draw("x", (*TOKENS, DIM)), draw("g", (*TOKENS, DIM))
        flat_x, flat_g = x.reshape(-1, DIM), g.reshape(-1, DIM)
        y, seen = forward(given, flat_x, None)
        if seen["gap"] > _GAP:
            break

    def gradient(of: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        derivative, moved = np.zeros(of.size), of.astype(np.complex128).reshape(-1)
        for index in range(of.size):
            moved[index] += 1j * _STEP
            derivative[index] = np.sum(run(moved.reshape(of.shape)) * flat_g).imag / _STEP
            moved[index] -= 1j * _STEP
        return derivative.reshape(of.shape)

    gradients = {}
    if with_gradients:
        for name, array in given.items():

            def run(moved: np.ndarray, name: str = name) -> np.ndarray:
                return forward(given | {name: moved}, flat_x, seen)[0]

            gradients[f"grad.{name}"] = gradient(array, run)
        of_x = gradient(flat_x, lambda moved: forward(given, moved, seen)[0])
        gradients["grad.x"] = of_x.reshape(x.shape)
    meta = {
        "case": case,
        "config": config,
        "source": "written by tests/parity/write_goldens.py from the formulas",
    }
    results = {name: array for name, array in seen.items() if name not in ("places", "ids", "gap")}
    return (
        {"meta_json": np.asarray(json.dumps(meta)), "x": x, "g": g, "y": y.reshape(x.shape)}
        | {f"param.{name}": array for name, array in given.items()}
        | results
        | gradients
    )


if __name__ == "__main__":
    for case in CASES:
        np.savez_compressed(GOLDEN / f"{case}.npz", allow_pickle=False, **golden(case))
