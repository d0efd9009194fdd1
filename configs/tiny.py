"""UltraMemV2 on the sources of Python's standard library, byte by byte, in CPU minutes.

    make train

Under 3 minutes of training on 2 CPU cores; 2.24 bits per byte on held-out text.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the configuration."""
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
    return config
