"""The 1B/7B models of paper Table 10: 16 layers, trained on 1T tokens of OLMoE-mix-0924.

The paper reports train loss 2.266 and held-out loss 2.628 (Table 3), and 6.70B parameters. The
sizes in its table give 16 x 528^2 x (768 + 384) + 1.08B = 6.2B, as printed by `--mode=inspect`.
"""

from ml_collections import ConfigDict

from configs import families, paper_227m_1b2

SIZES: families.Sizes = {
    # Table 10.
    "moe": {
        "moe.num_experts": 64,
        "moe.expert_size": 1024,
    },
    # From python -m experiments.ablations.match.
    "moe_2_of_16": {
        "moe.num_experts": 17,
        "moe.expert_size": 3456,
    },
    "dense": {
        "ffn_size": 6896,
    },
    "ultramem": {
        "ffn_size": 6080,
        "memory.read_layers": (1, 5, 9, 13),
        "memory.write_layers": (4, 8, 12, 16),
        "memory.top_m": 288,
        "memory.shortlist": 128,
        "memory.num_keys": 1120,
    },
    "memory_plus": {
        "ffn_size": 5936,
        "memory.read_layers": (4, 8, 12, 16),
        "memory.write_layers": (4, 8, 12, 16),
        "memory.top_m": 144,
        "memory.shortlist": 144,
        "memory.num_keys": 792,
    },
    "pkm": {
        "ffn_size": 6720,
        "memory.read_layers": (8,),
        "memory.write_layers": (8,),
        "memory.top_m": 288,
        "memory.shortlist": 288,
        "memory.num_keys": 1584,
    },
    "peer": {
        "ffn_size": 6608,
        "memory.read_layers": (8,),
        "memory.write_layers": (8,),
        "memory.top_m": 72,
        "memory.shortlist": 72,
        "memory.num_keys": 1120,
    },
    "peer_relu": {
        "ffn_size": 6608,
        "memory.read_layers": (8,),
        "memory.write_layers": (8,),
        "memory.top_m": 72,
        "memory.shortlist": 72,
        "memory.num_keys": 1120,
    },
}
PUBLISHED = ("moe",)


def get_config(family: str = families.REFERENCE) -> ConfigDict:
    """Returns the configuration of a family (configs/families.py)."""
    config = paper_227m_1b2.get_config()

    model = config.model
    model.hidden_size = 2048
    model.num_layers = 16
    model.num_heads = model.num_key_value_heads = 16
    model.ffn_size = 5632  # gate and up together 11264
    model.tie_embeddings = False

    memory = model.memory
    memory.num_keys = 528
    memory.key_dim = 512
    memory.top_m = memory.shortlist = 128
    memory.value_dim = 768
    memory.pre_value_dim = 384

    optimizer = config.optimizer
    optimizer.values_multiplier = 1.0  # Table 10: 1x

    config.train.batch_size = 1024
    config.train.num_steps = 238_419  # 1T tokens
    config.evaluation.batch_size = 1024
    return families.switch(config, family, SIZES)
