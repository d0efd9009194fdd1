"""Runs on every mesh layout equal the run on one device; see tests/training/layouts.py."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.training import layouts
from umv2 import sharding

# One layout per kind of exchange, with all axes in use.
_ALL = {"fsdp": 2, "memory": 2, "tensor": 2}
_ROWS = _ALL | {"table_sharding": "rows"}
ONE_STEP = (
    ("ultramem_v2", _ALL | {"table_sharding": "columns"}),
    ("ultramem_v2", _ROWS),
    ("moe", _ALL),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        pytest.param(*case, id=f"{case[0]}-{'-'.join(map(str, case[1].values()))}")
        for case in layouts.cases()
    ],
)
def test_a_layout_trains_like_one_device(
    family: str, mesh: dict[str, Any], record_property: Callable[[str, str], None]
) -> None:
    difference = layouts.compare(family, mesh)
    record_property("measured", json.dumps(dataclasses.asdict(difference)))
    assert difference.steps == layouts.STEPS
    assert difference.loss <= 1e-5
    assert difference.gradient_norm <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1] != _ROWS else ()) for case in ONE_STEP],
)
def test_a_step_shards_moments_like_parameters_and_has_the_gradients_of_one_device(
    family: str, mesh: dict[str, Any]
) -> None:
    state, abstract = layouts.first_step(layouts.config_of(family, mesh, ""))
    single, _ = layouts.first_step(layouts.config_of(family, {}, ""))
    pairs = zip(layouts.gradients(state), layouts.gradients(single), strict=True)
    for sharded, expected in pairs:
        assert np.abs(sharded - expected).max() <= 1e-5 * np.abs(expected).max()
    axes_in_use = set()
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected_leaf.sharding, leaf.ndim)
    parts = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for name, leaf in parts.items():
        moment = next((part for part in ("/mu/", "/nu/") if part in name), None)
        if moment:
            owner = "params/" if name.startswith("optimizer/model") else "store/"
            parameter = parts[owner + name.partition(moment)[2]]
            assert leaf.sharding == parameter.sharding
            axes_in_use |= {
                axis for entry in leaf.sharding.spec for axis in sharding.axes_of(entry)
            }
    assert axes_in_use == {sharding.FSDP, sharding.MEMORY, sharding.TENSOR}


@pytest.mark.slow
def test_a_run_that_changes_its_mesh_follows_the_curve_of_one_device(tmp_path: Path) -> None:
    single, _ = layouts.curves(layouts.config_of("ultramem_v2", {}, layouts.paths()))
    meshes: list[dict[str, Any]] = [
        {"memory": 8, "table_sharding": "rows"},
        {"memory": 4, "tensor": 2, "table_sharding": "columns"},
        {},
        {"fsdp": 2, "memory": 4, "table_sharding": "rows", "parameters": "fsdp_and_memory"},
    ]
    for start, mesh in zip((0, 5, 10, 15), meshes, strict=True):
        for later in range(start + 5, layouts.STEPS + 1, 5):
            shutil.rmtree(tmp_path / "checkpoints" / str(later), ignore_errors=True)
        config = layouts.config_of("ultramem_v2", mesh, layouts.paths())
        often = dataclasses.replace(
            config.train, checkpoint_interval_steps=5, num_checkpoints_kept=4
        )
        loss, _ = layouts.curves(dataclasses.replace(config, train=often), tmp_path)
    assert loss.tolist() == pytest.approx(single.tolist(), rel=1e-5)
