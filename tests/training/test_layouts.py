"""Runs on every layout of the mesh equal the run on one device; see tests/training/layouts.py."""

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

# One of each exchange, all axes in use.
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
def test_a_layout_trains_as_one_device(
    family: str, mesh: dict[str, Any], record_property: Callable[[str, str], None]
) -> None:
    found = layouts.compare(family, mesh)
    record_property("measured", json.dumps(dataclasses.asdict(found)))
    assert found.steps == layouts.STEPS
    assert found.loss <= 1e-5
    assert found.gradient_norm <= 1e-5


@pytest.mark.parametrize(
    ("family", "mesh"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1] != _ROWS else ()) for case in ONE_STEP],
)
def test_a_step_shards_moments_as_their_parameters_and_has_the_gradients_of_one_device(
    family: str, mesh: dict[str, Any]
) -> None:
    state, abstract = layouts.first_step(layouts.config_of(family, mesh, ""))
    alone, _ = layouts.first_step(layouts.config_of(family, {}, ""))
    pairs = zip(layouts.gradients(state), layouts.gradients(alone), strict=True)
    for divided, whole in pairs:
        assert np.abs(divided - whole).max() <= 1e-5 * np.abs(whole).max()
    axes_in_use = set()
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
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
def test_a_run_goes_on_on_other_meshes_with_the_curve_of_one_device(tmp_path: Path) -> None:
    alone, _ = layouts.curves(layouts.config_of("ultramem_v2", {}, layouts.paths()))
    meshes: list[dict[str, Any]] = [
        {"memory": 8, "table_sharding": "rows"},
        {"memory": 4, "tensor": 2, "table_sharding": "columns"},
        {},
        {"fsdp": 2, "memory": 4, "table_sharding": "rows", "parameters": "fsdp_and_memory"},
    ]
    for start, mesh in zip((0, 5, 10, 15), meshes, strict=True):
        # What the run before did after `start`.
        for later in range(start + 5, layouts.STEPS + 1, 5):
            shutil.rmtree(tmp_path / "checkpoints" / str(later), ignore_errors=True)
        config = layouts.config_of("ultramem_v2", mesh, layouts.paths())
        often = dataclasses.replace(
            config.train, checkpoint_interval_steps=5, num_checkpoints_kept=4
        )
        loss, _ = layouts.curves(dataclasses.replace(config, train=often), tmp_path)
    assert loss.tolist() == pytest.approx(alone.tolist(), rel=1e-5)
