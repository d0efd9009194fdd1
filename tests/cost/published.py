"""The models of UltraMemV2's Table 10 as configurations."""

from typing import Any

from configs import base, paper_1b_7b, paper_227m_1b2
from tests import slots
from umv2.config import Config, from_config_dict


def config(**sections: Any) -> Config:
    """Returns the base configuration with the given fields of `model`, `memory` and `moe`.

    `slots` is as in tests/slots.py.
    """
    assigned = base.get_config()
    slots.fill(assigned, sections.pop("slots", "memory"))
    for name in ("memory", "moe"):
        assigned.model[name].update(sections.pop(name, {}))
    assigned.model.update(sections)
    return from_config_dict(assigned)


def olmoe_227m() -> Config:
    """OLMoE-227M/1.2B: 8 of 64 experts."""
    return from_config_dict(paper_227m_1b2.get_config("moe"))


def olmoe_1b() -> Config:
    """OLMoE-1B/7B: 8 of 64 experts."""
    return from_config_dict(paper_1b_7b.get_config("moe"))


def ultramem_v2_227m() -> Config:
    """UltraMemV2-227M/1.2B: a memory layer of 360^2 values in every block."""
    return from_config_dict(paper_227m_1b2.get_config())


def ultramem_v2_1b() -> Config:
    """UltraMemV2-1B/7B: a memory layer of 528^2 values in every block."""
    return from_config_dict(paper_1b_7b.get_config())
