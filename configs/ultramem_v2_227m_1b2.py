"""UltraMemV2-227M/1.2B, paper Table 10: 20 layers, trained on 500B tokens of OLMoE-mix-0924.

The paper reports train loss 2.500 and held-out loss 2.853 (Table 3). Point data.paths at
OLMo/dolma token files (.npy) made with the GPT-NeoX-20B tokenizer:

python main.py --config=configs/ultramem_v2_227m_1b2.py --workdir=runs/227m \
--config.data.paths="('/data/olmoe-mix/*.npy',)"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the configuration; the larger published sizes assign to it."""
    config = base.get_config()

    model = config.model
    model.vocab_size = 50304  # 50280 of GPT-NeoX-20B, padded
    model.hidden_size = 768
    model.num_layers = 20
    model.num_heads = model.num_key_value_heads = 12
    model.ffn_size = 2496  # gate and up together 4992
    model.tie_embeddings = True
    model.remat = "full"

    memory = model.memory
    memory.num_keys = 360
    memory.key_dim = 192
    memory.num_heads = 1
    memory.top_m = memory.shortlist = 32
    memory.value_dim = 192
    memory.pre_value_dim = 192

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
    return config
