"""Finds sizes at which one model has the same cost as another."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from umv2.config import Config, ConfigError, ModelConfig
from umv2.cost import accounting

TOLERANCE = 0.01
# Widths are multiples of the largest power of two, up to this one, ...
_MAX_MULTIPLE = 64
# ... that changes the active parameters by at most this fraction per step.
_MAX_STEP = 0.0025
_EXPERT = "moe.expert_size"
# The sizes to search, by path below `model`; a model family has only some of them.
SIZES = ("ffn_size", "memory.num_keys", "memory.top_m", "moe.num_experts", _EXPERT)


@dataclasses.dataclass(frozen=True)
class Quantities:
    """Quantities to match; parameters exclude embedding and head.

    `flops` are per token of a forward pass at the training length; `values_read` is the number of
    value table elements that a token reads (0 for models without memory layers).
    """

    active: float
    total: float
    flops: float
    values_read: float


RULES = tuple(field.name for field in dataclasses.fields(Quantities))


@dataclasses.dataclass(frozen=True)
class Match:
    """A model sized to match the cost of a reference as closely as possible.

    `sizes` are by path below `model`. `deviations` are relative to the reference, and NaN if the
    model family does not have the quantity.
    """

    config: Config
    sizes: dict[str, int]
    quantities: Quantities
    deviations: dict[str, float]

    @property
    def unmatched(self) -> dict[str, float]:
        """Deviations above 1 %, and quantities that the model family does not have."""
        return {n: d for n, d in self.deviations.items() if not abs(d) <= TOLERANCE}


def quantities(config: Config) -> Quantities:
    """Computes the quantities to match."""
    counts, layers = accounting.parameter_counts(config.model), accounting.slots(config.model)
    flops = accounting.forward_flops_per_token(config.model, config.data.sequence_length)
    return Quantities(
        active=float(counts.active_without_embeddings),
        total=float(counts.total_without_embeddings),
        flops=sum(flops.values()),
        values_read=float(layers.memory[0] * layers.memory[1].selected),
    )


def match(
    reference: Config,
    candidate: Config,
    rules: tuple[str, ...] = RULES,
    free: tuple[str, ...] = SIZES,
) -> Match:
    """Sizes a candidate to match the reference in the quantities that `rules` name.

    Searches the width of the FFN or of an expert (active parameters, FLOPs), the number of keys or
    of experts (total parameters) and the number of values that a head selects (values read); keeps
    everything else of the candidate. Returns the sizes with the smallest maximum deviation among
    those tried. The shortlist is as long as the selection, which is exact for additive scores, but
    at most 128 for Tucker scores, as in the paper.

    Raises:
      ConfigError: a rule or size is unknown, or the reference is too small for the candidate.
    """
    for kind, names, choices in (("rule", rules, RULES), ("size", free, SIZES)):
        for name in names:
            if name not in choices:
                raise ConfigError(f"{kind} {name!r}: must be one of {', '.join(choices)}")
    target = quantities(reference)
    best: tuple[list[float], Match] | None = None
    for sizes in _candidates(target, candidate, rules, free):
        config = _with_sizes(candidate, sizes)
        try:
            config.validate()
        except ConfigError:  # e.g. fewer keys than the shortlist
            continue
        actual = quantities(config)
        deviations = {rule: _deviation(actual, target, rule) for rule in rules}
        known = [abs(deviation) for deviation in deviations.values() if not math.isnan(deviation)]
        # A quantity that cannot be matched must not influence the choice.
        if not candidate.model.placements and candidate.model.ffn == "dense":
            known = [abs(deviations[rule]) for rule in rules if rule in ("active", "flops")]
        # Compare the largest deviation first, and break ties by the next largest.
        cost = sorted(known, reverse=True)
        if best is None or cost < best[0]:
            best = cost, Match(config, sizes, actual, deviations)
    if best is None:
        raise ConfigError(
            f"model: the reference is too small: its {target.active:,.0f} active and"
            f" {target.total:,.0f} total parameters leave too few for the candidate's FFN, keys or"
            " experts"
        )
    return best[1]


def _deviation(actual: Quantities, target: Quantities, rule: str) -> float:
    value, target_value = getattr(actual, rule), getattr(target, rule)
    if rule == "values_read" and not (value and target_value):
        return math.nan
    return value / target_value - 1


def _candidates(
    target: Quantities, candidate: Config, rules: tuple[str, ...], free: tuple[str, ...]
) -> Iterator[dict[str, int]]:
    """Yields sizes to try: for each number of keys or experts, widths around the solution."""
    model, memory = candidate.model, candidate.model.memory
    width = _width(model)
    numbers: range | tuple[int, ...]
    if model.placements:
        fixed: dict[str, int] = {}
        if target.values_read and "memory.top_m" in free:
            row = memory.value_dim + memory.pre_value_dim
            per_choice = len(model.placements) * memory.num_heads * row
            top_m = max(1, round(target.values_read / per_choice))
            shortlist = top_m if memory.scoring == "sum" else min(top_m, 128)
            fixed = {"memory.top_m": top_m, "memory.shortlist": shortlist}
        numbers = (memory.num_keys,)
        if "memory.num_keys" in free:
            numbers = _numbers_of_keys(target, candidate, fixed, rules, free)
        for num_keys in numbers:
            yield from _with_widths(
                target, candidate, fixed | {"memory.num_keys": num_keys}, width, free
            )
    elif model.ffn == "moe":
        numbers = (model.moe.num_experts,)
        if "moe.num_experts" in free:
            numbers = _numbers_of_experts(target, candidate)
        for num_experts in numbers:
            yield from _with_widths(
                target, candidate, {"moe.num_experts": num_experts}, width, free
            )
    else:
        yield from _with_widths(target, candidate, {}, width, free)


def _width(model: ModelConfig) -> str:
    """Returns the field that sets the width of a token's FFN."""
    return _EXPERT if model.ffn == "moe" else "ffn_size"


def _numbers_of_keys(
    target: Quantities,
    candidate: Config,
    fixed: dict[str, int],
    rules: tuple[str, ...],
    free: tuple[str, ...],
) -> range:
    """Returns the numbers of keys around the one that matches the total parameters."""
    memory, tables = candidate.model.memory, len(candidate.model.placements)
    row = memory.value_dim + memory.pre_value_dim
    selected = tables * memory.num_heads * fixed.get("memory.top_m", memory.top_m) * row

    def nearest(active: float) -> int:
        return round(math.sqrt(max((target.total - active + selected) / (tables * row), 1)))

    num_keys = nearest(target.active)
    if "active" not in rules:  # then the active parameters follow from matching the FLOPs
        for _ in range(4):
            sizes = fixed | {"memory.num_keys": num_keys}
            tried = [
                quantities(_with_sizes(candidate, sized))
                for sized in _with_widths(target, candidate, sizes, _width(candidate.model), free)
            ]
            if not tried:
                break
            num_keys = nearest(min(tried, key=lambda q: abs(q.flops - target.flops)).active)
    return range(max(1, num_keys - 2), num_keys + 3)


def _numbers_of_experts(target: Quantities, candidate: Config) -> range:
    """Returns the numbers of experts around the one that matches active and total parameters."""
    model, num_experts = candidate.model, candidate.model.moe.top_k
    for _ in range(4):  # fixed point: the router's parameters are active, so they affect the width
        fixed = {"moe.num_experts": num_experts}
        sized = _with_widths(target, candidate, fixed, _EXPERT, (_EXPERT,))
        widths = [sizes[_EXPERT] for sizes in sized]
        if not widths:
            break
        expert = 3 * model.hidden_size * min(widths) * model.num_layers
        num_experts = model.moe.top_k + max(0, round((target.total - target.active) / expert))
    return range(max(model.moe.top_k, num_experts - 4), num_experts + 5)


def _with_widths(
    target: Quantities,
    candidate: Config,
    fixed: dict[str, int],
    name: str,
    free: tuple[str, ...],
) -> Iterator[dict[str, int]]:
    """Yields `fixed` with widths around those at which active parameters or FLOPs match."""
    if name not in free:
        yield fixed
        return

    def at_width(width: int) -> Quantities:
        return quantities(_with_sizes(candidate, fixed | {name: width}))

    step = at_width(2).active - at_width(1).active
    multiple = 1
    while multiple < _MAX_MULTIPLE and 2 * multiple * step <= _MAX_STEP * target.active:
        multiple *= 2
    low, high = sorted(
        (
            _last(lambda k: at_width(k * multiple).active <= target.active),
            _last(lambda k: at_width(k * multiple).flops <= target.flops),
        )
    )
    if high == 0:  # even the smallest width exceeds the target
        return
    # Around the midpoint, the deviations of active parameters and of FLOPs are equally large.
    factors = sorted({low, low + 1, (low + high) // 2, (low + high) // 2 + 1, high, high + 1})
    for factor in factors:
        if factor >= 1:
            yield fixed | {name: factor * multiple}


def _last(holds: Callable[[int], bool]) -> int:
    """Returns the last k >= 0 before a monotone condition on k >= 1 becomes false."""
    high = next(k for k in (2**i for i in itertools.count()) if not holds(k))
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _with_sizes(config: Config, sizes: dict[str, int]) -> Config:
    """Replaces fields by their path below `model`."""
    model: Any = config.model
    for path, value in sizes.items():
        section, _, name = path.rpartition(".")
        change: dict[str, Any] = {name: value}
        if section:
            change = {section: dataclasses.replace(getattr(model, section), **change)}
        model = dataclasses.replace(model, **change)
    return dataclasses.replace(config, model=model)
