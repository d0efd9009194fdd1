"""Model families: the fields in which a baseline differs from UltraMemV2.

Every configuration file with published or matched sizes takes a family as its argument:

    python main.py --config=configs/tiny.py:pkm --workdir=runs/pkm

`switch` sets the fields of the family, then its sizes at that scale. Sizes that no paper gives come
from `python -m experiments.ablations.match`.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

Sizes = Mapping[str, Mapping[str, Any]]


def switch(config: ConfigDict, family: str, sizes: Sizes) -> ConfigDict:
    """Switches a configuration of UltraMemV2 to another family, and returns it.

    Args:
      config: configuration of UltraMemV2, which is changed in place.
      family: a key of FAMILIES or VARIANTS.
      sizes: for each family at this scale, values by path below `model`.

    Raises:
      ValueError: the family is unknown or does not exist at this scale.
    """
    known = [REFERENCE, *sizes, *(name for name, (of, _) in VARIANTS.items() if of in sizes)]
    if family not in known:
        nearest = "".join(
            f" (nearest: {name})" for name in difflib.get_close_matches(family, known, 1)
        )
        raise ValueError(f"family {family!r}: must be one of {', '.join(known)}{nearest}")
    if family in VARIANTS:
        base, change = VARIANTS[family]
        change(switch(config, base, sizes))
        return config
    FAMILIES[family](config)
    for path, value in sizes.get(family, {}).items():
        *sections, name = path.split(".")
        section = config.model
        for key in sections:
            section = section[key]
        section[name] = value
    return config


def dense(config: ConfigDict) -> None:
    """A transformer without memory layers, with a wider FFN."""
    config.model.memory.layer = "none"


def moe(config: ConfigDict) -> None:
    """OLMoE (arXiv 2409.02060): dropless experts instead of the FFN, 8 active per token."""
    config.model.memory.layer = "none"
    config.model.ffn = "moe"
    config.model.ffn_size = 0
    config.model.moe.top_k = 8
    config.loss.load_balance = 0.01
    config.loss.router_z_loss = 0.001


def moe_2_of_16(config: ConfigDict) -> None:
    """Two active experts, four times as wide: the baseline of UltraMem (arXiv 2411.12364)."""
    moe(config)
    config.model.moe.top_k = 2


def ultramem(config: ConfigDict) -> None:
    """UltraMem (arXiv 2411.12364), V1: few large memories with skips; implicit value expansion."""
    hidden_size, memory = config.model.hidden_size, config.model.memory
    memory.query = "shared"
    memory.key_dim = hidden_size // 4
    memory.key_expansion = 2
    memory.projection = "per_block"
    memory.num_heads = 2
    memory.value_dim = hidden_size // 2
    memory.pre_value_dim = 0
    config.loss.tucker_penalty = 0.001


def _product_keys(config: ConfigDict) -> None:
    """Additive scores, a query per head, and a softmax over the selection of each head."""
    memory = config.model.memory
    memory.scoring = "sum"
    memory.tucker_rank = memory.num_cores = 1
    memory.score_activation = "softmax"
    memory.query = "per_head"
    memory.key_norm = "none"
    memory.shuffle = False
    memory.value_dim = config.model.hidden_size
    memory.pre_value_dim = 0


def memory_plus(config: ConfigDict) -> None:
    """Memory+ (arXiv 2412.09764): one table for all memory layers, pooled values gated."""
    _product_keys(config)
    memory = config.model.memory
    memory.key_dim = config.model.hidden_size // 2
    memory.num_heads = 2
    memory.output_gate = "silu"
    # A window of four tables is one table that four layers share.
    memory.sharing = "block"
    memory.share_group = 4


def gated(config: ConfigDict) -> None:
    """Memory+ with the optional gate of its published code: the output times sigmoid(w . x + b)."""
    config.model.memory.layer = "umv2.model.memory.gated:GatedMemory"
    config.model.memory.bias = True


def pkm(config: ConfigDict) -> None:
    """Product-key memory (arXiv 1907.05242): one memory of plain values, 4 heads."""
    _product_keys(config)
    memory = config.model.memory
    memory.key_dim = config.model.hidden_size // 4
    memory.num_heads = 4
    memory.query_norm = "layer"
    memory.projection = "none"


def peer(config: ConfigDict) -> None:
    """PEER (arXiv 2407.04153): one layer of single-neuron experts, 8 heads."""
    _product_keys(config)
    memory = config.model.memory
    memory.key_dim = config.model.hidden_size // 4
    memory.num_heads = 8
    memory.query_norm = "none"
    memory.pre_value_dim = config.model.hidden_size
    memory.pre_projection = False
    memory.activation = "gelu"
    memory.projection = "none"


def peer_relu(config: ConfigDict) -> None:
    """PEER without competition between experts: a ReLU of each score instead of a softmax."""
    peer(config)
    config.model.memory.score_activation = "relu"


def own_experts(config: ConfigDict) -> None:
    """PEER with separate experts for each head, with the same total number of experts."""
    memory = config.model.memory
    memory.layer = "umv2.model.memory.own_experts:OwnExperts"
    memory.num_keys = max(1, round(memory.num_keys / math.sqrt(memory.num_heads)))


REFERENCE = "ultramem_v2"
FAMILIES: dict[str, Callable[[ConfigDict], None]] = {
    REFERENCE: lambda config: None,
    "moe": moe,
    "moe_2_of_16": moe_2_of_16,
    "dense": dense,
    "ultramem": ultramem,
    "memory_plus": memory_plus,
    "pkm": pkm,
    "peer": peer,
    "peer_relu": peer_relu,
}
# Families that modify another family and use its sizes.
VARIANTS: dict[str, tuple[str, Callable[[ConfigDict], None]]] = {
    "memory_plus_gated": ("memory_plus", gated),
    "peer_own_experts": ("peer", own_experts),
}
