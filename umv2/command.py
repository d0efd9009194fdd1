"""Entry point of commands: standard streams, logging, one-line user errors and flag overrides.

main.py and the scripts in experiments/ start with `run`. Imports neither jax nor numpy.
"""

import contextlib
import errno
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from absl import app, flags, logging

from umv2 import files
from umv2.config import files as config_files
from umv2.config.schema import ConfigError, UserError

# Errors of the machine, its disks or a user's path, which are never bugs wherever they occur.
_ENVIRONMENT_ERRNOS = files.TRANSIENT_ERRNOS | {errno.ENAMETOOLONG, errno.ENOTDIR}
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_INTERRUPTED_STATUS = 130  # the shell convention for SIGINT
_BROKEN_PIPE_STATUS = 141  # the shell convention for SIGPIPE


def run(
    main: Callable[[list[str]], Any], *, parse: Callable[[list[str]], list[str]] | None = None
) -> None:
    """Parses the flags, calls `main` with the remaining arguments, and exits.

    A `UserError`, a flag error, a full disk and the like print one line to standard error and exit
    with status 1; Ctrl-C prints one line and exits with status 130. Bugs show a traceback.

    Args:
      main: the command.
      parse: parses the flags of a command line, program first, and returns the remaining arguments;
        None: absl's flags.
    """
    _set_up_streams()
    set_up_logging()

    def parse_flags(arguments: list[str]) -> list[str]:
        with one_line_errors():
            return parse(arguments) if parse else flags.FLAGS(arguments)

    def guarded(arguments: list[str]) -> None:
        with one_line_errors():
            main(arguments)
            write("", end="")  # flush

    app.run(guarded, flags_parser=parse_flags)


def use_huge_pages(setting: Path = _HUGE_PAGES) -> None:
    """Restarts this process with huge pages for large allocations, if that takes asking for them.

    XLA allocates the temporaries of a program anew in every step, 200 MB at configs/tiny.py, and on
    small pages a CPU spends a fifth of the step on faulting them in. glibc reads the request once,
    when a process starts. A value of glibc.malloc.hugetlb in GLIBC_TUNABLES is left as it is.

    Args:
      setting: file in which Linux says when it gives out huge pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    arguments = sys.argv[1:]
    # Where another program runs this one in its process, its own command line is not ours.
    is_own_process = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments != []
    if "glibc.malloc.hugetlb" in tunables or not is_own_process:
        return
    try:
        on_request = "[madvise]" in setting.read_text()
    except OSError:
        return
    if on_request:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exits with a one-line message on errors that are not bugs; bugs keep their traceback."""
    try:
        yield
    except (UserError, flags.Error, app.UsageError) as error:
        _exit_with(str(error))
    except BrokenPipeError:
        _flush_output()
        sys.exit(_BROKEN_PIPE_STATUS)  # the reader has exited (`| head`)
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRNOS:
            raise
        path = f"{error.filename}: " if error.filename else ""
        _exit_with(f"{path}{files.reason(error)}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED_STATUS)
    except MemoryError:
        _exit_with("out of memory")


def write(text: str, end: str = "\n") -> None:
    """Writes to standard output and flushes it.

    Raises:
      FileError: the write failed, for example because the disk is full.
      BrokenPipeError: the reader has exited.
    """
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.FileError(f"standard output: {files.reason(error)}") from error


def refuse_arguments(arguments: list[str]) -> None:
    """Raises ConfigError for positional arguments; the first argument is the program."""
    if len(arguments) > 1:
        raise ConfigError(f"{arguments[1]}: unexpected argument; options are written --name=value")


def end_of_flags(arguments: Sequence[str]) -> int:
    """Returns the index of "--", which ends the flags, or the number of arguments."""
    return arguments.index("--") if "--" in arguments else len(arguments)


def define_overrides(
    arguments: list[str], names: Collection[str], registry: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines an absl flag for every --NAME.FIELD override on a command line.

    Args:
      arguments: arguments of the command line, program first.
      names: names of the flags that give configurations.
      registry: flags to add the overrides to.

    Raises:
      ConfigError: a field does not exist.
    """
    given = registry.read_flags_from_files(arguments[1:], force_gnu=False)
    for argument in given[: end_of_flags(given)]:
        match = re.match(r"--?(?:no)?((\w+)\.([^=]*))", argument)
        if match is None or match[2] not in names or match[1] in registry:
            continue
        flag: flags.MultiFlag[str] = flags.MultiFlag(
            parser=flags.ArgumentParser(),
            serializer=flags.ArgumentSerializer(),
            name=match[1],
            default=None,
            help_string=f"Overrides {match[3]} of the configuration.",
            # A boolean flag also accepts --config.FIELD and --noconfig.FIELD.
            boolean=config_files.field_type(match[3]) is bool,
        )
        flags.DEFINE_flag(flag, registry)


def overrides(name: str, registry: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the fields of a configuration that the command line overrides, by path.

    Raises:
      ConfigError: a value is not valid for its field.
    """
    prefix = f"{name}."
    given = {
        flag.removeprefix(prefix): cast(list[str], registry[flag].value)
        for flag in registry
        if flag.startswith(prefix) and registry[flag].present
    }
    return {path: config_files.parse(path, texts) for path, texts in given.items()}


def _exit_with(message: str) -> None:
    _flush_output()
    sys.exit("error: " + " ".join(message.split()))


def _flush_output() -> None:
    """Flushes standard output; if that fails, discards it, so that exiting does not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_streams() -> None:
    """Makes standard streams escape characters that their encoding lacks; replaces closed ones."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    logging.get_absl_handler().python_handler.setStream(sys.stderr)


def set_up_logging(prefix: str = "") -> None:
    """Logs messages of this package with the time of day and a prefix, and warnings of jax."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    formatter = std_logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
    logging.get_absl_handler().setFormatter(formatter)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
