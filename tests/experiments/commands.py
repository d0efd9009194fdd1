"""Runs the commands of experiments/ as a shell would, but in forks of one process.

An interpreter that has imported what they all import starts a command in milliseconds. Run as a
script this is that interpreter: it reads a command in JSON from each line of its input, and answers
with status, output and errors.
"""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TRACE = "Traceback"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    output: str
    errors: str


class Commands:
    """Starts commands in forks of a process of its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        module: str,
        *arguments: str,
        folder: Path,
        stdout: str = "",
        missing: Iterable[str] = (),
    ) -> Ended:
        """Runs `python -m experiments.MODULE ARGUMENTS` in a folder.

        Args:
          module: below experiments.
          arguments: of it.
          folder: to work in.
          stdout: a file to write to, or "closed" for a pipe that nobody reads; "": collected.
          missing: packages that it finds not to be installed.
        """
        request = {
            "module": f"experiments.{module}",
            "arguments": arguments,
            "folder": str(folder),
            "stdout": stdout,
            "missing": list(missing),
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
    # Without jax, whose threads do not survive a fork.
    for name in ("experiments.cli", "umv2.config_files"):
        importlib.import_module(name)

    assert "jax" not in sys.modules
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
    if request["stdout"] == "closed":
        reader, output = os.pipe()
        os.close(reader)
    elif request["stdout"]:
        output = os.open(request["stdout"], os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.chdir(request["folder"])
    for name in request["missing"]:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system reads so
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


if __name__ == "__main__":
    _serve()
