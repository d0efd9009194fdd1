"""Runs commands in forks of one process that has imported what they need, with faults.

A command takes a fraction of a second so, where a process of its own takes three. Reads one JSON
object a line, answers with one: see `Command`.
"""

import builtins
import errno
import io
import json
import os
import resource
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def refuse_writes(folder: str, number: int) -> None:
    """Makes all writes below a folder fail, as on a disk that is read-only or full."""

    def refused(path: Any) -> bool:
        if isinstance(path, int):
            return False
        return os.path.abspath(os.fspath(path)).startswith(folder)

    def error(path: Any) -> OSError:
        return OSError(number, os.strerror(number), os.fspath(path))

    def guard_open(original: Any) -> Any:
        def guarded(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and refused(path):
                raise error(path)
            return original(path, mode, *args, **kwargs)

        return guarded

    builtins.open = io.open = guard_open(io.open)
    low_level, make, rename = os.open, os.mkdir, os.replace

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITING_FLAGS and refused(path):
            raise error(path)
        return low_level(path, flags, *args, **kwargs)

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if refused(path) and not os.path.isdir(path):
            raise error(path)
        make(path, *args, **kwargs)

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        if refused(target):
            raise error(target)
        rename(source, target, **kwargs)

    os.open, os.mkdir, os.replace = os_open, mkdir, replace  # type: ignore[assignment]  # narrower


def run(request: dict[str, Any]) -> None:
    """Runs a command in this process, which ends with it."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for name in request["without"]:
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    for folder, name in request["refused"].items():
        refuse_writes(folder, getattr(errno, name))
    sys.argv = ["command", *request["arguments"]]
    if request["module"] == "umv2":
        from umv2 import cli

        cli.run()
    else:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a command in a fork; returns its status and what it wrote."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), "utf-8", line_buffering=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), "utf-8", line_buffering=True)
            status: Any = 0
            try:
                run(request)
            except SystemExit as end:
                status = end.code or 0
                if isinstance(status, str):
                    sys.stderr.write(status + "\n")
                    status = 1
            except BaseException:  # as the interpreter does
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        for stream in (out, err):
            stream.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(ended),
            "out": out.read().decode(errors="replace"),
            "err": err.read().decode(errors="replace"),
        }


def main() -> None:
    """Serves until its input ends."""
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    # All that commands import, but nothing that asks for a device: threads do not survive a fork.
    from umv2 import cli, modes  # noqa: F401

    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
