import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from tests.interop.comparison import assert_same_bits
from tests.model.drawn import drawn
from umv2.config import Config, from_config_dict
from umv2.interop import model_files
from umv2.interop.tensor_files import InteropError
from umv2.training.checkpoint import Restored

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "memory": {},
    "memory without pre-values": {"memory.pre_value_dim": 0},
    "moe": {"ffn_size": 0},
}


def small_config(family: str = "memory") -> Config:
    config = base.get_config()
    sizes: dict[str, Any] = {
        "family": family.split(maxsplit=1)[0],
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
    sizes |= FAMILIES[family]
    config.update_from_flattened_dict({f"model.{n}": value for n, value in sizes.items()})
    config.train.num_steps = 321
    return from_config_dict(config)


def small_model(config: Config) -> Restored:
    parts = drawn(lambda: model_files.abstract_model(config.model))
    return Restored(step=7, **parts)


def exported(folder: Path) -> Path:
    config = small_config()
    model_files.export_model(folder, config, small_model(config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_comes_back(family: str, tmp_path: Path) -> None:
    config = small_config(family)
    model = small_model(config)
    model_files.export_model(tmp_path / "out", config, model, max_shard_bytes=1000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    read_config, read = model_files.load_model(tmp_path / "out")
    assert read_config == config
    assert (read.step, type(read.store)) == (7, type(model.store))
    for part in ("params", "store", "buffers"):
        assert_same_bits(getattr(read, part), getattr(model, part))


def test_tensors_have_the_names_of_our_parameters(tmp_path: Path) -> None:
    names = load_file(exported(tmp_path / "out") / "model.safetensors").keys()
    assert {"model/embedding", "model/blocks/attention/query", "model/sparse/keys"} <= names
    assert {"store/values", "store/pre_values", "buffers/sparse/shuffle"} <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "olmoe"}, "format='olmoe': must be 'umv2'"),
        ({"format_version": 2}, "format_version=2: must be 1"),
        ({"step": None}, "step=None: must be an integer"),
        ({"config": {}}, r"config\.seed: missing"),
        ({"config": 3}, "config=3: must be a section"),
    ],
)
def test_another_description_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = exported(tmp_path / "out") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InteropError, match=rf"config\.json: {message}"):
        model_files.load_model(tmp_path / "out")


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(path)
    tensors["store/values"] = tensors["store/values"].astype(np.float64)
    tensors["model/embedding"] = tensors["model/embedding"][1:]
    tensors["model/head"] = tensors.pop("model/final_norm/weight")
    save_file(tensors, path)
    with pytest.raises(InteropError) as error:
        model_files.load_model(tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: tensors: missing: model/final_norm/weight;"
        " not of this model: model/head; model/embedding has shape [15, 8], not [16, 8];"
        " store/values is float64, not float32"
    )


@pytest.mark.parametrize("part", ["params", "store"])
def test_a_model_that_is_not_finite_is_not_exported(part: str, tmp_path: Path) -> None:
    config = small_config()
    model = small_model(config)
    with_nan = jax.tree.map(lambda leaf: leaf.at[..., -1].set(np.nan), getattr(model, part))
    with pytest.raises(InteropError, match=r"^(model|store)/\w+.*: holds NaN or infinity$"):
        model_files.export_model(
            tmp_path / "out", config, dataclasses.replace(model, **{part: with_nan})
        )
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_not_finite_is_not_read(tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(path)
    tensors["store/values"][0, 1, 2] = np.inf
    save_file(tensors, path)
    with pytest.raises(InteropError, match=rf"{path}: store/values: holds NaN or infinity"):
        model_files.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("dense", "num_layers"),
        ("dense", "ffn_size"),
        ("moe", "num_layers"),
        ("dense", "vocab_size"),
        ("memory", "memory.key_dim"),
        ("moe", "moe.expert_size"),
    ],
)
def test_a_model_out_of_all_proportion_is_refused_before_it_is_made(
    family: str, field: str, tmp_path: Path
) -> None:
    config = small_config(family)
    model_files.export_model(tmp_path / "out", config, small_model(config))
    path = tmp_path / "out" / "config.json"
    description = json.loads(path.read_text())
    section = description["config"]["model"]
    *names, last = field.split(".")
    for name in names:
        section = section[name]
    section[last] = 100_000 if last == "num_layers" else 10**12
    path.write_text(json.dumps(description))
    with pytest.raises(InteropError, match=r"config\.json: describes a far larger model"):
        model_files.load_model(tmp_path / "out")
