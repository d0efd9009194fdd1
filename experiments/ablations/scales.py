"""Base configurations of the scales that ablations run at.

`smoke`: seconds, for tests | `cpu`: minutes per arm on 2 cores | `gpu`: minutes per arm on one
H200, bfloat16 | `paper`: the published sizes, from the file of configs/ for a section of the paper.
An ablation makes the same comparison at each scale; only sizes, data and length differ.
"""

import importlib

from ml_collections import ConfigDict

from configs import base

# `python -m experiments.ablations.run` makes missing corpora and tokenizers here (corpora.py). The
# tokenizer of `cpu` is committed, so that its tokens are the same everywhere.
CORPORA = "runs/ablations/corpora"
CPU_TOKENIZER = "experiments/bpe_2048.json"
MULTI_HOP_TEXT = f"{CORPORA}/multi_hop.jsonl"


def smoke() -> ConfigDict:
    """Seconds on any machine: bytes, 6 steps."""
    config = base.get_config()
    model = config.model
    model.hidden_size = 32
    model.num_layers = 4
    model.num_heads = model.num_key_value_heads = 2
    model.ffn_size = 64
    model.compute_dtype = "float32"
    memory = model.memory
    memory.num_keys = 64
    memory.key_dim = 16
    memory.top_m = memory.shortlist = 8
    memory.value_dim = 12
    memory.pre_value_dim = 4
    config.data.sequence_length = 32
    config.data.held_out_fraction = 0.012
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 2
    _lengths(config, num_steps=6, batch_size=8)
    config.evaluation.batch_size = 64
    config.train.log_interval_steps = 2
    return config


def cpu() -> ConfigDict:
    """About a minute per run on one core: 0.24M active, 1.4M total, BPE of the standard library.

    The vocabulary is small because at this width a larger one would take most of the FLOPs. D_k is
    only h / 4 because n is large relative to h: retrieval and memory then take a fifth of the FLOPs
    outside the head, as in the paper's 500M model. Learning rates of values are the paper's for
    short runs.
    """
    config = base.get_config()
    model = config.model
    model.vocab_size = 2048
    model.hidden_size = 64
    model.num_layers = 4
    model.num_heads = model.num_key_value_heads = 4
    model.ffn_size = 162  # a size that a mixture of experts can match to 1 %
    model.compute_dtype = "float32"  # CPUs emulate bfloat16
    memory = model.memory
    memory.num_keys = 96
    memory.key_dim = 16
    memory.top_m = memory.shortlist = 16
    memory.value_dim = 24
    memory.pre_value_dim = 8
    config.data.tokenizer = CPU_TOKENIZER
    config.data.sequence_length = 128
    config.optimizer.learning_rate = 1e-2  # best of 2e-3, 5e-3, 1e-2, 2e-2 (n 128, one seed)
    config.optimizer.warmup_steps = 40
    config.optimizer.values_multiplier = 4.0
    config.optimizer.values_final_multiplier = 1.0
    _lengths(config, num_steps=320, batch_size=8)
    config.train.log_interval_steps = 4
    config.evaluation.batch_size = 32
    return config


def gpu() -> ConfigDict:
    """Minutes per run on one H200: 45M active, 260M total, 98M tokens of installed sources."""
    config = base.get_config()
    model = config.model
    model.vocab_size = 16_384
    model.hidden_size = 512
    model.num_layers = 12
    model.num_heads = model.num_key_value_heads = 8
    model.ffn_size = 1536
    memory = model.memory
    memory.num_keys = 384
    memory.key_dim = 256
    memory.top_m = memory.shortlist = 32
    memory.value_dim = 96
    memory.pre_value_dim = 32
    config.data.source = "site_packages"
    config.data.tokenizer = f"{CORPORA}/site_packages_bpe_16384.json"
    config.data.sequence_length = 1024
    config.data.held_out_fraction = 0.02
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.values_multiplier = 4.0
    config.optimizer.values_final_multiplier = 1.0
    _lengths(config, num_steps=1500, batch_size=64)
    config.evaluation.batch_size = 64
    return config


def paper(file: str) -> ConfigDict:
    """A published size, from a file of configs/."""
    config: ConfigDict = importlib.import_module(f"configs.{file}").get_config()
    return config


def _lengths(config: ConfigDict, *, num_steps: int, batch_size: int) -> None:
    config.train.num_steps = num_steps
    config.train.batch_size = batch_size
    config.train.evaluation_interval_steps = num_steps
    config.train.checkpoint_interval_steps = max(1, num_steps // 2)
    config.train.num_checkpoints_kept = 1
    config.train.tensorboard = False


SCALES = ("smoke", "cpu", "gpu", "paper")
