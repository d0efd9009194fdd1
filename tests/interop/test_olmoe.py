import dataclasses
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from tests.interop.comparison import assert_same_bits
from tests.model.drawn import drawn
from tests.tiny_run import logged
from umv2.config import Config, ModelConfig, from_config_dict
from umv2.data.tokenizers import ByteTokenizer, Tokenizer
from umv2.interop import olmoe
from umv2.interop.tensor_files import InteropError
from umv2.model import weights
from umv2.model.weights import Weights

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = ("hub", "native")
Tensors = dict[str, np.ndarray]


def small_config(**changes: Any) -> Config:
    """A mixture of experts, smaller than the golden model in every size."""
    config = base.get_config()
    sizes = {
        "ffn": "moe",
        "memory.layer": "none",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "ffn_size": 0,
        "tie_embeddings": False,
        "compute_dtype": "float32",
        "moe.num_experts": 3,
        "moe.top_k": 2,
        "moe.expert_size": 8,
    }
    fields = {f"model.{name}": value for name, value in (sizes | changes).items()}
    config.update_from_flattened_dict(fields)
    return from_config_dict(config)


def published(folder: Path, layout: str = "hub") -> Path:
    """The golden model as a folder in the format of the hub."""
    folder.mkdir()
    shutil.copy(GOLDEN / "olmoe_lm_config.json", folder / "config.json")
    shutil.copy(GOLDEN / f"olmoe_lm_params_{layout}.safetensors", folder / "model.safetensors")
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Sets keys of the configuration; removes a key if its value is ..."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def edit_tensors(folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype: olmoe.Dtype = "float32") -> tuple[ModelConfig, Weights]:
    return olmoe.load_olmoe(folder, small_config().model, dtype)


def draw(config: Config) -> Weights:
    return drawn(weights.abstract(config.model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_match_the_published_code(layout: str, tmp_path: Path) -> None:
    model, loaded = load(published(tmp_path / "model", layout))
    transformer = loaded.model(model)
    with np.load(GOLDEN / "olmoe_lm.npz") as golden:
        tokens, expected = golden["input_ids"], golden["logits"]
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda m, tokens: m(tokens, store=None).logits)
        logits = run(transformer, jnp.asarray(tokens, jnp.int32))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_both_layouts_are_the_same_model(tmp_path: Path) -> None:
    left, right = (load(published(tmp_path / layout, layout)) for layout in LAYOUTS)
    tensors = [load_file(tmp_path / layout / "model.safetensors") for layout in LAYOUTS]
    assert tensors[0].keys() != tensors[1].keys()
    assert left[0] == right[0]
    assert_same_bits(left[1], right[1])


def test_the_configuration_matches_the_file(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"moe.renormalize": True, "tie_embeddings": True}
    changes |= {"ffn": "dense", "ffn_size": 8, "memory.layer": "product_key"}
    base_model = small_config(**changes).model
    model = olmoe.read_config(published(tmp_path / "model"), base_model)
    assert (model.ffn, model.ffn_size, model.query_key_norm) == ("moe", 0, True)
    assert (model.vocab_size, model.hidden_size, model.num_layers) == (97, 64, 2)
    assert (model.num_heads, model.num_key_value_heads) == (4, 4)
    assert (model.rope_theta, model.norm_epsilon) == (10000.0, 1e-5)
    assert not model.tie_embeddings
    sizes = model.moe
    assert (sizes.num_experts, sizes.top_k, sizes.expert_size) == (8, 2, 16)
    assert not sizes.renormalize
    assert model.compute_dtype == "float32"
    assert model.memory == dataclasses.replace(base_model.memory, layer="none")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"rope_parameters": ..., "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 500000}}, {"rope_theta": 5e5}),
        ({"rope_parameters": None}, {"rope_theta": 1e4}),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
        ({"num_key_value_heads": ...}, {"num_key_value_heads": 4}),
        ({"rms_norm_eps": 1e-6}, {"norm_epsilon": 1e-6}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"attention_dropout": ..., "clip_qkv": ..., "architectures": ...}, {}),
        ({"architectures": None, "hidden_act": None, "tie_word_embeddings": None}, {}),
        ({"architectures": [], "hidden_act": "swish", "partial_rotary_factor": 1.0}, {}),
        ({"torch_dtype": ..., "dtype": ..., "transformers_version": ..., "use_cache": True}, {}),
        ({"rope_scaling": None}, {}),
        ({"rope_scaling": {}}, {}),
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, {}),
        ({"rope_parameters": ..., "rope_scaling": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"_name_or_path": "x", "task_specific_params": {"a": [1]}, "id2label": {"0": "a"}}, {}),
    ],
)
def test_keys_are_read_under_all_names(
    tmp_path: Path, changes: dict[str, Any], fields: dict[str, Any]
) -> None:
    folder = edit(published(tmp_path / "model"), **changes)
    model = olmoe.read_config(folder, small_config().model)
    assert {name: getattr(model, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral': must be 'olmoe'"),
        ({"model_type": ...}, "model_type: missing; must be 'olmoe'"),
        ({"architectures": ["OlmoeModel"]}, r"architectures=\['OlmoeModel'\]: must be"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0: must be None: queries, keys and values"),
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ({"rope_scaling": {"factor": 2}}, r"rope_scaling\.factor=2: must be 1: RoPE is not"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling\.type='linear': must"),
        ({"rope_scaling": "default"}, "rope_scaling='default': must be a mapping"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5: must be 1"),
        ({"sliding_window": 128}, "sliding_window=128: must be None"),
        ({"quantization_config": {}}, "quantization_config={}: must be None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.rope_type='yarn': must"),
        ({"rope_parameters": 3}, "rope_parameters=3: must be a mapping"),
        ({"rope_theta": 7.0}, r"rope_theta=7\.0: must be rope_parameters\.rope_theta = 10000\.0"),
        ({"head_dim": 32}, "head_dim=32: must be hidden_size / num_attention_heads"),
        ({"hidden_size": ...}, "hidden_size: missing; must be an integer from 1"),
        ({"num_experts": "8"}, "num_experts='8': must be an integer from 1"),
        ({"num_experts": True}, "num_experts=True: must be an integer from 1"),
        ({"num_experts": 8.0}, r"num_experts=8\.0: must be an integer from 1"),
        ({"num_experts": [8]}, r"num_experts=\[8\]: must be an integer from 1"),
        ({"vocab_size": 0}, "vocab_size=0: must be an integer from 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2: must be an integer from 1"),
        ({"intermediate_size": 10**30}, "intermediate_size=10{30}: must be an integer from 1 to"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1: must be a finite number > 0"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf: must be a finite number > 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: must be a finite number > 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=10{400}: must be a finite number > 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': must be a finite number > 0"),
        ({"rope_parameters": {"rope_theta": 0.5}}, r"as our model\.rope_theta=0\.5: must be > 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1: must be true or false"),
        ({"num_attention_heads": 3}, r"head_dim|as our model\.num_heads=3: must divide"),
        ({"num_key_value_heads": 3}, r"as our model\.num_key_value_heads=3: must divide"),
        ({"num_experts_per_tok": 9}, r"as our model\.moe\.top_k=9: must be at most"),
    ],
)
def test_an_unsupported_model_is_rejected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edit(published(tmp_path / "model"), **changes)
    with pytest.raises(InteropError, match=rf"config\.json: {message}"):
        load(folder)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"config\.json: cannot be read: No such file"):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
        tensors["model.layers.2.mlp.gate.weight"] = np.zeros((8, 64), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
        tensors["model.norm.weight"] = np.zeros(64, np.int32)

    folder = edit_tensors(published(tmp_path / "model"), change)
    with pytest.raises(InteropError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder}: tensors: missing: model.layers.1.mlp.experts.7.up_proj.weight;"
        " not of this model: model.layers.2.mlp.gate.weight;"
        " lm_head.weight has shape [64, 97], not [97, 64];"
        " model.norm.weight is int32, not float32 or bfloat16 or float16"
    )


@pytest.mark.parametrize("written", ["not", "twice"])
def test_a_tied_model_has_no_head_of_its_own(tmp_path: Path, written: str) -> None:
    def tie(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        if written == "twice":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    folder = edit(published(tmp_path / "model"), tie_word_embeddings=True)
    with pytest.raises(InteropError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load(folder)
    model, loaded = load(edit_tensors(folder, tie))
    assert model.tie_embeddings
    assert "head" not in loaded.params
    np.testing.assert_array_equal(
        loaded.params["embedding"],
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("of", ["model.layers.1.self_attn", "model"])
def test_frequencies_of_rotary_positions_are_skipped(tmp_path: Path, of: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{of}.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    plain = load(published(tmp_path / "plain"))
    with_buffer = load(edit_tensors(published(tmp_path / "model"), add))
    assert plain[0] == with_buffer[0]
    assert_same_bits(plain[1], with_buffer[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_model_is_rejected(tmp_path: Path, layout: str, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value

    folder = edit_tensors(published(tmp_path / "model", layout), spoil)
    named = r"model\.safetensors: model\.layers\.1\.self_attn\.k_proj\.weight: holds NaN or"
    with pytest.raises(InteropError, match=named):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 100_000},
        {"num_experts": 2**31 - 1, "num_experts_per_tok": 1},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 2**31 - 1},
        {"hidden_size": 2**30, "num_attention_heads": 1, "num_key_value_heads": 1},
    ],
)
def test_an_absurdly_large_model_is_rejected_before_it_is_created(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = edit(published(tmp_path / "model"), **changes)
    with pytest.raises(InteropError, match=r"config\.json: describes a far larger model than"):
        load(folder)


def test_an_exported_model_matches_the_published_files(tmp_path: Path) -> None:
    model, loaded = load(published(tmp_path / "model", "native"))
    config = small_config()
    exported = Config(**vars(config) | {"model": model})
    olmoe.export_olmoe(tmp_path / "out", exported, loaded)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(GOLDEN / "olmoe_lm_params_hub.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    golden = json.loads((GOLDEN / "olmoe_lm_config.json").read_text())
    # Keys of the model itself; others are about training in transformers and about the file.
    of_others = {"initializer_range", "transformers_version", "use_cache"}
    of_training = {"max_position_embeddings": 256, "router_aux_loss_coef": 0.0}
    assert written.items() >= of_training.items()
    missing = golden.keys() - of_others - of_training.keys()
    assert {name: written[name] for name in missing} == {name: golden[name] for name in missing}


@pytest.mark.parametrize("size", [1, 5, 49])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_padded_to_sizes_that_transformers_can_run(
    tmp_path: Path, size: int, dtype: olmoe.Dtype
) -> None:
    config = small_config(**{"moe.expert_size": size})
    given = draw(config)
    with logged() as messages:
        olmoe.export_olmoe(tmp_path / "out", config, given, dtype=dtype)
    model, loaded = load(tmp_path / "out")
    width = model.moe.expert_size
    assert width % 8 == 0
    assert 0 < width - size < 8
    assert f"padded experts with zeros from width {size} to {width}" in messages[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == width
    assert loaded.params["blocks"]["moe"].keys() == {"router", "gate", "up", "down"}
    for name, array in loaded.params["blocks"]["moe"].items():
        expected = given.params["blocks"]["moe"][name].astype(dtype).astype("float32")
        np.testing.assert_array_equal(array[tuple(map(slice, expected.shape))], expected)
        assert np.count_nonzero(array) == np.count_nonzero(expected)


def test_padded_experts_give_the_same_logits(tmp_path: Path) -> None:
    config = small_config(**{"moe.expert_size": 5})
    given = draw(config)
    olmoe.export_olmoe(tmp_path / "out", config, given)
    model, loaded = load(tmp_path / "out")
    run = jax.jit(lambda m: m(jnp.arange(11)[None], store=None).logits)
    narrow = run(given.model(config.model))
    wide = run(jax.tree.map(jnp.asarray, loaded).model(model))
    np.testing.assert_allclose(wide, narrow, atol=1e-5 * np.abs(narrow).max())


def test_a_hidden_size_that_transformers_may_not_run_is_logged(tmp_path: Path) -> None:
    config = small_config(hidden_size=12, num_heads=2)
    with logged() as messages:
        olmoe.export_olmoe(tmp_path / "out", config, draw(config))
    assert any("model.hidden_size=12 is not a multiple of 8" in message for message in messages)
    with logged() as messages:
        olmoe.export_olmoe(tmp_path / "other", small_config(), draw(small_config()))
    assert not messages


@pytest.mark.parametrize(
    ("given", "tokenizer", "expected"),
    [(-1, None, None), (7, None, 7), (-1, ByteTokenizer(), 256), (256, ByteTokenizer(), 256)],
)
def test_end_of_text_comes_from_the_tokenizer(
    given: int, tokenizer: Tokenizer | None, expected: int | None
) -> None:
    config = small_config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, end_of_text_id=given)
    )
    described = olmoe.describe(config, "float32", tokenizer)
    assert described["eos_token_id"] == described["bos_token_id"] == expected
    assert described["pad_token_id"] is None


def test_a_non_finite_model_is_not_exported(tmp_path: Path) -> None:
    given = draw(small_config())
    attention = given.params["blocks"]["attention"]
    attention["query"] = attention["query"].at[1].set(np.inf)
    with pytest.raises(InteropError, match=r"^model\.layers\.1\.self_attn\.q_proj\.weight: holds"):
        olmoe.export_olmoe(tmp_path / "out", small_config(), given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_round_trips(tmp_path: Path, tied: bool) -> None:
    config = small_config(**{"tie_embeddings": tied, "moe.renormalize": True, "rope_theta": 500.0})
    given = draw(config)
    assert ("head" in given.params) is not tied
    olmoe.export_olmoe(tmp_path / "out", config, given, max_shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model, loaded = load(tmp_path / "out")
    assert model == config.model
    assert_same_bits(loaded, given)


def test_bfloat16_is_kept_on_request(tmp_path: Path) -> None:
    config = small_config()
    given = draw(config)
    olmoe.export_olmoe(tmp_path / "out", config, given, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), given)
    assert_same_bits(load(tmp_path / "out", "bfloat16")[1], rounded)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)
    assert_same_bits(load(tmp_path / "out")[1], wide)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": "dense", "ffn_size": 8}, r"model\.ffn='dense': must be 'moe' to export"),
        ({"memory.layer": "product_key"}, r"model\.memory\.layer='product_key': must be 'none'"),
        ({"ffn_size": 8}, r"model\.ffn_size=8: must be 0 to export"),
        ({"query_key_norm": False}, r"model\.query_key_norm=False: must be True to export"),
    ],
)
def test_a_model_that_olmoe_cannot_express_is_rejected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InteropError, match=message):
        config = small_config(**changes)
        olmoe.export_olmoe(tmp_path / "out", config, weights.abstract(config.model))
    assert not (tmp_path / "out").exists()


def test_loading_holds_at_most_one_tensor_besides_the_result(tmp_path: Path) -> None:
    sizes = {"vocab_size": 4096, "hidden_size": 64, "moe.expert_size": 256}
    config = small_config(**sizes)
    olmoe.export_olmoe(tmp_path / "out", config, draw(config), max_shard_bytes=10**6)
    load(published(tmp_path / "warm"))  # excludes imports and tracing from the measurement
    load(tmp_path / "out")
    tracemalloc.start()
    _, loaded = load(tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = [leaf.nbytes for leaf in jax.tree.leaves(loaded)]
    largest = max(4096 * 64, 3 * 256 * 64) * 4
    assert sum(arrays) > 3 * largest
    assert peak < sum(arrays) + 1.2 * largest
