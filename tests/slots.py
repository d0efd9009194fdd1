"""Short names for the contents of a block's slots, for tests."""

from typing import Any

from ml_collections import ConfigDict

SLOTS: dict[str, tuple[str, str]] = {
    "dense": ("dense", "none"),
    "memory": ("dense", "product_key"),
    "moe": ("moe", "none"),
    "both": ("moe", "product_key"),
}


def fill(config: ConfigDict, slots: str, **model: Any) -> None:
    """Sets `model.ffn` and `model.memory.layer`, and other fields of the model.

    Args:
      config: a configuration from configs/base.py, changed in place.
      slots: dense | memory: with a dense FFN | moe | both: a memory with experts.
      **model: fields of `model`; the default `ffn_size` of a mixture of experts is 0.
    """
    config.model.ffn, config.model.memory.layer = SLOTS[slots]
    if config.model.ffn == "moe":
        config.model.ffn_size = 0
    config.model.update(model)
