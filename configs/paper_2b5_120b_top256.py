"""UltraMemV2-2.5B/120B-top256, paper Table 1: shortlist 128.

The paper gives top-m, shortlist and parameter totals. The other sizes are chosen as for the 60B
model, but with rows twice as wide (D_p + D_v = h / 2), which doubles the total without changing
retrieval.
"""

from ml_collections import ConfigDict

from configs import paper_2b5_60b_top768


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = paper_2b5_60b_top768.get_config()

    model = config.model
    model.ffn_size = 2928
    model.memory.top_m = 256
    model.memory.value_dim = 960
    model.memory.pre_value_dim = 320
    return config
