"""UltraMemV2-2.5B/25B, paper Table 6.

The paper gives neither sizes nor the number of layers. They are chosen by its rules: h = 2560 and
32 layers as for the 120B model, D_k = h / 2, D_p : D_v = 1 : 3 with D_p + D_v = h / 4, shortlist
128, and n and the FFN such that 2.5B of 25B parameters are active.
"""

from ml_collections import ConfigDict

from configs import paper_1b_7b


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = paper_1b_7b.get_config()

    model = config.model
    model.hidden_size = 2560
    model.num_layers = 32
    model.num_heads = model.num_key_value_heads = 20
    model.ffn_size = 3536

    memory = model.memory
    memory.num_keys = 1048
    memory.key_dim = 1280
    memory.top_m = 256
    memory.shortlist = 128
    memory.value_dim = 480
    memory.pre_value_dim = 160
    return config
