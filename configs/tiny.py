"""Byte-level UltraMemV2 on the source code of Python's standard library, in CPU minutes.

    make train

Under 3 minutes of training on 2 CPU cores; 2.25 bits per byte on held-out text
(mean of three seeds).
"""

from ml_collections import ConfigDict

from configs import base, families

# Matched in active and total parameters, FLOPs and values read by
# python -m experiments.ablations.match.
SIZES: families.Sizes = {
    "moe": {
        "moe.num_experts": 22,
        "moe.expert_size": 49,
    },
    "moe_2_of_16": {
        "moe.num_experts": 5,
        "moe.expert_size": 204,
    },
    "dense": {
        "ffn_size": 407,
    },
    "ultramem": {
        "ffn_size": 290,
        "memory.read_layers": (1, 3),
        "memory.write_layers": (2, 4),
        "memory.top_m": 8,
        "memory.shortlist": 8,
        "memory.num_keys": 91,
    },
    "memory_plus": {
        "ffn_size": 249,
        "memory.num_heads": 1,
        "memory.top_m": 4,
        "memory.shortlist": 4,
        "memory.num_keys": 45,
    },
    "pkm": {
        "ffn_size": 371,
        "memory.read_layers": (2,),
        "memory.write_layers": (2,),
        "memory.top_m": 4,
        "memory.shortlist": 4,
        "memory.num_keys": 90,
    },
    "peer": {
        "ffn_size": 390,
        "memory.read_layers": (2,),
        "memory.write_layers": (2,),
        "memory.num_heads": 2,
        "memory.top_m": 4,
        "memory.shortlist": 4,
        "memory.num_keys": 64,
    },
    "peer_relu": {
        "ffn_size": 390,
        "memory.read_layers": (2,),
        "memory.write_layers": (2,),
        "memory.num_heads": 2,
        "memory.top_m": 4,
        "memory.shortlist": 4,
        "memory.num_keys": 64,
    },
}


def get_config(family: str = families.REFERENCE) -> ConfigDict:
    """Returns the configuration of a family (configs/families.py)."""
    config = base.get_config()

    model = config.model
    model.hidden_size = 128
    model.num_layers = 4
    model.num_heads = model.num_key_value_heads = 4
    model.ffn_size = 256
    model.compute_dtype = "float32"  # CPUs emulate bfloat16

    memory = model.memory
    memory.num_keys = 64
    memory.key_dim = 64
    memory.top_m = memory.shortlist = 8
    memory.value_dim = 48
    memory.pre_value_dim = 16

    config.data.sequence_length = 256

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-3
    optimizer.warmup_steps = 30

    train = config.train
    train.num_steps = 360
    train.batch_size = 8
    train.evaluation_interval_steps = 180
    train.checkpoint_interval_steps = 120
    config.evaluation.batch_size = 32
    return families.switch(config, family, SIZES)
