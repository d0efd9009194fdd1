"""What a training step must not do on pods, read from compiled programs at the paper's sizes."""

import importlib
from typing import Any

import pytest

from tests.extras import needs_libtpu
from umv2.config import from_config_dict
from umv2.planning import plan

_SHARDED = {"mesh.parameters": "fsdp_and_memory", "mesh.table_sharding": "rows"}
_COLUMNS = {"mesh.table_sharding": "columns"}


@pytest.mark.slow(minutes=1)
@needs_libtpu  # the extra that installs it has the compiler for GPUs too
@pytest.mark.parametrize(
    ("model", "machine", "accumulation", "fields", "memory_over_compute"),
    [
        ("paper_227m_1b2", "h200:8", 12, {"mesh.replica": 8}, 1.3),
        ("paper_1b_7b", "h200:8", 64, {"mesh.memory": 8, **_SHARDED, **_COLUMNS}, 1.0),
        ("paper_227m_1b2", "v5p:2x2x1", 12, {"mesh.replica": 4}, 1.0),
        ("paper_227m_1b2", "v5e:4x4", 48, {"mesh.memory": 4, "mesh.fsdp": 4, **_SHARDED}, 1.2),
        ("paper_1b_7b", "v6e:8x8", 16, {"mesh.memory": 8, "mesh.fsdp": 8, **_SHARDED}, 3.7),
        (
            "paper_2b5_120b_top256",
            "v5p:4x4x8",
            8,
            {"mesh.memory": 64, "mesh.fsdp": 2, **_SHARDED},
            5.5,
        ),
    ],
)
def test_a_step_retrieves_once_and_moves_few_bytes(
    model: str,
    machine: str,
    accumulation: int,
    fields: dict[str, Any],
    memory_over_compute: float,
) -> None:
    values = importlib.import_module(f"configs.{model}").get_config()
    values.update_from_flattened_dict(fields | {"train.gradient_accumulation": accumulation})
    planned = plan.plan(model, from_config_dict(values), machine)
    assert planned.fits
    faults = dict(planned.measured.faults)
    assert faults.pop("table_slices") <= 2  # the gradients that go into the layer stack
    assert not any(faults.values()), faults
    assert planned.seconds["HBM"] < memory_over_compute * planned.seconds["compute"]


@pytest.mark.slow(minutes=1)
@needs_libtpu
def test_full_rematerialization_retrieves_again() -> None:
    values = importlib.import_module("configs.paper_227m_1b2").get_config()
    values.update_from_flattened_dict(
        {
            "mesh.replica": 4,
            "model.remat": "full",
            "model.num_layers": 2,
            "train.gradient_accumulation": 96,
        }
    )
    planned = plan.plan("small", from_config_dict(values), "v5p:2x2x1")
    assert planned.measured.faults["rematerialised_kernels"] > 0
