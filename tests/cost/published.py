"""The sizes of UltraMemV2's Table 10 as configurations, for tests."""

from typing import Any

from configs import base
from umv2.config import Config, from_config_dict


def config(**sections: Any) -> Config:
    """Returns the base configuration with fields of `model`, of its `memory` and `moe` assigned."""
    assigned = base.get_config()
    for name in ("memory", "moe"):
        assigned.model[name].update(sections.pop(name, {}))
    assigned.model.update(sections)
    return from_config_dict(assigned)


def _published(hidden_size: int, num_layers: int, num_heads: int, **others: Any) -> Config:
    return config(
        vocab_size=50304,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        compute_dtype="bfloat16",
        **others,
    )


def olmoe_227m() -> Config:
    """OLMoE-227M/1.2B: 8 of 64 experts."""
    moe = {"num_experts": 64, "top_k": 8, "expert_size": 384}
    return _published(768, 20, 12, family="moe", ffn_size=0, tie_embeddings=True, moe=moe)


def olmoe_1b() -> Config:
    """OLMoE-1B/7B: 8 of 64 experts."""
    moe = {"num_experts": 64, "top_k": 8, "expert_size": 1024}
    return _published(2048, 16, 16, family="moe", ffn_size=0, tie_embeddings=False, moe=moe)


def ultramem_v2_227m() -> Config:
    """UltraMemV2-227M/1.2B: a memory layer of 360^2 values in every block."""
    memory = {"num_keys": 360, "key_dim": 192, "top_m": 32, "shortlist": 32}
    memory |= {"value_dim": 192, "pre_value_dim": 192}
    return _published(768, 20, 12, ffn_size=2496, tie_embeddings=True, memory=memory)


def ultramem_v2_1b() -> Config:
    """UltraMemV2-1B/7B: a memory layer of 528^2 values in every block."""
    memory = {"num_keys": 528, "key_dim": 512, "top_m": 128, "shortlist": 128}
    memory |= {"value_dim": 768, "pre_value_dim": 384}
    return _published(2048, 16, 16, ffn_size=5632, tie_embeddings=False, memory=memory)
