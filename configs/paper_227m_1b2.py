"""The 227M/1.2B models of paper Table 10: 20 layers, trained on 500B tokens of OLMoE-mix-0924.

The paper reports train loss 2.500 and held-out loss 2.853 (Table 3). Set data.paths to OLMo/dolma
token files (.npy) made with the GPT-NeoX-20B tokenizer:

python main.py --config=configs/paper_227m_1b2.py --workdir=runs/227m \
--config.data.paths="('/data/olmoe-mix/*.npy',)"
"""

from ml_collections import ConfigDict

from configs import base, families

SIZES: families.Sizes = {
    # Table 10.
    "moe": {
        "moe.num_experts": 64,
        "moe.expert_size": 384,
    },
    "ultramem": {
        "ffn_size": 2752,
        "memory.read_layers": (2, 6, 10, 14),
        "memory.write_layers": (5, 9, 13, 17),
        "memory.num_keys": 808,
        "memory.top_m": 80,
        "memory.shortlist": 80,
    },
    "memory_plus": {
        "ffn_size": 3008,
        "memory.read_layers": (4, 8, 12, 16),
        "memory.write_layers": (4, 8, 12, 16),
        "memory.num_keys": 569,  # 1138 for the window of four tables
        "memory.top_m": 80,
        "memory.shortlist": 80,
    },
    # From python -m experiments.ablations.match.
    "moe_2_of_16": {
        "moe.num_experts": 16,
        "moe.expert_size": 1504,
    },
    "dense": {
        "ffn_size": 3008,
    },
    "pkm": {
        "ffn_size": 2936,
        "memory.read_layers": (10,),
        "memory.write_layers": (10,),
        "memory.top_m": 80,
        "memory.shortlist": 80,
        "memory.num_keys": 1138,
    },
    "peer": {
        "ffn_size": 2896,
        "memory.read_layers": (10,),
        "memory.write_layers": (10,),
        "memory.top_m": 20,
        "memory.shortlist": 20,
        "memory.num_keys": 805,
    },
    "peer_relu": {
        "ffn_size": 2896,
        "memory.read_layers": (10,),
        "memory.write_layers": (10,),
        "memory.top_m": 20,
        "memory.shortlist": 20,
        "memory.num_keys": 805,
    },
}
PUBLISHED = ("moe", "ultramem", "memory_plus")


def get_config(family: str = families.REFERENCE) -> ConfigDict:
    """Returns the configuration of a family; the files of larger sizes start from UltraMemV2's."""
    config = base.get_config()

    model = config.model
    model.vocab_size = 50304  # 50280 of GPT-NeoX-20B, padded
    model.hidden_size = 768
    model.num_layers = 20
    model.num_heads = model.num_key_value_heads = 12
    model.ffn_size = 2496  # gate and up together 4992
    model.tie_embeddings = True
    model.remat = "kernels"

    memory = model.memory
    memory.num_keys = 360
    memory.key_dim = 192
    memory.num_heads = 1
    memory.top_m = memory.shortlist = 32
    memory.value_dim = 192
    memory.pre_value_dim = 192
    memory.read_dtype = "compute"

    data = config.data
    data.source = "memmap"
    data.paths = ("data/*.npy",)
    data.memmap_dtype = "uint16"
    data.tokenizer = "none"
    data.end_of_text_id = 50279  # of OLMo's version of the tokenizer
    data.sequence_length = 4096
    data.held_out_fraction = 0.0005
    data.mask_across_documents = False  # as in OLMoE
    data.num_workers = 8

    optimizer = config.optimizer
    optimizer.learning_rate = 4e-4
    optimizer.warmup_steps = 2000
    # Table 10: 227M values at 4x, decaying to 1x.
    optimizer.values_multiplier = 4.0
    optimizer.values_final_multiplier = 1.0

    train = config.train
    train.batch_size = 768
    train.num_steps = 158_946  # 500B tokens
    train.evaluation_interval_steps = 1000
    train.checkpoint_interval_steps = 1000
    config.evaluation.batch_size = 768
    return families.switch(config, family, SIZES)
