"""UltraMemV2-500M/6.8B, of the ablations in paper sections 4.2.4, 4.2.5 and 4.2.8: 24 layers.

The paper gives h, n, top-m, D_k (17 % of compute in the memory) and D_p : D_v = 72 : 216. Attention
heads of width 64 are our choice, and the FFN is such that 500M parameters are active.
"""

from ml_collections import ConfigDict

from configs import paper_227m_1b2


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = paper_227m_1b2.get_config()

    model = config.model
    model.hidden_size = 1152
    model.num_layers = 24
    model.num_heads = model.num_key_value_heads = 18
    model.ffn_size = 2400

    memory = model.memory
    memory.num_keys = 964
    memory.key_dim = 524
    memory.top_m = memory.shortlist = 94
    memory.value_dim = 216
    memory.pre_value_dim = 72
    return config
