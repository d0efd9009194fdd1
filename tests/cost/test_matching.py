"""Models of equal cost: the solver's solutions, and that configs/ contains them."""

import dataclasses
import importlib
import math
from types import ModuleType
from typing import Any

import pytest

from configs import base, families, tiny
from tests import slots
from umv2.config import Config, ConfigError, from_config_dict
from umv2.cost import matching

SCALES = ("tiny", "cpu_small", "paper_227m_1b2", "paper_1b_7b")
# Quantities that no size of a family can match: with whole experts, or with few and wide values.
UNMATCHED: dict[str, dict[str, set[str]]] = {
    "tiny": {"moe": {"active", "flops"}, "moe_2_of_16": {"total"}},
    "cpu_small": {
        "moe_2_of_16": {"total"},
        "ultramem": {"values_read"},
        "memory_plus": {"values_read"},
        "pkm": {"values_read"},
        "peer": {"values_read"},
        "peer_relu": {"values_read"},
    },
    "paper_227m_1b2": {"moe_2_of_16": {"total"}},
    "paper_1b_7b": {},
}
# Models of Table 10 differ in cost: deviations from UltraMemV2's row, in per cent.
PUBLISHED = {
    ("paper_227m_1b2", "moe"): (2.2, 0.0),
    ("paper_227m_1b2", "ultramem"): (2.4, 1.0),
    ("paper_227m_1b2", "memory_plus"): (9.2, 1.4),
    ("paper_1b_7b", "moe"): (13.7, 10.4),
}


def module(scale: str) -> ModuleType:
    return importlib.import_module(f"configs.{scale}")


def config_of(scale: str, family: str = families.REFERENCE) -> Config:
    return from_config_dict(module(scale).get_config(family))


def found_and_published() -> list[tuple[str, str]]:
    return [(scale, family) for scale in SCALES for family in module(scale).SIZES]


def is_published(scale: str, family: str) -> bool:
    return family in getattr(module(scale), "PUBLISHED", ())


@pytest.mark.parametrize(
    ("scale", "family"), [pair for pair in found_and_published() if not is_published(*pair)]
)
def test_shipped_sizes_match_the_solver(scale: str, family: str) -> None:
    shipped = config_of(scale, family)
    match = matching.match(config_of(scale), shipped)
    assert match.config == shipped
    absent = {name for name, deviation in match.deviations.items() if math.isnan(deviation)}
    assert absent == ({"values_read"} if family.startswith(("moe", "dense")) else set())
    expected = {"total"} if family == "dense" else UNMATCHED[scale].get(family, set())
    assert set(match.unmatched) - absent == expected


@pytest.mark.parametrize(
    ("scale", "family"), [pair for pair in found_and_published() if is_published(*pair)]
)
def test_published_sizes_deviate_as_stated(scale: str, family: str) -> None:
    reference = matching.quantities(config_of(scale))
    ours = matching.quantities(config_of(scale, family))
    percent = [100 * (getattr(ours, n) / getattr(reference, n) - 1) for n in ("active", "total")]
    assert percent == pytest.approx(PUBLISHED[scale, family], abs=0.06)


@pytest.mark.parametrize("family", ["ultramem", "pkm", "peer", "moe", "moe_2_of_16"])
def test_no_other_number_of_keys_or_experts_is_better(family: str) -> None:
    target = matching.quantities(config_of("tiny"))
    match = matching.match(config_of("tiny"), config_of("tiny", family))
    names = [n for n, d in match.deviations.items() if not math.isnan(d)]

    def worst(model: Any) -> float:
        quantities = matching.quantities(dataclasses.replace(match.config, model=model))
        return max(abs(getattr(quantities, n) / getattr(target, n) - 1) for n in names)

    model = match.config.model
    section, field = ("moe", "num_experts") if "moe" in family else ("memory", "num_keys")
    for step in (-1, 1):
        old = getattr(model, section)
        new = dataclasses.replace(old, **{field: getattr(old, field) + step})
        assert worst(dataclasses.replace(model, **{section: new})) > worst(model)


def test_a_dense_model_matches_active_parameters_to_one_unit_of_width() -> None:
    target = matching.quantities(config_of("tiny"))
    match = matching.match(config_of("tiny"), config_of("tiny", "dense"))
    model = match.config.model
    one_unit = 3 * model.hidden_size * model.num_layers
    assert abs(match.quantities.active - target.active) <= one_unit


def test_a_model_matches_itself() -> None:
    reference = config_of("tiny")
    values = tiny.get_config()
    values.model.ffn_size = 8
    values.model.memory.update(num_keys=10, top_m=3, shortlist=3)
    assert from_config_dict(values) != reference
    match = matching.match(reference, from_config_dict(values))
    assert match.config == reference
    assert match.unmatched == {}
    assert set(match.deviations.values()) == {0.0}


def test_rules_select_what_is_matched() -> None:
    reference, dense = config_of("tiny"), config_of("tiny", "dense")
    match = matching.match(reference, dense, ("active", "flops"))
    assert set(match.deviations) == {"active", "flops"}
    assert match.unmatched == {}
    assert set(matching.match(reference, dense).unmatched) == {"total", "values_read"}


def test_only_free_sizes_change() -> None:
    values = tiny.get_config()
    values.model.ffn_size = 8
    values.model.memory.update(num_keys=32, top_m=16, shortlist=16)
    candidate = from_config_dict(values)
    match = matching.match(config_of("tiny"), candidate, ("flops",), ("ffn_size",))
    assert match.unmatched == {}
    assert match.config.model.ffn_size != candidate.model.ffn_size
    assert match.config.model.memory == candidate.model.memory
    untouched = matching.match(config_of("tiny"), candidate, matching.RULES, ())
    assert untouched.config == candidate
    assert set(untouched.unmatched) == {"active", "total", "flops", "values_read"}


@pytest.mark.parametrize("free", [(), ("moe.num_experts",), ("moe.expert_size",)])
def test_only_free_sizes_of_experts_change(free: tuple[str, ...]) -> None:
    values = tiny.get_config("moe")
    values.model.moe.update(num_experts=9, expert_size=100)
    candidate = from_config_dict(values)
    changed = matching.match(config_of("tiny"), candidate, ("total",), free).config.model.moe
    assert (changed.num_experts != 9) == ("moe.num_experts" in free)
    assert (changed.expert_size != 100) == ("moe.expert_size" in free)


def test_total_parameters_match_where_active_ones_may_differ() -> None:
    """The FFN shrinks to offset the FLOPs of a long shortlist; more rows replace its parameters."""
    values = tiny.get_config()
    values.model.memory.update(shortlist=48, num_keys=60)
    candidate = from_config_dict(values)
    rules, free = ("total", "flops"), ("ffn_size", "memory.num_keys")
    match = matching.match(config_of("tiny"), candidate, rules, free)
    assert match.unmatched == {}
    active = matching.quantities(config_of("tiny")).active
    assert match.quantities.active / active - 1 < -0.005


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(ConfigError, match=r"size 'depth': must be one of ffn_size, memory"):
        matching.match(config_of("tiny"), config_of("tiny", "dense"), ("flops",), ("depth",))


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rule 'speed': must be one of active, total, flops"):
        matching.match(config_of("tiny"), config_of("tiny", "dense"), ("speed",))


def test_a_reference_that_is_too_small_is_an_error() -> None:
    small = base.get_config()
    slots.fill(small, "dense", hidden_size=64, num_layers=1, ffn_size=1)
    large = config_of("tiny", "pkm")
    with pytest.raises(ConfigError, match="the reference is too small"):
        matching.match(from_config_dict(small), large)
