"""Import and export of mixtures of experts as Hugging Face OLMoE (arXiv 2409.02060).

Files store matrices as [out, in], ours are [in, out]. Two layouts of the experts are supported for
import: one matrix per expert, as models are published and as we write them, and one tensor for all
experts of a layer with gate above up, as newer versions of transformers store them.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from absl import logging

from umv2.config import Config, ModelConfig
from umv2.config.schema import ConfigError, build
from umv2.data.tokenizers import Tokenizer
from umv2.interop.model_files import check_size
from umv2.interop.tensor_files import (
    CONFIG,
    MAX_SHARD_BYTES,
    InteropError,
    TensorFolder,
    read_json,
    write_folder,
)
from umv2.interop.tokenizer_files import file_contents
from umv2.model import weights
from umv2.model.weights import Weights

MODEL_TYPE, ARCHITECTURE = "olmoe", "OlmoeForCausalLM"
Dtype = Literal["float32", "bfloat16"]
Layout = Literal["published", "stacked"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Our names of the arrays that the files name ...
_OUTSIDE = {
    _EMBEDDING: "params/embedding",
    _HEAD: "params/head",
    "model.norm.weight": "params/final_norm/weight",
}
# ... `model.layers.{layer}.`, followed by this.
_IN_LAYER = {
    "input_layernorm.weight": "params/blocks/attention_norm/weight",
    "self_attn.q_proj.weight": "params/blocks/attention/query",
    "self_attn.k_proj.weight": "params/blocks/attention/key",
    "self_attn.v_proj.weight": "params/blocks/attention/value",
    "self_attn.o_proj.weight": "params/blocks/attention/output",
    "self_attn.q_norm.weight": "params/blocks/attention/query_norm/weight",
    "self_attn.k_norm.weight": "params/blocks/attention/key_norm/weight",
    "post_attention_layernorm.weight": "params/blocks/ffn_norm/weight",
    "mlp.gate.weight": "params/blocks/moe/router",
}
_EXPERT = {
    "gate_proj": "params/blocks/moe/gate",
    "up_proj": "params/blocks/moe/up",
    "down_proj": "params/blocks/moe/down",
}
_BY_VOCABULARY = ("params/embedding", "params/head")  # [vocabulary, hidden] here as there
# RoPE frequencies, which older versions of transformers saved and newer ones ignore.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# transformers runs all experts in one grouped matmul, whose rows must be aligned to 16 bytes: to
# eight bfloat16 elements.
_WIDTH_MULTIPLE = 8
_MAX_INTEGER = 2**31 - 1

# Keys of a configuration that we do not support, the required value and the reason.
_FIXED: dict[str, tuple[Any, str]] = {
    "clip_qkv": (None, "queries, keys and values are not clipped here"),
    "partial_rotary_factor": (1, "RoPE rotates complete heads here"),
    "attention_bias": (False, "attention has no biases here"),
    "attention_dropout": (0, "attention has no dropout here"),
    "sliding_window": (None, "attention sees all earlier positions here"),
    "use_sliding_window": (False, "attention sees all earlier positions here"),
    "quantization_config": (None, "weights are not quantised here"),
}
_FIXED_ROPE: dict[str, tuple[Any, str]] = {
    "rope_type": ("default", "RoPE is not scaled here"),
    "type": ("default", "RoPE is not scaled here"),
    "partial_rotary_factor": (1, "RoPE rotates complete heads here"),
    "factor": (1, "RoPE is not scaled here"),
}


def read_config(folder: Path, base: ModelConfig) -> ModelConfig:
    """Returns the model configuration that a folder's `config.json` describes.

    Fields that the file does not cover, i.e. how the model is computed, come from `base`. Absent
    keys have the defaults of transformers' OlmoeConfig, except sizes, which are required.

    Raises:
      InteropError: the file is missing or damaged, a size is missing or invalid, or we do not
        support the model; the message names the key, its value and the rule.
    """
    path = folder / CONFIG
    given = _Values(path, read_json(path))
    given.require("model_type", (MODEL_TYPE,), f"must be {MODEL_TYPE!r}")
    given.require("architectures", (None, [], [ARCHITECTURE]), f"must be [{ARCHITECTURE!r}]")
    given.require("hidden_act", (None, "silu", "swish"), "must be 'silu': experts are SwiGLU here")
    for key, (value, rule) in _FIXED.items():
        given.require(key, (None, value), f"must be {value!r}: {rule}")
    hidden, heads = given.integer("hidden_size"), given.integer("num_attention_heads")
    given.require("head_dim", (None, hidden // heads), "must be hidden_size / num_attention_heads")
    num_experts = given.integer("num_experts")
    model = dataclasses.replace(
        base,
        ffn="moe",
        memory=dataclasses.replace(base.memory, layer="none"),
        vocab_size=given.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=given.integer("num_hidden_layers"),
        num_heads=heads,
        num_key_value_heads=given.integer("num_key_value_heads", heads),
        ffn_size=0,
        tie_embeddings=given.boolean("tie_word_embeddings", False),
        rope_theta=_read_rope_theta(given),
        rope_scaling="none",
        rope_scale=1.0,
        attention_window=0,
        norm_epsilon=given.number("rms_norm_eps", 1e-5),
        query_key_norm=True,
        moe=dataclasses.replace(
            base.moe,
            num_experts=num_experts,
            top_k=given.integer("num_experts_per_tok"),
            expert_size=given.integer("intermediate_size"),
            renormalize=given.boolean("norm_topk_prob", False),
        ),
    )
    try:
        build(ModelConfig, dataclasses.asdict(model), "model.").validate()
    except ConfigError as error:
        raise InteropError(f"{path}: as our {error}") from error
    return model


def load_olmoe(
    folder: Path, base: ModelConfig, dtype: Dtype = "float32"
) -> tuple[ModelConfig, Weights]:
    """Loads a model of either layout, in one file or in shards.

    Args:
      folder: with `config.json` and `model.safetensors`, or shards and their index.
      base: supplies the fields that the files do not, see `read_config`.
      dtype: of the result; bfloat16 rounds wider dtypes.

    Returns:
      The model's configuration, and its weights as NumPy arrays. Loading holds one more tensor in
      memory at a time.

    Raises:
      InteropError: we do not support the model, or tensors are missing, unknown, of another shape,
        or not finite.
    """
    model, files = read_config(folder, base), TensorFolder(folder)
    check_size(files, model)
    files.drop([name for name in files.shapes if _DERIVED.fullmatch(name)])
    if model.tie_embeddings and files.shapes.keys() >= {_EMBEDDING, _HEAD}:
        if not np.array_equal(files.read(_EMBEDDING), files.read(_HEAD)):
            raise InteropError(
                f"{folder}: {_HEAD} differs from {_EMBEDDING}, but {CONFIG} sets"
                " tie_word_embeddings"
            )
        files.drop([_HEAD])
    abstract = weights.abstract(model)
    arrays = {name: np.empty(leaf.shape, dtype) for name, leaf in abstract.named().items()}
    stacked = "model.layers.0.mlp.experts.gate_up_proj" in files.shapes
    views = _views(arrays, model, "stacked" if stacked else "published")
    files.check(
        {name: _shape(parts) for name, parts in views.items()},
        dict.fromkeys(views, ("float32", "bfloat16", "float16")),
    )
    for name, tensor in files:
        parts = views[name]
        pieces = np.split(tensor, len(parts), axis=1) if len(parts) > 1 else [tensor]
        for part, piece in zip(parts, pieces, strict=True):
            part[...] = piece
        del tensor, pieces, piece  # else two tensors would be in memory while the next is read
    return model, jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))


def export_olmoe(
    folder: Path,
    config: Config,
    trained: Weights,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a mixture of experts in the published layout; transformers loads every tensor of it.

    Pads the width of experts with zeros to a multiple of 8, which does not change the output:
    transformers could load other widths but not run them.

    Raises:
      InteropError: OLMoE does not support the model, the folder is not empty or cannot be written,
        or a tensor is not finite.
    """
    described = describe(config, dtype, tokenizer)
    arrays = {name: np.asarray(leaf) for name, leaf in trained.named().items()}
    width, padded = config.model.moe.expert_size, described["intermediate_size"]
    if padded != width:
        logging.info(
            "padded experts with zeros from width %d to %d, as stated in %s", width, padded, CONFIG
        )
        for name, axis in zip(_EXPERT.values(), (-1, -1, -2), strict=True):
            widths = [(0, 0)] * arrays[name].ndim
            widths[axis] = (0, padded - width)
            arrays[name] = np.pad(arrays[name], widths)
    if config.model.hidden_size % _WIDTH_MULTIPLE:
        logging.warning(
            "model.hidden_size=%d is not a multiple of %d: transformers may run this model only"
            " with from_pretrained(..., experts_implementation='eager')",
            config.model.hidden_size,
            _WIDTH_MULTIPLE,
        )
    views = _views(arrays, config.model, "published")
    tensors = {name: view for name, (view,) in views.items()}
    write_folder(
        folder,
        described,
        tensors,
        others=file_contents(tokenizer, config.data),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def describe(config: Config, dtype: Dtype, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Returns the `config.json` of a mixture of experts, with the ids of its tokenizer.

    Raises:
      InteropError: OLMoE does not support the model.
    """
    model = config.model
    for name, value, needed, rule in (
        ("ffn", model.ffn, "moe", "OLMoE has experts in every block"),
        ("memory.layer", model.memory.layer, "none", "OLMoE has no memory layers"),
        ("ffn_size", model.ffn_size, 0, "OLMoE has no dense FFN"),
        ("query_key_norm", model.query_key_norm, True, "OLMoE normalises queries and keys"),
        ("rope_scaling", model.rope_scaling, "none", "OLMoE does not scale RoPE"),
        ("attention_window", model.attention_window, 0, "OLMoE attends to all earlier positions"),
    ):
        if value != needed:
            raise InteropError(f"model.{name}={value!r}: must be {needed!r} to export: {rule}")
    end_of_text_id = tokenizer.end_of_text_id if tokenizer else config.data.end_of_text_id
    end_of_text = end_of_text_id if end_of_text_id >= 0 else None
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": -(-model.moe.expert_size // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.renormalize,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        # transformers' old name and new name.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "torch_dtype": dtype,
        "dtype": dtype,
        "max_position_embeddings": config.data.sequence_length,
        "router_aux_loss_coef": config.loss.load_balance,
        "output_router_logits": False,
        "hidden_act": "silu",
        "clip_qkv": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # transformers' default, 1, is an ordinary token of ours.
        "pad_token_id": None,
        # In training, end-of-text precedes each document.
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


class _Values:
    """The values of a configuration file, checked on access."""

    def __init__(self, path: Path, given: Mapping[str, Any], prefix: str = ""):
        self.given, self.path, self.prefix = given, path, prefix

    def reject(self, key: str, rule: str) -> NoReturn:
        raise InteropError(
            f"{self.path}: {self.prefix}{key}={self.given.get(key)!r}: {rule}"
            if key in self.given
            else f"{self.path}: {self.prefix}{key}: missing; {rule}"
        )

    def require(self, key: str, allowed: tuple[Any, ...], rule: str) -> None:
        if self.given.get(key) not in allowed:
            self.reject(key, rule)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
            self.reject(key, f"must be an integer from 1 to {_MAX_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            self.reject(key, "must be a finite number > 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self.reject(key, "must be true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.given.get(key)
        return default if value is None else value


def _read_rope_theta(given: _Values) -> float:
    """Reads RoPE's theta under all its names, and rejects scaled RoPE."""
    theta = given.number("rope_theta", 10000.0)
    for section in ("rope_scaling", "rope_parameters"):
        parameters = given.given.get(section) or {}
        if not isinstance(parameters, dict):
            given.reject(section, "must be a mapping")
        nested = _Values(given.path, parameters, f"{section}.")
        for key, (value, rule) in _FIXED_ROPE.items():
            nested.require(key, (None, value), f"must be {value!r}: {rule}")
        new = nested.number("rope_theta", theta)
        if "rope_theta" in given.given and new != theta:
            given.reject("rope_theta", f"must be {section}.rope_theta = {new!r}")
        theta = new
    return theta


def _views(
    arrays: Mapping[str, np.ndarray], model: ModelConfig, layout: Layout
) -> dict[str, list[np.ndarray]]:
    """Returns the tensors of a layout as views of our arrays, with axes in the order of the file.

    Assigning to the views fills the arrays, and reading them yields the tensors. A tensor with two
    views is their concatenation along axis 1.
    """

    def view(name: str, *index: int) -> np.ndarray:
        array = arrays[name][index]
        return array if array.ndim == 1 or name in _BY_VOCABULARY else array.swapaxes(-2, -1)

    views = {theirs: [view(ours)] for theirs, ours in _OUTSIDE.items() if ours in arrays}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for theirs, ours in _IN_LAYER.items():
            views[prefix + theirs] = [view(ours, layer)]
        experts = f"{prefix}mlp.experts."
        if layout == "stacked":
            gate, up, down = (view(ours, layer) for ours in _EXPERT.values())
            views[experts + "gate_up_proj"] = [gate, up]
            views[experts + "down_proj"] = [down]
            continue
        for expert in range(model.moe.num_experts):
            for theirs, ours in _EXPERT.items():
                views[f"{experts}{expert}.{theirs}.weight"] = [view(ours, layer, expert)]
    return views


def _shape(parts: list[np.ndarray]) -> tuple[int, ...]:
    first, *others = parts
    return (
        first.shape if not others else (len(first), len(parts) * first.shape[1], *first.shape[2:])
    )
