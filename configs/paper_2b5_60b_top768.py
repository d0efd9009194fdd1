"""UltraMemV2-2.5B/60B-top768, paper Tables 1 and 2.

The paper gives top-m and parameter totals. The other sizes are chosen as for the 25B model, with n
and the FFN such that 2.5B of 60B parameters are active.
"""

from ml_collections import ConfigDict

from configs import paper_2b5_25b


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = paper_2b5_25b.get_config()

    model = config.model
    model.ffn_size = 3120
    model.memory.num_keys = 1696
    model.memory.top_m = 768
    return config
