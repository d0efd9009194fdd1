"""UltraMemV2-430M/5B, of the ablations in paper sections 4.2.1-4.2.3 and 4.2.6: 20 layers.

The paper gives the number of layers, and at most N = 789^2 values per layer. The other sizes are
chosen by its rules: D_k = h / 2 and D_p : D_v = 1 : 3, with h, D_p + D_v and the FFN such that 430M
of 5B parameters are active.
"""

from ml_collections import ConfigDict

from configs import paper_227m_1b2


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = paper_227m_1b2.get_config()

    model = config.model
    model.hidden_size = 1024
    model.num_heads = model.num_key_value_heads = 16
    model.ffn_size = 3456

    memory = model.memory
    memory.num_keys = 789
    memory.key_dim = 512
    memory.top_m = memory.shortlist = 48
    memory.value_dim = 288
    memory.pre_value_dim = 96
    return config
