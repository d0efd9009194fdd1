"""What stands in the slots of a block, by the short names that tests use."""

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
      config: of the base, changed in place.
      slots: dense | memory: beside a dense FFN | moe | both: a memory beside experts.
      **model: fields of `model`; without `ffn_size`, that of a mixture of experts is 0.
    """
    config.model.ffn, config.model.memory.layer = SLOTS[slots]
    if config.model.ffn == "moe":
        config.model.ffn_size = 0
    config.model.update(model)
