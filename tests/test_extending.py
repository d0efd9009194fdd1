"""docs/extending.md: each recipe, built exactly as on the page, works in all modes."""

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments.ablations import catalogue
from kernels_pallas.protocol import Backend
from kernels_pallas.row_products.call import RowProductsCall
from kernels_pallas.row_products.reference import row_products_reference
from tests import meshes
from tests.data.test_sources import RECIPE
from umv2 import sharding
from umv2.config import Config, differing_fields, from_config_dict
from umv2.cost import accounting, traffic
from umv2.data.tokenizers import ByteTokenizer
from umv2.inference.decode import Generator
from umv2.interop import model_files
from umv2.model import weights
from umv2.training import checkpoint, held_out, inspection, state
from umv2.training.train import make_train_step
from umv2.types import Batch

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```python\n# file: (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the files of the page importable."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def _config(**changes: Any) -> Config:
    """A tiny experiment with the fields set on the command lines of the page."""
    config = base.get_config()
    config.model.update(hidden_size=16, num_layers=2, num_heads=2, num_key_value_heads=2)
    config.model.update(ffn_size=32, compute_dtype="float32")
    config.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4, value_dim=8)
    config.model.memory.update(pre_value_dim=4)
    config.data.sequence_length = 16
    config.train.update(batch_size=8, num_steps=8)
    config.evaluation.batch_size = 8
    config.optimizer.update(warmup_steps=1, learning_rate=0.01)
    config.generate.max_new_tokens = 4
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        target: Any = config
        for key in section.split("__"):
            target = target[key]
        target[name] = value
    return from_config_dict(config)


def _batch(config: Config) -> Batch:
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 256, shape, dtype=np.int32)
    return Batch(
        inputs=tokens,
        targets=np.roll(tokens, -1, axis=1),
        segment_ids=np.zeros(shape, np.int32),
        weights=np.ones(shape, np.float32),
    )


def _losses(config: Config, steps: int = 3, **mesh_axes: int) -> tuple[list[float], Any]:
    """Returns the losses of some steps on a mesh, and the final state."""
    mesh = meshes.create(**mesh_axes)
    config = meshes.resolved(config)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.abstract_state(config))
        now = sharding.create(functools.partial(state.create_state, config), shardings)
        step = jax.jit(make_train_step(config))
        batch = sharding.local_to_global(mesh, _batch(config))
        losses = []
        for _ in range(steps):
            now, metrics = step(now, batch)
            losses.append(float(metrics.loss))
    return losses, now


def test_the_page_names_every_recipe() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert headings == [
        "A layer family",
        "An optimizer for tables",
        "A data source",
        "An ablation",
        "A kernel backend",
    ]
    assert len(FILES) == len(headings)


@pytest.mark.usefixtures("modules")
def test_a_layer_family_can_be_trained_served_and_counted(tmp_path: Path) -> None:
    config = _config(model__memory__layer="dense_memory:DenseMemory")
    losses, trained = _losses(config, replica=1)
    assert losses[-1] < losses[0]
    before = weights.create(config.model, jax.random.key(config.seed))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, trained.weights)
    assert changed.params["memory"]["keys"]
    assert changed.store.values

    # Sharding, group and counts follow from the declaration.
    listed = {p.name: p for p in inspection.inspect(config).parameters}
    assert listed["params/memory/keys"].group == "keys"
    assert listed["store/values"].group == "values"
    arrays = trained.weights.named()
    counts = accounting.parameter_counts(config.model)
    assert counts.total == sum(array.size for array in arrays.values())
    read = traffic.decode_bytes(config.model, batch_size=2, context_length=8)
    assert read.sparse_values == 2 * 4 * counts.selected

    # Serving: decoding equals the forward pass; export and import.
    prompt = np.frombuffer(b"def f(x):", np.uint8).astype(np.int32)
    greedy = dataclasses.replace(config.generate, temperature=0.0)
    generator = Generator(config.model, trained.weights, tokenizer=ByteTokenizer(), config=greedy)
    (first, *_) = generator.generate_ids(prompt)
    ids = jnp.asarray([256, *prompt])[None]
    model = trained.weights.model(config.model)
    assert first == int(model(ids, store=trained.store).logits[0, -1, :257].argmax())
    restored = checkpoint.Restored(step=3, weights=trained.weights)
    model_files.export_model(tmp_path / "out", config, restored)
    _, read_back = model_files.load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, read_back.weights, trained.weights)
    step = held_out.make_evaluation_step(config.model, mask_across_documents=True)
    nats, weight = step(read_back.weights, _batch(config))
    assert float(nats / weight) < losses[0]


@pytest.mark.slow
@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_layer_family_computes_the_same_on_a_mesh(layout: str) -> None:
    config = _config(model__memory__layer="dense_memory:DenseMemory")
    single, _ = _losses(config, replica=1)
    spread = _config(
        model__memory__layer="dense_memory:DenseMemory",
        mesh__fsdp=2,
        mesh__memory=2,
        mesh__tensor=2,
        mesh__replica=1,
        mesh__table_sharding=layout,
    )
    eight, state_of_eight = _losses(spread, fsdp=2, memory=2, tensor=2)
    assert eight == pytest.approx(single, rel=1e-5)
    spec = state_of_eight.store.values.sharding.spec
    assert spec[["rows", "columns"].index(layout) + 1] == "memory"


@pytest.mark.slow
@pytest.mark.usefixtures("modules")
def test_an_optimizer_for_tables_has_no_moments_and_applies_the_gradient() -> None:
    adamw, sgd = (_config(), _config(optimizer__values_optimizer="table_sgd:table_sgd"))
    (_, with_moments), (_, without) = (_losses(c, 2, replica=1) for c in (adamw, sgd))

    def moments(trained: Any) -> int:
        return sum(leaf.ndim > 1 for leaf in jax.tree.leaves(trained.optimizer.store))

    assert (moments(with_moments), moments(without)) == (4, 0)  # two moments of two tables
    assert jnp.any(with_moments.store.values != without.store.values)


def test_the_data_source_recipe_is_the_one_tested_in_test_sources() -> None:
    assert FILES["counting_source.py"] == RECIPE


@pytest.mark.usefixtures("modules")
def test_the_arms_of_an_ablation_differ_as_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ABLATIONS", dict(catalogue.ABLATIONS))
    importlib.import_module("shuffle_ablation")
    entry = catalogue.ABLATIONS["shuffle"]
    baseline, arm = (entry.unsized(name, "smoke").to_dict() for name in entry.arms)
    assert differing_fields(baseline, arm) == ["model.memory.shuffle: True -> False"]
    for values in (baseline, arm):
        from_config_dict(values)


@pytest.mark.usefixtures("modules")
def test_a_kernel_backend_follows_the_protocol_and_matches_the_reference() -> None:
    backend = importlib.import_module("dense_row_products")
    assert isinstance(backend, Backend)
    generator = np.random.default_rng(0)
    table, inputs = (jnp.asarray(generator.normal(size=(n, 8)), jnp.float32) for n in (50, 6))
    indices = jnp.asarray(generator.integers(0, 50, (6, 4)), jnp.int32)
    call = RowProductsCall(table=table, indices=indices, inputs=inputs)
    assert backend.unsupported_reason(call, "cpu") is None
    large = dataclasses.replace(call, table=jnp.zeros((5000, 8)))
    assert "5000 rows" in backend.unsupported_reason(large, "cpu")
    expected = row_products_reference(table, indices, inputs)
    np.testing.assert_allclose(backend.forward(call), expected, rtol=1e-5, atol=1e-5)
