"""Building nested frozen dataclasses from mappings, with every value checked against its type.

The annotation of a field is its rule: a type, a `Literal` of choices, a tuple, another dataclass,
or a number `Annotated` with an `Interval`.
"""

import dataclasses
import difflib
import importlib
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn


class UserError(Exception):
    """An error that the user can fix; shown as its message, without a traceback."""


class ConfigError(UserError, ValueError):
    """An invalid configuration; the message names the field, the value and the rule."""


def reject(field: str, value: object, rule: str) -> NoReturn:
    """Raises a ConfigError for a field whose value violates a rule."""
    raise ConfigError(f"{field}={value!r}: {rule}")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raises a ConfigError for a field unless the condition holds."""
    if not condition:
        reject(field, value, rule)


@dataclasses.dataclass(frozen=True)
class Interval:
    """The interval of valid values of a number."""

    low: int | float
    high: int | float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def holds(self, value: int | float) -> bool:
        """Returns whether a number is in the interval; infinities and NaN never are."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        low = f"{'>=' if self.includes_low else '>'} {self.low:.10g}"
        high = f" and {'<=' if self.includes_high else '<'} {self.high:.10g}"
        return f"must be {low}{'' if math.isinf(self.high) else high}"


Positive = Annotated[int, Interval(1)]
Seed = Annotated[int, Interval(0), Interval(0, 2**31 - 1)]  # passed to programs as an int32
Natural = Annotated[int, Interval(0)]
PositiveFloat = Annotated[float, Interval(0, includes_low=False)]
NaturalFloat = Annotated[float, Interval(0)]


def differing_fields(
    left: Mapping[str, Any], right: Mapping[str, Any], path: str = ""
) -> list[str]:
    """Lists 'path: left -> right' for every leaf at which two nested mappings differ."""
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
    """Returns ' (nearest: ...)' with the valid name closest to a misspelt one, or ''."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (nearest: {matches[0]})" if matches else ""


def first_names(names: Iterable[str]) -> str:
    """Joins the first three names of a list, and counts the rest, for error messages."""
    names = list(names)
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def resolve_name[T](
    field: str, name: str, known: Mapping[str, T], *, also: Sequence[str] = ()
) -> T:
    """Resolves the value of a field: a name in `known`, or "module:attribute", which is imported.

    Args:
      field: path of the field, for error messages.
      name: value of the field.
      known: registered objects by name.
      also: other valid names of the field, for error messages.

    Raises:
      ConfigError: the name is unknown or cannot be imported.
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
    except Exception as error:  # user modules may raise anything
        raise ConfigError(
            f"{field}={name!r}: cannot be imported: {type(error).__name__}: {error}"
        ) from error


def build(cls: type, section: Any, path: str = "") -> Any:
    """Builds a dataclass from a mapping of its fields; `path` prefixes names in error messages.

    Raises:
      ConfigError: a field is unknown or missing, or a value violates its annotation.
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
        number_type, *intervals = typing.get_args(hint)
        value = _convert(number_type, value, path)
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
            reject(path, value, "must be in the range of a float")
    # Compare types exactly: bool is a subclass of int, so isinstance would accept `top_m=True`.
    if type(value) is not hint:
        reject(path, value, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value
