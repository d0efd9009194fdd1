"""Configuration files and overrides.

A configuration is given as FILE or FILE:ARGUMENT, where FILE is a Python file or the name of one in
configs/. Its `get_config`, called with ARGUMENT if there is one, returns a ConfigDict. Any problem
with the file or its name raises a `ConfigError`. Imports neither jax nor numpy.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict, config_dict

import umv2
from umv2 import files
from umv2.config.experiment import Config, from_config_dict, to_dict
from umv2.config.schema import ConfigError, nearest_name

_NOT_NAMED = ("__init__", "base", "families")  # files in configs/ that are not configurations


@functools.cache
def named_folder() -> Path:
    """Returns the folder of the named configurations.

    This is configs/ next to the package in a clone, and umv2/configs in an installation.
    """
    package = Path(umv2.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Returns the names of the configurations in configs/."""
    return sorted(p.stem for p in named_folder().glob("*.py") if p.stem not in _NOT_NAMED)


def label(given: str) -> str:
    """Returns a short name: 'configs/tiny.py:moe' and 'tiny:moe' are both 'tiny:moe'."""
    file, argument = _split(given)
    return Path(file).stem + ("" if argument is None else f":{argument}")


def read(given: str, flag: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and validates a configuration.

    Args:
      given: FILE or FILE:ARGUMENT.
      flag: the flag that gave it, for error messages.
      overrides: values by field path, which replace those of the file.

    Raises:
      ConfigError: there is no such file, it raises an error (the message names the line), or the
        configuration is invalid.
    """
    values = load(given, flag)
    override(values, overrides or {})
    _require_values(values, f"{flag}={given}")
    return from_config_dict(values)


def load(given: str, flag: str) -> ConfigDict:
    """Returns the ConfigDict of a file's `get_config`, unvalidated; see `read`."""
    file, argument = _split(given)
    path = _find(file, flag)

    def reject(what: str) -> NoReturn:
        raise ConfigError(f"{flag}={given}: {what}")

    try:
        source = path.read_bytes()
    except OSError as error:
        reject(f"cannot be read: {files.reason(error)}")
    _provide_configs()
    module = types.ModuleType("umv2_configuration")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module here
    arguments = [] if argument is None else [argument]
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        if not callable(module.__dict__.get("get_config")):
            reject("the file defines no function get_config")
        config = module.get_config(*arguments)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        called = error.__traceback__
        if isinstance(error, TypeError) and called is not None and called.tb_next is None:
            rule = "takes no argument: leave out the colon" if arguments else "needs FILE:ARGUMENT"
            reject(f"get_config of the file {rule} ({error})")
        reject(_failure(error, path))
    if not isinstance(config, ConfigDict):
        reject(f"get_config of the file must return a ConfigDict, not {type(config).__name__}")
    return config


def of_run(saved: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """Returns the stored configuration of a run, with overrides.

    Fields that were added after the run get the values of configs/base.py.

    Raises:
      ConfigError: a stored field no longer exists, or a value is invalid.
    """
    values = _base()
    if removed := _unknown_fields(saved, values):
        raise ConfigError(
            "the run was trained with another version of umv2, which has the fields"
            f" {', '.join(removed)}; only that version can read it"
        )
    with values.ignore_type():
        values.update(saved)
    override(values, overrides)
    return from_config_dict(values)


def _unknown_fields(saved: Mapping[str, Any], known: ConfigDict, path: str = "") -> list[str]:
    fields: list[str] = []
    for name, value in saved.items():
        if name not in known:
            fields.append(path + name)
        elif isinstance(value, Mapping) and isinstance(known[name], ConfigDict):
            fields += _unknown_fields(value, known[name], f"{path}{name}.")
    return fields


def completed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields that only `current` has to a stored configuration, with base values."""
    return _completed(saved, current, to_dict(from_config_dict(_base())))


def _completed(
    saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    added = {key: defaults[key] for key in current if key not in saved and key in defaults}
    return added | {
        key: _completed(value, current[key], defaults[key])
        if all(isinstance(side.get(key), Mapping) for side in (saved, current, defaults))
        else value
        for key, value in saved.items()
    }


def _base() -> ConfigDict:
    _provide_configs()
    return importlib.import_module("configs.base").get_config()


def field_type(path: str) -> Any:
    """Returns the type annotation of a field, given a path such as 'model.memory.top_m'.

    Raises:
      ConfigError: the field does not exist or is a section.
    """
    annotation: Any = Config
    names_below = path.split(".")
    for depth, name in enumerate(names_below):
        fields = typing.get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
        if name not in fields:
            field = ".".join(names_below[: depth + 1])
            raise ConfigError(f"--config.{field}: unknown field{nearest_name(name, fields)}")
        annotation = fields[name]
    if dataclasses.is_dataclass(annotation):
        first = next(iter(typing.get_type_hints(annotation)))
        raise ConfigError(
            f"--config.{path}: is a section, not a value; name its fields, as in"
            f" --config.{path}.{first}=..."
        )
    return annotation


def parse(path: str, texts: Sequence[str]) -> Any:
    """Parses the value of a field from the command line.

    Args:
      path: path of the field.
      texts: one or more texts. Those of a tuple are concatenated; otherwise the last one counts.

    Raises:
      ConfigError: the field does not exist, or the text is not a value of its type.
    """
    annotation, text = field_type(path), texts[-1]
    if typing.get_origin(annotation) is tuple:
        element, _ = typing.get_args(annotation)
        is_text = element is str or typing.get_origin(element) is typing.Literal
        return tuple(item for text in texts for item in _parse_tuple(path, text, is_text))
    if annotation is bool:
        choices = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
        if text.lower() not in choices:
            raise ConfigError(f"--config.{path}={text!r}: must be true or false")
        return choices[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError as error:
            rule = "an integer" if annotation is int else "a number"
            raise ConfigError(f"--config.{path}={text!r}: must be {rule}") from error
    return text


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets fields by path, in place.

    Raises:
      ConfigError: the configuration lacks a section of a path.
    """
    with config.unlocked(), config.ignore_type():
        for path, value in values.items():
            *sections, name = path.split(".")
            holder = config
            for section in sections:
                holder = holder.get(section)
                if not isinstance(holder, ConfigDict):
                    raise ConfigError(f"{section}: missing; configs/base.py gives it a value")
            holder[name] = value


def _split(given: str) -> tuple[str, str | None]:
    """Splits FILE:ARGUMENT; a colon before .py is part of the path."""
    file, colon, argument = given.partition(":")
    if of_path := re.fullmatch(r"(.*?\.py)(?:(:)(.*))?", given, re.DOTALL):
        file, colon, argument = of_path.groups(default="")
    return file, argument if colon else None


def _find(file: str, flag: str) -> Path:
    """Returns the path of a configuration file, given its path or name."""
    if file in names():
        return named_folder() / f"{file}.py"
    path = files.user_path(file, flag)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{flag}={file}: is a folder, but must be a Python file")
    siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    is_name = path.name == file and path.suffix != ".py"
    nearest = nearest_name(file, [*names(), *siblings] if is_name else siblings)
    # An installation has no configs/tiny.py: suggest the name `tiny`.
    if not nearest and path.parent.name == "configs":
        nearest = nearest_name(path.stem, names())
    raise ConfigError(
        f"{flag}={file}: no such file{nearest}; named configurations: {', '.join(names())}"
    )


def _provide_configs() -> None:
    """Makes the named configurations importable as `configs`, in a clone or an installation.

    An installed top-level package of this name could clash with others. The files are therefore
    installed in umv2/configs, and aliased only in processes that read configuration files.
    """
    if "configs" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("configs", named_folder() / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["configs"] = module
    spec.loader.exec_module(module)


def _failure(error: BaseException, path: Path) -> str:
    """Formats an error that a file raised, with the line of the file or of a module it imports."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}" if error.lineno else f"{error.filename}"
        return f"{type(error).__name__}: {error.msg} ({where})"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f" ({path}:{lines[-1]})" if lines else ""
    # str() of a KeyError quotes the message, and ConfigDict wraps a KeyError in an AttributeError.
    message: Any = error
    while isinstance(message, BaseException) and len(message.args) == 1:
        message = message.args[0]
    # A ValueError is how a file rejects its argument; omit the name of the class.
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + _shortened(" ".join(str(message).split())) + where


def _shortened(text: str) -> str:
    """Cuts the middle of a long text: errors of a locked ConfigDict print all of its content."""
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


def _require_values(values: ConfigDict, source: str, path: str = "") -> None:
    """Raises ConfigError for the first required placeholder without a value."""
    for name in values:
        try:
            value = values[name]
        except config_dict.RequiredValueError as error:
            raise ConfigError(
                f"--config.{path}{name}: must be given, since {source} does not set it"
            ) from error
        if isinstance(value, ConfigDict):
            _require_values(value, source, f"{path}{name}.")


def _parse_tuple(path: str, text: str, is_text: bool) -> tuple[Any, ...]:
    """Parses a Python tuple or a single element."""
    if is_text and text and not text.startswith(("(", "[", "'", '"')):
        if "," not in text:
            return (text,)
        value: Any = None
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if value is None or isinstance(value, dict | set):
        example = "\"('a', 'b')\"" if is_text else '"(1, 2)"'
        raise ConfigError(f"--config.{path}={text!r}: must be a Python tuple, as in {example}")
    return tuple(value) if isinstance(value, tuple | list) else (value,)
