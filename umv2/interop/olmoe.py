"""Mixtures of experts as Hugging Face OLMoE (arXiv 2409.02060), both ways.

Files hold matrices as [out, in], ours are [in, out]. Two layouts of the experts are read: one
matrix each, which is how models are published and what is written, and one tensor for all experts
of a layer, gate above up, which is how newer transformers keep them.
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
from umv2.interop.model_files import require_numbers
from umv2.interop.tensor_files import (
    CONFIG,
    MAX_SHARD_BYTES,
    InteropError,
    TensorFolder,
    read_json,
    write_folder,
)
from umv2.interop.tokenizer_files import files_of
from umv2.model import weights
from umv2.model.weights import Weights

MODEL_TYPE, ARCHITECTURE = "olmoe", "OlmoeForCausalLM"
Dtype = Literal["float32", "bfloat16"]
Layout = Literal["published", "stacked"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Our names of what the files call ...
_OUTSIDE = {
    _EMBEDDING: "params/embedding",
    _HEAD: "params/head",
    "model.norm.weight": "params/final_norm/weight",
}
# ... `model.layers.{layer}.` and this.
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
# Frequencies of rotary positions, which older versions of transformers saved; newer ones skip them.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# transformers multiplies all experts by one kernel, whose rows must begin at multiples of 16 bytes:
# of eight numbers in bfloat16.
_WIDTH_MULTIPLE = 8
_MAX_INTEGER = 2**31 - 1

# What a configuration may not ask for, and what it must leave it at.
_FIXED: dict[str, tuple[Any, str]] = {
    "clip_qkv": (None, "queries, keys and values are not clipped here"),
    "partial_rotary_factor": (1, "all of a head is rotated here"),
    "attention_bias": (False, "the attention has no biases here"),
    "attention_dropout": (0, "the attention has no dropout here"),
    "sliding_window": (None, "attention reaches all earlier positions here"),
    "use_sliding_window": (False, "attention reaches all earlier positions here"),
    "quantization_config": (None, "weights are not quantised here"),
}
_FIXED_ROPE: dict[str, tuple[Any, str]] = {
    "rope_type": ("default", "rotary positions are not scaled here"),
    "type": ("default", "rotary positions are not scaled here"),
    "partial_rotary_factor": (1, "all of a head is rotated here"),
    "factor": (1, "rotary positions are not scaled here"),
}


def read_config(folder: Path, base: ModelConfig) -> ModelConfig:
    """Returns the model that a folder's `config.json` describes.

    What the file does not say, how the model is computed, comes from `base`. Absent keys have the
    defaults of transformers' OlmoeConfig, sizes excepted.

    Raises:
      InteropError: the file is missing or damaged, a size is, or the model is one that we cannot
        compute; the message names the key, its value and the rule.
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
    """Reads a model of either layout, in one file or in shards.

    Args:
      folder: with `config.json` and `model.safetensors`, or shards and their index.
      base: says what the files do not, see `read_config`.
      dtype: of the result. bfloat16 keeps what is published so, and rounds wider numbers.

    Returns:
      The model's configuration and its weights, as NumPy arrays. Beside them, reading holds one
      tensor at a time.

    Raises:
      InteropError: not a model that we can compute, or tensors that are missing, unknown, of
        another shape, or not finite.
    """
    model, files = read_config(folder, base), TensorFolder(folder)
    require_numbers(files, model)
    files.leave_out([name for name in files.shapes if _DERIVED.fullmatch(name)])
    if model.tie_embeddings and files.shapes.keys() >= {_EMBEDDING, _HEAD}:
        if not np.array_equal(files.read(_EMBEDDING), files.read(_HEAD)):
            raise InteropError(
                f"{folder}: {_HEAD} differs from {_EMBEDDING}, though {CONFIG} says"
                " tie_word_embeddings"
            )
        files.leave_out([_HEAD])
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
        del tensor, pieces, piece  # or two tensors are held while the next is read
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
    """Writes a mixture of experts in the published layout, of which transformers reads all.

    Experts whose width is no multiple of 8 are filled up with zeros, which changes no output:
    transformers could load them as they are, and not run them.

    Raises:
      InteropError: OLMoE has no place for something in this model, the folder is in use or cannot
        be written, or a tensor holds NaN or infinity.
    """
    described = describe(config, dtype, tokenizer)
    arrays = {name: np.asarray(leaf) for name, leaf in trained.named().items()}
    width, padded = config.model.moe.expert_size, described["intermediate_size"]
    if padded != width:
        logging.info(
            "experts are padded with zeros from %d to %d, as %s says", width, padded, CONFIG
        )
        for name, axis in zip(_EXPERT.values(), (-1, -1, -2), strict=True):
            widths = [(0, 0)] * arrays[name].ndim
            widths[axis] = (0, padded - width)
            arrays[name] = np.pad(arrays[name], widths)
    if config.model.hidden_size % _WIDTH_MULTIPLE:
        logging.warning(
            "model.hidden_size=%d is no multiple of %d: transformers may run this model only with"
            " from_pretrained(..., experts_implementation='eager')",
            config.model.hidden_size,
            _WIDTH_MULTIPLE,
        )
    views = _views(arrays, config.model, "published")
    tensors = {name: view for name, (view,) in views.items()}
    write_folder(
        folder,
        described,
        tensors,
        others=files_of(tokenizer, config.data),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def describe(config: Config, dtype: Dtype, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Returns the `config.json` of a mixture of experts, with the ids of its tokenizer.

    Raises:
      InteropError: OLMoE has no place for something in this model.
    """
    model = config.model
    for name, value, needed, rule in (
        ("ffn", model.ffn, "moe", "OLMoE has experts in every block"),
        ("memory.layer", model.memory.layer, "none", "OLMoE has no memory layers"),
        ("ffn_size", model.ffn_size, 0, "OLMoE has no FFN beside its experts"),
        ("query_key_norm", model.query_key_norm, True, "OLMoE normalises queries and keys"),
        ("rope_scaling", model.rope_scaling, "none", "OLMoE's positions are not scaled"),
        ("attention_window", model.attention_window, 0, "OLMoE attends to all that precedes"),
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
        # Under its old name and its new one.
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
        # transformers' default for padding, 1, would be one of our tokens.
        "pad_token_id": None,
        # What precedes a document in training ends another one.
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


class _Values:
    """What a configuration file says, each value checked as it is asked for."""

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
    """Reads the base of rotary positions under all its names, and refuses scaled positions."""
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
    """Returns each tensor of a layout as views of our arrays, with the strides of the file's axes.

    Assigning to the views fills the arrays, reading them gives the tensors. Where there are two,
    the tensor is both, one after the other along its second axis.
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
