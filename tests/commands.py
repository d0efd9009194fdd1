"""Runs commands as a shell would, but in forks of one process, and can inject machine failures.

An interpreter that has imported the dependencies starts a command in milliseconds. This script is
that interpreter: it reads a command in JSON from each line of its input, and replies with status,
output and errors.
"""

import builtins
import dataclasses
import errno
import importlib
import io
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TRACE = "Traceback"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclasses.dataclass(frozen=True)
class Completed:
    """The result of a command."""

    status: int
    output: str
    errors: str


class Commands:
    """Starts commands in forks of a server process."""

    def __init__(self, *preloaded: str, environment: Mapping[str, str] | None = None) -> None:
        """Preloads modules, which must not start a JAX backend: threads do not survive a fork."""
        self._server = subprocess.Popen(
            [sys.executable, __file__, *preloaded],
            env=None if environment is None else dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        module: str,
        *arguments: str,
        folder: Path = ROOT,
        stdout: str = "",
        missing: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> Completed:
        """Runs `python -m MODULE ARGUMENTS`.

        Args:
          module: the module to run; "main" is main.py.
          arguments: its command-line arguments.
          folder: the working directory.
          stdout: a file to write to, "closed" for a pipe without a reader, "" to capture.
          missing: packages that appear not to be installed.
          environment: additional environment variables.
          refused: folders that cannot be written to, each with the name of the errno.
        """
        request = {
            "module": module,
            "arguments": arguments,
            "folder": str(folder),
            "stdout": stdout,
            "missing": list(missing),
            "environment": dict(environment or {}),
            "refused": dict(refused or {}),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Completed(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """Stops the server process."""
        self._server.communicate()


def _serve() -> None:
    sys.path[0] = str(ROOT)
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                _run(request, output.fileno(), errors.fileno())
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        completed = Completed(os.waitstatus_to_exitcode(status), *texts)
        sys.stdout.write(json.dumps(dataclasses.asdict(completed)) + "\n")
        sys.stdout.flush()


def _run(request: Mapping[str, Any], output: int, errors: int) -> None:
    """Runs a command in this process and exits."""
    if request["stdout"] == "closed":
        reader, output = os.pipe()
        os.close(reader)
    elif request["stdout"]:
        output = os.open(request["stdout"], os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for name in request["missing"]:
        sys.modules[name] = None  # type: ignore[assignment]  # makes the import fail
    for folder, name in request["refused"].items():
        _refuse_writes(folder, getattr(errno, name))
    sys.argv = [request["module"], *request["arguments"]]
    status = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        if isinstance(ending.code, str):
            sys.stderr.write(ending.code + "\n")
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:  # as the interpreter reports it at exit
        os.write(2, f"Exception ignored: {error}\n".encode())
        status = 120
    os._exit(status)


def _refuse_writes(folder: str, number: int) -> None:
    """Makes all writes below a folder fail, as on a read-only or full disk."""

    def check(path: Any) -> None:
        if not isinstance(path, int) and os.path.abspath(os.fspath(path)).startswith(folder):
            raise OSError(number, os.strerror(number), os.fspath(path))

    open_file, open_descriptor = io.open, os.open
    make, replace = os.mkdir, os.replace

    def guarded_open(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            check(path)
        return open_file(path, mode, *args, **kwargs)

    def guarded_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITING:
            check(path)
        return open_descriptor(path, flags, *args, **kwargs)

    def guarded_make(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.isdir(path):
            check(path)
        make(path, *args, **kwargs)

    def guarded_replace(source: Any, target: Any, **kwargs: Any) -> None:
        check(target)
        replace(source, target, **kwargs)

    for owner, name, guarded in (
        (builtins, "open", guarded_open),
        (io, "open", guarded_open),
        (os, "open", guarded_descriptor),
        (os, "mkdir", guarded_make),
        (os, "replace", guarded_replace),
    ):
        setattr(owner, name, guarded)


if __name__ == "__main__":
    _serve()
