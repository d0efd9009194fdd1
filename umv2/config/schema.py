"""How nested frozen dataclasses are filled from a mapping, each value checked against its type.

A field's annotation is its rule: a type, a `Literal` of choices, a tuple, another dataclass, or a
number `Annotated` with an `Interval`.
"""

import dataclasses
import difflib
import importlib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn


class UserError(Exception):
    """A mistake of the user's and not the program's; the message is all that they need."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot work; the message names the field, the value and the rule."""


def reject(field: str, value: object, rule: str) -> NoReturn:
    """Raises the ConfigError of a field whose value breaks a rule."""
    raise ConfigError(f"{field}={value!r}: {rule}")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Rejects a field's value unless the condition holds."""
    if not condition:
        reject(field, value, rule)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Rule of one number by itself: which values it may take."""

    low: int | float
    high: int | float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def holds(self, value: int | float) -> bool:
        """Tells whether a number keeps the rule; infinities and NaN keep none."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        low = f"{'>=' if self.includes_low else '>'} {self.low:.10g}"
        high = f" and {'<=' if self.includes_high else '<'} {self.high:.10g}"
        return f"must be {low}{'' if math.isinf(self.high) else high}"


Positive = Annotated[int, Interval(1)]
Seed = Annotated[int, Interval(0), Interval(0, 2**31 - 1)]  # programs take it as an int32
Natural = Annotated[int, Interval(0)]
PositiveFloat = Annotated[float, Interval(0, includes_low=False)]
NaturalFloat = Annotated[float, Interval(0)]


def differing_fields(
    left: Mapping[str, Any], right: Mapping[str, Any], path: str = ""
) -> list[str]:
    """Lists 'path: left -> right' for every leaf in which two nested mappings differ."""
    differences: list[str] = []
    for key in sorted(set(left) | set(right)):
        here = f"{path}{key}"
        a, b = left.get(key, "(absent)"), right.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differences += differing_fields(a, b, f"{here}.")
        elif a != b:
            differences.append(f"{here}: {a!r} -> {b!r}")
    return differences


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """Returns ' (nearest: ...)' for the valid name closest to a misspelt one, or ''."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (nearest: {matches[0]})" if matches else ""


def named[T](field: str, name: str, known: Mapping[str, T], *, also: Sequence[str] = ()) -> T:
    """Returns what a field names: one of `known`, or what "module:attribute" imports.

    Args:
      field: for messages.
      name: its value.
      known: what there is by a short name.
      also: other names that the field may have, for messages.

    Raises:
      ConfigError: a name that there is not, or that cannot be imported.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        names = [*also, *known]
        rule = f"must be {', '.join(names)} or module:name{nearest_name(name, names)}"
        reject(field, name, rule)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's raises all kinds
        raise ConfigError(
            f"{field}={name!r}: cannot be imported: {type(error).__name__}: {error}"
        ) from error


def build(cls: type, section: Any, path: str = "") -> Any:
    """Fills a dataclass from a mapping of its fields; `path` is the prefix of names in messages.

    Raises:
      ConfigError: for an unknown or missing field, or a value that breaks its annotation.
    """
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        reject(path.rstrip("."), section, "must be a section, not a value")
    hints = typing.get_type_hints(cls, include_extras=True)
    given = dict(section.items())
    for name in given:
        if name not in hints:
            raise ConfigError(f"{path}{name}: unknown field{nearest_name(name, hints)}")
    for name in hints:
        if name not in given:
            raise ConfigError(f"{path}{name}: missing; configs/base.py gives it a value")
    return cls(**{name: _convert(hint, given[name], path + name) for name, hint in hints.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path + ".")
    origin = typing.get_origin(hint)
    if origin is Annotated:
        kind, *intervals = typing.get_args(hint)
        value = _convert(kind, value, path)
        infinite = isinstance(value, float) and math.isinf(value)
        require(not infinite, path, value, "must be finite")
        for interval in intervals:
            require(interval.holds(value), path, value, str(interval))
        return value
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            nearest = nearest_name(str(value), choices)
            reject(path, value, f"must be one of {', '.join(map(repr, choices))}{nearest}")
        return value
    if origin is tuple:
        (element, _) = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            reject(path, value, f"must be a tuple of {getattr(element, '__name__', 'names')}")
        return tuple(_convert(element, item, path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            reject(path, value, "must be a number that a float can hold")
    # bool is a subclass of int, so isinstance would let `top_m=True` pass.
    if type(value) is not hint:
        reject(path, value, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value
