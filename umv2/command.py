"""How a command begins and ends: its streams, its log, and one line for what a user can mend.

`run` is the entry of main.py and of every script in experiments/. Imports neither jax nor numpy.
"""

import contextlib
import errno
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

from absl import app, flags, logging

from umv2 import files
from umv2.config import files as config_files
from umv2.config.schema import ConfigError, UserError

# Errors of the machine, its disks or a path that a user gave: wherever they come up, never bugs.
_ENVIRONMENT = files.PASSING_ERRNOS | {errno.ENAMETOOLONG, errno.ENOTDIR}
_INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended
_CLOSED = 141  # and of one whose reader went away


def run(
    main: Callable[[list[str]], Any], *, parse: Callable[[list[str]], list[str]] | None = None
) -> None:
    """Parses the flags, calls `main` with the arguments that are left, and exits.

    A `UserError`, a mistake in the flags, a full disk and their like end in one line on standard
    error and status 1; Ctrl-C ends in one line and status 130. A bug shows its trace.

    Args:
      main: the command.
      parse: reads flags from the command line, program first, and returns the rest; None: absl.
    """
    _set_up_streams()
    set_up_logging()

    def parse_flags(arguments: list[str]) -> list[str]:
        with one_line_errors():
            return parse(arguments) if parse else flags.FLAGS(arguments)

    def guarded(arguments: list[str]) -> None:
        with one_line_errors():
            main(arguments)
            write("", end="")  # what it printed

    app.run(guarded, flags_parser=parse_flags)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for what the user can mend; bugs keep their trace."""
    try:
        yield
    except (UserError, flags.Error, app.UsageError) as error:
        _exit_with(str(error))
    except BrokenPipeError:
        _settle_output()
        sys.exit(_CLOSED)  # nobody reads any more (`| head`)
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        path = f"{error.filename}: " if error.filename else ""
        _exit_with(f"{path}{files.reason(error)}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)
    except MemoryError:
        _exit_with("out of memory")


def write(text: str, end: str = "\n") -> None:
    """Writes to standard output, at once.

    Raises:
      FileError: it cannot be written, as where the disk of its file is full.
      BrokenPipeError: nobody reads it any more.
    """
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.FileError(f"standard output: {files.reason(error)}") from error


def refuse_arguments(arguments: list[str]) -> None:
    """Raises ConfigError for arguments that are no flags; the first is the program."""
    if len(arguments) > 1:
        raise ConfigError(f"{arguments[1]}: unexpected argument; options are written --name=value")


def end_of_flags(arguments: Sequence[str]) -> int:
    """Returns the place of the "--" after which nothing is a flag."""
    return arguments.index("--") if "--" in arguments else len(arguments)


def define_overrides(
    arguments: list[str], names: Collection[str], registry: flags.FlagValues = flags.FLAGS
) -> None:
    """Makes a flag of every field that a command line overrides, as --NAME.FIELD, for absl to read.

    Args:
      arguments: of the command line, program first.
      names: of the flags that name configurations.
      registry: of the flags.

    Raises:
      ConfigError: a field that there is not.
    """
    given = registry.read_flags_from_files(arguments[1:], force_gnu=False)
    for argument in given[: end_of_flags(given)]:
        named = re.match(r"--?(?:no)?((\w+)\.([^=]*))", argument)
        if named is None or named[2] not in names or named[1] in registry:
            continue
        flag: flags.MultiFlag[str] = flags.MultiFlag(
            parser=flags.ArgumentParser(),
            serializer=flags.ArgumentSerializer(),
            name=named[1],
            default=None,
            help_string=f"In place of {named[3]} of the configuration.",
            # As such --config.FIELD and --noconfig.FIELD have values.
            boolean=config_files.field_type(named[3]) is bool,
        )
        flags.DEFINE_flag(flag, registry)


def overrides(name: str, registry: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns what the command line says of the fields of a configuration, by their paths.

    Raises:
      ConfigError: text that is no value of its field.
    """
    prefix = f"{name}."
    given = {
        flag.removeprefix(prefix): cast(list[str], registry[flag].value)
        for flag in registry
        if flag.startswith(prefix) and registry[flag].present
    }
    return {path: config_files.parse(path, texts) for path, texts in given.items()}


def _exit_with(message: str) -> None:
    _settle_output()
    sys.exit("error: " + " ".join(message.split()))


def _settle_output() -> None:
    """Writes out what was printed; where that fails, the interpreter shall not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_streams() -> None:
    """Lets text out whatever the encoding of the terminal: what it cannot show is escaped.

    What is written to a closed stream is thrown away.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    logging.get_absl_handler().python_handler.setStream(sys.stderr)


def set_up_logging(speaker: str = "") -> None:
    """Shows the library's messages with the time of day, and of jax only what is wrong."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    formatter = std_logging.Formatter(f"%(asctime)s {speaker}%(message)s", datefmt="%H:%M:%S")
    logging.get_absl_handler().setFormatter(formatter)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
