"""Runs commands as a shell would, but in forks of one process, and with faults of the machine.

An interpreter that has imported what they need starts a command in milliseconds. Run as a script
this is that interpreter: it reads a command in JSON from each line of its input, and answers with
status, output and errors.
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
class Ended:
    """How a command ended."""

    status: int
    output: str
    errors: str


class Commands:
    """Starts commands in forks of a process of its own."""

    def __init__(self, *preloaded: str, environment: Mapping[str, str] | None = None) -> None:
        """Names modules to import once; none may ask for a device: no thread survives a fork."""
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
    ) -> Ended:
        """Runs `python -m MODULE ARGUMENTS`.

        Args:
          module: to run; "main": main.py.
          arguments: of it.
          folder: to work in.
          stdout: a file to write to, or "closed" for a pipe that nobody reads; "": collected.
          missing: packages that it finds not to be installed.
          environment: variables beside those of the process.
          refused: folders in which nothing can be written, and why: the name of an errno.
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
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
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
        ended = Ended(os.waitstatus_to_exitcode(status), *texts)
        sys.stdout.write(json.dumps(dataclasses.asdict(ended)) + "\n")
        sys.stdout.flush()


def _run(request: Mapping[str, Any], output: int, errors: int) -> None:
    """Runs a command in this process, which ends with it."""
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
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system reads so
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
    except OSError as error:  # as the interpreter says it at its end
        os.write(2, f"Exception ignored: {error}\n".encode())
        status = 120
    os._exit(status)


def _refuse_writes(folder: str, number: int) -> None:
    """Makes all writes of Python below a folder fail, as on a disk that is read-only or full."""

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
