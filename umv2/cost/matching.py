"""Finds the sizes at which one model costs what another does."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from umv2.config import Config, ConfigError, ModelConfig
from umv2.cost import accounting

TOLERANCE = 0.01
# A width is a multiple of the largest power of two, up to this one, ...
_MAX_MULTIPLE = 64
# ... whose steps change the active parameters by less than this fraction.
_MAX_STEP = 0.0025
_EXPERT = "moe.expert_size"
# What is sized, by path below `model`; a family has only some of them.
SIZES = ("ffn_size", "memory.num_keys", "memory.top_m", "moe.num_experts", _EXPERT)


@dataclasses.dataclass(frozen=True)
class Quantities:
    """What models are made equal in; embeddings and head are left out of the parameters.

    `flops` are those of a forward pass for one token at the training length; `values_read` the
    entries of value tables that a token reads (0 for models without memory layers).
    """

    active: float
    total: float
    flops: float
    values_read: float


RULES = tuple(field.name for field in dataclasses.fields(Quantities))


@dataclasses.dataclass(frozen=True)
class Match:
    """A model made to cost what a reference does, as nearly as its sizes allow.

    `sizes` are what was found, by path below `model`; `deviations` are relative to the reference,
    and NaN where a quantity does not exist in the family.
    """

    config: Config
    sizes: dict[str, int]
    quantities: Quantities
    deviations: dict[str, float]

    @property
    def unmatched(self) -> dict[str, float]:
        """Deviations above 1 %, and quantities that the family does not have."""
        return {n: d for n, d in self.deviations.items() if not abs(d) <= TOLERANCE}


def quantities(config: Config) -> Quantities:
    """Counts what models are made equal in."""
    counts, found = accounting.parameter_counts(config.model), accounting.slots(config.model)
    flops = accounting.forward_flops_per_token(config.model, config.data.sequence_length)
    return Quantities(
        active=float(counts.active_without_embeddings),
        total=float(counts.total_without_embeddings),
        flops=sum(flops.values()),
        values_read=float(found.memory[0] * found.memory[1].selected),
    )


def match(
    reference: Config,
    candidate: Config,
    rules: tuple[str, ...] = RULES,
    free: tuple[str, ...] = SIZES,
) -> Match:
    """Sizes a candidate so that it equals the reference in what `rules` name.

    Found are the width of the FFN or of an expert (active parameters, FLOPs), the number of keys or
    of experts (total parameters) and the values a head selects (values read); everything else is
    the candidate's. Among the sizes tried it takes those whose largest deviation is the least. The
    shortlist is as long as a selection, which is exact for additive scores, but at most 128 for
    Tucker scores, as in the paper.

    Raises:
      ConfigError: a rule or a size that there is not, or a reference too small for the candidate.
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
        except ConfigError:  # such as fewer keys than a shortlist
            continue
        found = quantities(config)
        deviations = {rule: _deviation(found, target, rule) for rule in rules}
        known = [abs(deviation) for deviation in deviations.values() if not math.isnan(deviation)]
        # What cannot be matched at all must not decide about the rest.
        if not candidate.model.placements and candidate.model.ffn == "dense":
            known = [abs(deviations[rule]) for rule in rules if rule in ("active", "flops")]
        # The largest deviation decides, and between equals the next one.
        cost = sorted(known, reverse=True)
        if best is None or cost < best[0]:
            best = cost, Match(config, sizes, found, deviations)
    if best is None:
        raise ConfigError(
            f"model: the reference is too small: its {target.active:,.0f} active and"
            f" {target.total:,.0f} total parameters leave too few for the candidate's FFN, keys or"
            " experts"
        )
    return best[1]


def _deviation(found: Quantities, target: Quantities, rule: str) -> float:
    ours, wanted = getattr(found, rule), getattr(target, rule)
    if rule == "values_read" and not (ours and wanted):
        return math.nan
    return ours / wanted - 1


def _candidates(
    target: Quantities, candidate: Config, rules: tuple[str, ...], free: tuple[str, ...]
) -> Iterator[dict[str, int]]:
    """Yields sizes to try: for each number of keys or experts, the widths around the solution."""
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
    """Returns the field that makes a token's FFN wider."""
    return _EXPERT if model.ffn == "moe" else "ffn_size"


def _numbers_of_keys(
    target: Quantities,
    candidate: Config,
    fixed: dict[str, int],
    rules: tuple[str, ...],
    free: tuple[str, ...],
) -> range:
    """Returns the numbers around that at which the total parameters are met."""
    memory, tables = candidate.model.memory, len(candidate.model.placements)
    row = memory.value_dim + memory.pre_value_dim
    selected = tables * memory.num_heads * fixed.get("memory.top_m", memory.top_m) * row

    def nearest(active: float) -> int:
        return round(math.sqrt(max((target.total - active + selected) / (tables * row), 1)))

    num_keys = nearest(target.active)
    if "active" not in rules:  # then they are those at which the FLOPs are met
        for _ in range(4):
            sizes = fixed | {"memory.num_keys": num_keys}
            tried = [
                quantities(_with_sizes(candidate, found))
                for found in _with_widths(target, candidate, sizes, _width(candidate.model), free)
            ]
            if not tried:
                break
            num_keys = nearest(min(tried, key=lambda q: abs(q.flops - target.flops)).active)
    return range(max(1, num_keys - 2), num_keys + 3)


def _numbers_of_experts(target: Quantities, candidate: Config) -> range:
    """Returns the numbers around that at which active and total parameters are both met."""
    model, num_experts = candidate.model, candidate.model.moe.top_k
    for _ in range(4):  # the router has active parameters too, so the width depends on it
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
    """Yields `fixed` with the widths at which active parameters or FLOPs cross the target."""
    if name not in free:
        yield fixed
        return

    def counted(width: int) -> Quantities:
        return quantities(_with_sizes(candidate, fixed | {name: width}))

    step = counted(2).active - counted(1).active
    multiple = 1
    while multiple < _MAX_MULTIPLE and 2 * multiple * step <= _MAX_STEP * target.active:
        multiple *= 2
    low, high = sorted(
        (
            _last(lambda k: counted(k * multiple).active <= target.active),
            _last(lambda k: counted(k * multiple).flops <= target.flops),
        )
    )
    if high == 0:  # not even the narrowest fits
        return
    # Between the two, the deviations of active parameters and FLOPs change places.
    tried = sorted({low, low + 1, (low + high) // 2, (low + high) // 2 + 1, high, high + 1})
    for factor in tried:
        if factor >= 1:
            yield fixed | {name: factor * multiple}


def _last(holds: Callable[[int], bool]) -> int:
    """Returns the last k >= 0 before a monotone condition on k >= 1 fails."""
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
