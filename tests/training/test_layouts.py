"""Runs on every layout of the mesh equal the run on one device; see tests/training/layouts.py."""

from typing import Any

import jax
import pytest

from tests.training import layouts
from umv2 import parallel

# One of each kind of exchange, all axes in use.
QUICK = (
    ("ultramem_v2", {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "columns"}),
    ("ultramem_v2", {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "rows"}),
    ("moe", {"fsdp": 2, "memory": 2, "tensor": 2}),
)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{'-'.join(map(str, case[1].values()))}",
            marks=() if case in QUICK else pytest.mark.slow,
        )
        for case in layouts.cases()
    ],
)
def test_a_layout_trains_as_one_device(family: str, mesh: dict[str, Any]) -> None:
    found = layouts.compare(family, mesh)
    assert found.steps == layouts.STEPS
    assert found.loss <= 1e-5
    assert found.gradient <= 1e-4


@pytest.mark.parametrize(("family", "mesh"), QUICK)
def test_moments_and_parameters_are_divided_alike_after_a_step(
    family: str, mesh: dict[str, Any]
) -> None:
    config = layouts.config_of(family, mesh, "")
    state, abstract = layouts.first_step(config)
    kinds = set()
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
            kinds |= {axis for entry in leaf.sharding.spec for axis in _axes(entry)}
    assert kinds == {parallel.FSDP, parallel.MEMORY, parallel.TENSOR}


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
