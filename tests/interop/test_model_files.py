import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from tests import slots
from tests.interop.comparison import assert_same_bits
from tests.model.drawn import drawn
from umv2.config import Config, from_config_dict
from umv2.interop import model_files
from umv2.interop.tensor_files import InteropError
from umv2.model import weights
from umv2.training.checkpoint import Restored

# By name: what fills the slots, and further changes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "memory": ("memory", {}),
    "memory without pre-values": ("memory", {"memory.pre_value_dim": 0}),
    "moe": ("moe", {}),
    "moe with a shared expert": ("moe", {"ffn_size": 8}),
    "both": ("both", {}),
}


def small_config(name: str = "memory") -> Config:
    config = base.get_config()
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "num_key_value_heads": 2,
        "ffn_size": 8,
        "memory.num_keys": 4,
        "memory.key_dim": 4,
        "memory.top_m": 2,
        "memory.shortlist": 2,
        "memory.value_dim": 4,
        "memory.pre_value_dim": 2,
        "moe.num_experts": 3,
        "moe.top_k": 2,
        "moe.expert_size": 4,
    }
    config.update_from_flattened_dict({f"model.{n}": value for n, value in sizes.items()})
    filled, changes = MODELS[name]
    slots.fill(config, filled)
    config.update_from_flattened_dict({f"model.{n}": value for n, value in changes.items()})
    config.train.num_steps = 321
    return from_config_dict(config)


def small_model(config: Config) -> Restored:
    return Restored(step=7, weights=drawn(weights.abstract(config.model)))


def exported(folder: Path) -> Path:
    config = small_config()
    model_files.export_model(folder, config, small_model(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_any_slots_round_trips(name: str, tmp_path: Path) -> None:
    config = small_config(name)
    model = small_model(config)
    model_files.export_model(tmp_path / "out", config, model, max_shard_bytes=1000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    read_config, read = model_files.load_model(tmp_path / "out")
    assert read_config == config
    assert (read.step, type(read.weights)) == (7, type(model.weights))
    assert type(read.weights.store) is type(model.weights.store)
    assert_same_bits(read.weights, model.weights)


def test_tensors_have_the_names_of_our_parameters(tmp_path: Path) -> None:
    config = small_config("both")
    model_files.export_model(tmp_path / "out", config, small_model(config))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == weights.declarations(config.model).keys()
    assert {"params/embedding", "params/blocks/attention/query", "params/memory/keys"} <= names
    assert {"params/blocks/moe/router", "params/blocks/moe/down"} <= names
    assert {"store/values", "store/pre_values", "buffers/memory/shuffle"} <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "olmoe"}, "format='olmoe': must be 'umv2'"),
        ({"format_version": 1}, "format_version=1: must be 2"),
        ({"step": None}, "step=None: must be an integer"),
        ({"config": {}}, r"config\.seed: missing"),
        ({"config": 3}, "config=3: must be a section"),
    ],
)
def test_an_invalid_description_is_rejected(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = exported(tmp_path / "out") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InteropError, match=rf"config\.json: {message}"):
        model_files.load_model(tmp_path / "out")


def test_tensors_of_another_model_are_rejected(tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(path)
    tensors["store/values"] = tensors["store/values"].astype(np.float64)
    tensors["params/embedding"] = tensors["params/embedding"][1:]
    tensors["params/head"] = tensors.pop("params/final_norm/weight")
    save_file(tensors, path)
    with pytest.raises(InteropError) as error:
        model_files.load_model(tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: tensors: missing: params/final_norm/weight;"
        " not of this model: params/head; params/embedding has shape [15, 8], not [16, 8];"
        " store/values is float64, not float32"
    )


@pytest.mark.parametrize("part", ["params", "store"])
def test_a_non_finite_model_is_not_exported(part: str, tmp_path: Path) -> None:
    config = small_config()
    model = small_model(config)
    with_nan = jax.tree.map(lambda leaf: leaf.at[..., -1].set(np.nan), getattr(model.weights, part))
    spoilt = dataclasses.replace(model.weights, **{part: with_nan})
    with pytest.raises(InteropError, match=r"^(params|store)/\w+.*: holds NaN or infinity$"):
        model_files.export_model(
            tmp_path / "out", config, dataclasses.replace(model, weights=spoilt)
        )
    assert not any(tmp_path.iterdir())


def test_a_non_finite_model_is_not_read(tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(path)
    tensors["store/values"][0, 1, 2] = np.inf
    save_file(tensors, path)
    with pytest.raises(InteropError, match=rf"{path}: store/values: holds NaN or infinity"):
        model_files.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("dense", "num_layers"),
        ("dense", "ffn_size"),
        ("moe", "num_layers"),
        ("dense", "vocab_size"),
        ("memory", "memory.key_dim"),
        ("moe", "moe.expert_size"),
    ],
)
def test_an_absurdly_large_model_is_rejected_before_it_is_created(
    name: str, field: str, tmp_path: Path
) -> None:
    config = small_config(name)
    model_files.export_model(tmp_path / "out", config, small_model(config))
    path = tmp_path / "out" / "config.json"
    description = json.loads(path.read_text())
    section = description["config"]["model"]
    *names, last = field.split(".")
    for key in names:
        section = section[key]
    section[last] = 100_000 if last == "num_layers" else 10**12
    path.write_text(json.dumps(description))
    with pytest.raises(InteropError, match=r"config\.json: describes a far larger model"):
        model_files.load_model(tmp_path / "out")
