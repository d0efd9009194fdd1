"""Byte-level UltraMemV2 on the long-context tasks and the standard library, in CPU minutes.

python main.py --config=configs/long_context_tiny.py --workdir=runs/long_context
python main.py --workdir=runs/long_context --mode=evaluate --suite=long_context
"""

from ml_collections import ConfigDict

from configs import families, tiny

# Matched in active and total parameters, FLOPs and values read by
# python -m experiments.ablations.match.
SIZES: families.Sizes = {
    "moe": {"moe.num_experts": 15, "moe.expert_size": 25},
    "dense": {"ffn_size": 205},
}


def get_config(family: str = families.REFERENCE) -> ConfigDict:
    """Returns the configuration of a family (configs/families.py)."""
    config = tiny.get_config()

    model = config.model
    model.hidden_size = 64
    model.num_layers = 3
    model.num_heads = model.num_key_value_heads = 2
    model.ffn_size = 128
    # With QK-norm at this width, attention cannot single out one of 256 positions until the norm
    # weights have grown.
    model.query_key_norm = False

    memory = model.memory
    memory.num_keys = 32
    memory.key_dim = 32
    memory.top_m = memory.shortlist = 8
    memory.value_dim = 24
    memory.pre_value_dim = 8

    config.data.held_out_fraction = 0.02

    tasks = config.data.long_context
    tasks.tasks = config.evaluation.long_context.tasks
    tasks.num_documents = 4000
    tasks.context_weight = 0.02
    tasks.warm_up_steps = 250
    tasks.text_fraction = 0.15

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3
    optimizer.warmup_steps = 100
    optimizer.final_fraction = 0.1

    train = config.train
    train.num_steps = 1200
    train.batch_size = 16
    train.log_interval_steps = 50
    train.evaluation_interval_steps = 400
    train.checkpoint_interval_steps = 400
    return families.switch(config, family, SIZES)
