"""Every layout of the mesh against one device, through the production entry point.

test_layouts.py runs them, and `python -m experiments.benchmarks.meshes` shows the measurements.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import tiny
from tests import slots, tiny_run
from umv2 import sharding
from umv2.config import Config, from_config_dict
from umv2.cost import exchange
from umv2.training import train as training
from umv2.training.state import TrainState, abstract_state, create_state
from umv2.types import Batch

STEPS = 20

_BOTH = "fsdp_and_memory"
# For ultramem_v2, each kind of layout; for the others, all sharded axes at once.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "ultramem_v2": [
        {"replica": 8},
        {"fsdp": 8},
        {"tensor": 4, "replica": 2},
        {"memory": 8, "table_sharding": "columns"},
        {"memory": 8, "table_sharding": "rows"},
        {"memory": 8, "table_sharding": "auto", "parameters": _BOTH},
        {"replica": 2, "memory": 4, "table_sharding": "rows"},
        {"fsdp": 2, "memory": 4, "table_sharding": "columns", "parameters": _BOTH},
        {"memory": 4, "tensor": 2, "table_sharding": "columns"},
        {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "columns"},
        {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "rows"},
        {"replica": 2, "memory": 2, "tensor": 2, "table_sharding": "rows", "parameters": _BOTH},
    ],
    "dense": [
        {"fsdp": 2, "memory": 2, "tensor": 2},
        {"memory": 4, "tensor": 2, "parameters": _BOTH},
    ],
    "moe": [
        {"memory": 8},
        {"tensor": 4, "replica": 2},
        {"fsdp": 2, "memory": 2, "tensor": 2},
        {"memory": 4, "tensor": 2, "parameters": _BOTH},
    ],
    "both": [
        {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "columns"},
        {"memory": 4, "tensor": 2, "table_sharding": "rows", "parameters": _BOTH},
    ],
    "peer": [
        {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "columns"},
        {"replica": 2, "memory": 2, "tensor": 2, "table_sharding": "rows"},
    ],
    # Odd numbers of rows, so that "auto" shards by columns.
    **{
        family: [
            {"fsdp": 2, "memory": 2, "tensor": 2, "table_sharding": "columns"},
            {"replica": 2, "memory": 2, "tensor": 2, "table_sharding": "auto", "parameters": _BOTH},
        ]
        for family in ("ultramem", "memory_plus", "pkm")
    },
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Relative differences between a run on a mesh and the same run on one device."""

    family: str
    mesh: str
    loss: float  # largest over all steps
    gradient_norm: float  # at the first step
    steps: int


def config_of(family: str, mesh: dict[str, Any], paths: str) -> Config:
    """The tiny model, with two layers if the family allows, and sizes that meshes divide."""
    values = tiny.get_config("moe" if family == "both" else family)
    if family == "both":  # a memory with experts
        slots.fill(values, family)
    values.model.memory.initialization = "released"  # avoids the calibration
    values.update_from_flattened_dict(
        {
            "data.source": "text",
            "data.paths": (paths,),
            "data.sequence_length": 32,
            "data.held_out_fraction": 0.1,
            "model.vocab_size": 264,
            "train.num_steps": STEPS,
            "train.batch_size": 8,
            "train.log_interval_steps": 1,
            "train.evaluation_interval_steps": STEPS,
            "train.checkpoint_interval_steps": STEPS,
            "train.tensorboard": False,
            # At twice the rate, rounding flips a selection within 20 steps, and float32 curves
            # differ by 1e-4 for any sharding.
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 2,
            "evaluation.batch_size": 8,
            "mesh.replica": 1,
        }
        | {f"mesh.{name}": value for name, value in mesh.items()}
    )
    memory = values.model.memory
    if not memory.read_layers and memory.share_group == 1:  # other families need all four layers
        values.model.num_layers = 2
    values.model.ffn_size += -values.model.ffn_size % 8
    values.model.moe.expert_size += -values.model.moe.expert_size % 8
    return from_config_dict(values)


@functools.cache
def paths() -> str:
    """Returns the glob of the text files that all runs train on."""
    folder = Path(tempfile.mkdtemp())
    return tiny_run.write_text(folder)


def curves(config: Config, workdir: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns loss and gradient norm of every step of a run, in a new or given folder."""
    workdir = workdir or Path(tempfile.mkdtemp())
    training.train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    names = ("loss", "gradient_norm")
    loss, norm = (np.array([record[name] for record in records]) for name in names)
    return loss, norm


def first_step(config: Config) -> tuple[TrainState, TrainState]:
    """Returns the state after one step on random tokens, and the expected abstract state."""
    mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
    config = exchange.resolve_mesh(config, mesh.shape, num_tokens=256)
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    rows = sharding.local_rows(mesh, config.train.batch_size)
    batch = Batch(
        inputs=tokens[rows, :-1],
        targets=tokens[rows, 1:],
        segment_ids=np.zeros_like(tokens[rows, 1:]),
        weights=np.ones_like(tokens[rows, 1:], np.float32),
    )
    with jax.set_mesh(mesh):
        abstract = abstract_state(config)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = sharding.create(lambda: create_state(config), shardings)
        step = training.make_train_step(config)
        return jax.jit(step)(state, sharding.local_to_global(mesh, batch))[0], abstract


def gradients(state: TrainState) -> list[np.ndarray]:
    """Returns the first moments: the clipped gradients of the first step, up to a factor."""
    return [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if "mu" in jax.tree_util.keystr(path)
    ]


@functools.cache
def _one_device(family: str) -> tuple[np.ndarray, np.ndarray]:
    return curves(config_of(family, {}, paths()))


def compare(family: str, mesh: dict[str, Any]) -> Difference:
    """Compares training on a mesh with training on one device."""
    single, sharded = _one_device(family), curves(config_of(family, mesh, paths()))
    loss, norm = (np.abs(a - b) / b for a, b in zip(sharded, single, strict=True))
    return Difference(
        family=family,
        mesh=" ".join(f"{name}={value}" for name, value in mesh.items()),
        loss=float(loss.max()),
        gradient_norm=float(norm[0]),
        steps=len(loss),
    )


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every family and mesh."""
    for family, meshes in LAYOUTS.items():
        for mesh in meshes:
            yield family, mesh
