"""What the commands of experiments/ have in common: their start, and the flags of some of them."""

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

_configs: list[str] = []  # flags that name a configuration


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, calls `main` and exits, as `command.run` does; refuses other arguments."""

    def alone(arguments: list[str]) -> None:
        command.refuse_arguments(arguments)
        main(arguments)

    command.run(alone, parse=_parse)


def _parse(arguments: list[str]) -> list[str]:
    """Reads the flags; every --config.FIELD=VALUE becomes one."""
    command.define_overrides(arguments, _configs)
    rest: list[str] = flags.FLAGS(arguments)
    return rest


def require(what: str, name: str, known: Iterable[str]) -> None:
    """Raises the ConfigError of `what`, which gives a name, where that is not a known one."""
    known = list(known)
    if name not in known:
        raise ConfigError(f"{what}: must be one of {', '.join(known)}{nearest_name(name, known)}")


def path(flag: flags.FlagHolder[Any]) -> Path:
    """Returns the path that a flag gives.

    Raises:
      FileError: one that no file of this machine has.
    """
    return files.user_path(flag.value, f"--{flag.name}")


def define_config(name: str, text: str) -> flags.FlagHolder[Any]:
    """Defines a flag that names a configuration, as main.py's --config does."""
    _configs.append(name)
    return flags.DEFINE_string(name, None, text)


def configuration(flag: flags.FlagHolder[Any]) -> ConfigDict:
    """Returns the configuration that a flag names, with the values that other flags override.

    Raises:
      ConfigError: there is none, or it has no such field.
    """
    from umv2.config import files as config_files

    values = config_files.load(flag.value, f"--{flag.name}")
    config_files.override(values, command.overrides(flag.name))
    return values


def sizes_of_families(flag: flags.FlagHolder[Any]) -> Any:
    """Returns the sizes of all families at the scale of the configuration that a flag names.

    Raises:
      ConfigError: the file gives none, or the flag names another family than the reference.
    """
    from umv2.config import files as config_files

    label = config_files.label(flag.value)
    stem, colon, _ = label.partition(":")
    if colon:
        raise ConfigError(f"--{flag.name}={flag.value}: is the reference; leave out the colon")
    file = config_files.named_folder() / f"{stem}.py"
    if stem in config_files.names() and flag.value in (stem, f"configs/{stem}.py", str(file)):
        sizes = getattr(importlib.import_module(f"configs.{stem}"), "SIZES", None)
        if sizes is not None:
            return sizes
    raise ConfigError(
        f"--{flag.name}={flag.value}: must be a file of configs/ that has the sizes of families"
    )


def families(flag: flags.FlagHolder[Any], sizes: Mapping[str, Any]) -> list[str]:
    """Returns the families that a flag names; by default all that have sizes.

    Raises:
      ConfigError: one that has none, and is not the reference.
    """
    for name in flag.value or ():
        require(f"--{flag.name}={name}", name, [REFERENCE, *sizes])
    return flag.value or list(sizes)


def integers(flag: flags.FlagHolder[Any], least: int) -> list[int]:
    """Returns the numbers that a flag lists.

    Raises:
      ConfigError: it lists none, or what is no integer of at least `least`.
    """
    found = []
    for text in flag.value or [""]:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise ConfigError(f"--{flag.name}={text}: must be an integer of at least {least}")
        found.append(int(text))
    return found


def output(flag: flags.FlagHolder[Any], name: str) -> Path | None:
    """Returns the file of results in the folder that a flag gives; None where it gives none.

    Raises:
      FileError: it cannot be written.
    """
    if flag.value is None:
        return None
    file = path(flag) / name
    measurements.require_writable(file)
    return file


def require_installed(extras: str, *packages: str) -> None:
    """Raises a UserError where a package of the optional ones is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed; pip install -e '.[{extras}]' in the clone"
        )
