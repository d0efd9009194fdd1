"""Without jit every mode works and computes the same, and a print in a layer shows numbers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import families, tiny
from tests import meshes, tiny_run
from tests.extras import needs_libtpu
from umv2 import modes, sharding
from umv2.config import Config, from_config_dict
from umv2.model import layers
from umv2.planning import ahead_of_time, topology
from umv2.training import held_out
from umv2.training import train as training
from umv2.training.state import TrainState, create_state, sharded
from umv2.types import Batch


def small_config(family: str, **changes: Any) -> Config:
    """A smaller version of the family's tiny configuration: without jit a step takes seconds."""
    config = tiny.get_config(family)
    model, memory = config.model, config.model.memory
    model.hidden_size, model.num_heads, model.num_key_value_heads = 16, 2, 2
    model.ffn_size = min(model.ffn_size, 16)
    model.moe.expert_size = 4
    memory.num_keys, memory.key_dim, memory.initialization = 8, 8, "released"
    memory.top_m = memory.shortlist = 2
    # Rows of PEER and PKM have the width of the model.
    memory.value_dim = 16 if memory.scoring == "sum" else 8
    memory.pre_value_dim = min(memory.pre_value_dim, 16)
    config.data.sequence_length = 8
    config.train.num_steps, config.optimizer.warmup_steps = 1, 0
    config.train.batch_size = config.evaluation.batch_size = 4
    config.mesh.replica = 1
    values = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(values)
    return from_config_dict(config)


def state_of(config: Config) -> TrainState:
    with jax.default_prng_impl(tiny_run.PRNG):
        return jax.jit(lambda: create_state(config))()


def batch_of(config: Config) -> Batch:
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.int32)
    segments = np.zeros(shape, np.int32)
    segments[:, 5:] = 1
    return Batch(tokens[0], tokens[1], segments, np.ones(shape, np.float32))


def step_and_evaluation(config: Config, state: TrainState) -> dict[str, Any]:
    """Evaluates a batch, then takes a training step on it; returns all results."""
    mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
    with jax.set_mesh(mesh):
        placed = sharded(meshes.resolved(config), mesh, state)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, placed))
        batch = sharding.local_to_global(mesh, batch_of(config))
        evaluate = held_out.make_evaluation_step(config.model, mask_across_documents=True)
        nats, weight = evaluate(state.weights, batch)
        step = jax.jit(training.make_train_step(config))
        state, metrics = step(state, batch)
    results = {"nats": nats, "weight": weight, "metrics": metrics, "state": state}
    return jax.device_get(results)


CASES = [
    pytest.param(family, changes, marks=pytest.mark.slow(minutes=1))
    for family, changes in [
        ("ultramem_v2", {"model__num_layers": 1}),
        ("moe", {"train__gradient_accumulation": 2}),
        ("ultramem_v2", {"train__gradient_accumulation": 2, "model__scan_layers": False}),
        ("ultramem_v2", {"mesh__memory": 2, "mesh__table_sharding": "rows"}),
        ("ultramem_v2", {"mesh__replica": 2, "mesh__tensor": 2, "model__remat": "full"}),
        ("moe", {"mesh__fsdp": 2, "mesh__memory": 2}),
        *((family, {}) for family in families.FAMILIES),
        *((family, {"model__scan_layers": False}) for family in families.FAMILIES),
    ]
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_a_step_without_jit_matches_the_compiled_program(
    family: str, changes: dict[str, Any]
) -> None:
    config = small_config(family, **changes)
    state = state_of(config)
    want = step_and_evaluation(config, state)
    with jax.disable_jit():
        got = step_and_evaluation(config, state)

    def compare(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)

    jax.tree.map(compare, got, want)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the output of a print in every norm."""
    printed: list[str] = []
    call = layers.RMSNorm.__call__

    def printing(self: layers.RMSNorm, x: Any) -> Any:
        printed.append(str(x))
        return call(self, x)

    monkeypatch.setattr(layers.RMSNorm, "__call__", printing)
    yield printed


@pytest.mark.slow
def test_a_print_in_a_layer_shows_numbers(seen: list[str]) -> None:
    config = small_config("dense", model__num_layers=1, model__remat="full")
    state = state_of(config)
    del seen[:]
    with jax.disable_jit():
        step_and_evaluation(config, state)
    assert len(seen) >= 2 * 5
    assert all("0." in text or "e-" in text for text in seen), seen


def test_a_state_is_created_with_its_sharding() -> None:
    config = small_config("dense", mesh__replica=2, mesh__tensor=2)
    mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
    rows = sharding.batch_sharding(mesh)
    with jax.disable_jit(), jax.set_mesh(mesh):
        array = sharding.create(lambda: jnp.arange(8.0), rows)
        assert array.sharding == rows
        assert sharding.gather_to_hosts(mesh, array).tolist() == list(range(8))


@needs_libtpu
def test_a_plan_compiles_even_without_jit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise InterruptedError(f"without jit: {jax.config.jax_disable_jit}")

    place = topology.parse("v5e:2x2")
    monkeypatch.setattr(type(place), "devices", stop)
    with jax.disable_jit(), pytest.raises(InterruptedError, match="without jit: False"):
        ahead_of_time._compile(small_config("dense"), place, "train", tmp_path, code=False)


# Every mode that runs the model, from the command line.
_MODES = (
    ("--mode=train",),
    ("--mode=evaluate",),
    ("--mode=generate", "--prompt=ab"),
)


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("family", ["ultramem_v2", "moe"])
def test_the_command_line_works_without_jit(family: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    paths = tiny_run.write_text(tmp_path / "text")
    values = {
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_key_value_heads": 2,
        "model.memory.initialization": "released",
        "data.source": "text",
        "data.paths": (paths,),
        "data.held_out_fraction": 0.1,
        "data.sequence_length": 8,
        "optimizer.warmup_steps": 0,
        "train.num_steps": 1,
        "train.batch_size": 4,
        "train.tensorboard": False,
        "evaluation.batch_size": 4,
        "generate.max_new_tokens": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    config = [f"--config=configs/tiny.py:{family}", *flags]
    for arguments in _MODES:
        command = [sys.executable, "main.py", f"--workdir={tmp_path / 'run'}", *arguments]
        finished = subprocess.run(
            command + (config if arguments == ("--mode=train",) else []),
            env=os.environ | {"JAX_DISABLE_JIT": "True", "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("ab")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("held_out_loss" in json.loads(line) for line in lines)


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_trains_evaluates_and_generates_without_jit(
    family: str, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    config = small_config(
        family,
        data__source="text",
        data__paths=(tiny_run.write_text(tmp_path / "text"),),
        data__held_out_fraction=0.1,
        train__tensorboard=False,
        generate__max_new_tokens=2,
    )
    with jax.disable_jit():
        training.train(config, tmp_path / "run")
        report = modes.evaluate(config, tmp_path / "run")
        text = "".join(modes.generate(config, tmp_path / "run", "ab"))
    assert np.isfinite(report.metrics()["held_out_loss"])
    assert text.startswith("ab")
