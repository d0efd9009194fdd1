"""UltraMemV2-1B/7B, paper Table 10: 16 layers, trained on 1T tokens of OLMoE-mix-0924.

The paper reports train loss 2.266 and held-out loss 2.628 (Table 3), and 6.70B parameters; its own
row adds up to 16 x 528^2 x (768 + 384) + 1.08B = 6.2B, which is what `--mode=inspect` prints.
"""

from ml_collections import ConfigDict

from configs import ultramem_v2_227m_1b2


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ultramem_v2_227m_1b2.get_config()

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
    return config
