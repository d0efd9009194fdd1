"""Start-up and flag handling shared by the commands of experiments/."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs.families import REFERENCE
from experiments import measurements
from umv2 import command, files
from umv2.config.schema import ConfigError, UserError, nearest_name

_configs: list[str] = []  # names of the flags that take a configuration


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, calls `main` and exits, as `command.run` does; rejects other arguments."""

    def checked_main(arguments: list[str]) -> None:
        command.refuse_arguments(arguments)
        main(arguments)

    command.run(checked_main, parse=_parse)


def _parse(arguments: list[str]) -> list[str]:
    """Parses the flags, with one defined for each --config.FIELD=VALUE."""
    command.define_overrides(arguments, _configs)
    rest: list[str] = flags.FLAGS(arguments)
    return rest


def require(what: str, name: str, known: Iterable[str]) -> None:
    """Raises a ConfigError that begins with `what` unless `name` is a known one."""
    known = list(known)
    if name not in known:
        raise ConfigError(f"{what}: must be one of {', '.join(known)}{nearest_name(name, known)}")


def path(flag: flags.FlagHolder[Any]) -> Path:
    """Returns the path given by a flag.

    Raises:
      FileError: it is not a path of this machine.
    """
    return files.user_path(flag.value, f"--{flag.name}")


def define_config(name: str, text: str) -> flags.FlagHolder[Any]:
    """Defines a flag that takes a configuration, like main.py's --config."""
    _configs.append(name)
    return flags.DEFINE_string(name, None, text)


def configuration(flag: flags.FlagHolder[Any]) -> ConfigDict:
    """Returns the configuration given by a flag, with the overrides of other flags applied.

    Raises:
      ConfigError: the configuration or a field of it does not exist.
    """
    from umv2.config import files as config_files

    values = config_files.load(flag.value, f"--{flag.name}")
    config_files.override(values, command.overrides(flag.name))
    return values


def sizes_of_families(flag: flags.FlagHolder[Any]) -> Any:
    """Returns the sizes of all families at the scale of the configuration given by a flag.

    Raises:
      ConfigError: the file defines no sizes, or the flag names a family other than the reference.
    """
    from umv2.config import files as config_files

    label = config_files.label(flag.value)
    stem, colon, _ = label.partition(":")
    if colon:
        raise ConfigError(f"--{flag.name}={flag.value}: must be the reference; drop the colon")
    file = config_files.named_folder() / f"{stem}.py"
    if stem in config_files.names() and flag.value in (stem, f"configs/{stem}.py", str(file)):
        sizes = getattr(importlib.import_module(f"configs.{stem}"), "SIZES", None)
        if sizes is not None:
            return sizes
    raise ConfigError(
        f"--{flag.name}={flag.value}: must be a file of configs/ that defines the families' SIZES"
    )


def families(flag: flags.FlagHolder[Any], sizes: Mapping[str, Any]) -> list[str]:
    """Returns the families given by a flag; by default all that have sizes.

    Raises:
      ConfigError: a family has no sizes and is not the reference.
    """
    for name in flag.value or ():
        require(f"--{flag.name}={name}", name, [REFERENCE, *sizes])
    return flag.value or list(sizes)


def integers(flag: flags.FlagHolder[Any], least: int) -> list[int]:
    """Returns the integers listed by a flag.

    Raises:
      ConfigError: the list is empty, or an entry is not an integer of at least `least`.
    """
    values = []
    for text in flag.value or [""]:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise ConfigError(f"--{flag.name}={text}: must be an integer of at least {least}")
        values.append(int(text))
    return values


def output(flag: flags.FlagHolder[Any], name: str) -> Path | None:
    """Returns the results file `name` in the folder given by a flag; None if the flag is not set.

    Raises:
      FileError: the file cannot be written.
    """
    if flag.value is None:
        return None
    file = path(flag) / name
    measurements.require_writable(file)
    return file


def require_installed(extras: str, *packages: str) -> None:
    """Raises a UserError if one of these optional packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed; pip install -e '.[{extras}]' in the clone"
        )
