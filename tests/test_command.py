"""How a command exits: one line for a user error, a traceback for a bug."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from absl import flags
from umv2 import command, files
from umv2.config.schema import ConfigError, UserError
COUNT = flags.DEFINE_integer("count", 1, "A number.")
def main(argv):
    {body}
command.run(main)
"""


def run(
    body: str, *arguments: str, shell: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM.format(body=body), *arguments]
    if shell:
        program = ["bash", "-c", f'"$@" {shell}', "bash", *program]
    return subprocess.run(
        program,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        errors="surrogateescape",
    )


@pytest.mark.parametrize(
    ("body", "arguments", "line", "status"),
    [
        ("raise ConfigError('seed=-1: must\\n be >= 0')", (), "error: seed=-1: must be >= 0", 1),
        ("raise OSError(28, 'No space left on device')", (), "error: No space left on device", 1),
        ("raise PermissionError(13, 'Permission denied', '/x')", (), "error: /x: Permission", 1),
        ("raise MemoryError", (), "error: out of memory", 1),
        ("raise KeyboardInterrupt", (), "interrupted", 130),
        ("pass", ("--count=many",), "error: flag --count=many", 1),
        ("pass", ("--cuont=1",), "error: Unknown command line flag 'cuont'", 1),
    ],
)
def test_user_errors_are_one_line(
    body: str, arguments: tuple[str, ...], line: str, status: int
) -> None:
    completed = run(body, *arguments)
    assert completed.returncode == status, completed.stderr
    assert len(completed.stderr.splitlines()) == 1, completed.stderr
    assert completed.stderr.startswith(line)


@pytest.mark.parametrize("bug", ["1 / 0", "raise FileNotFoundError(2, 'No such file', '/x')"])
def test_a_bug_shows_a_traceback(bug: str) -> None:
    completed = run(bug)
    assert completed.returncode == 1
    assert "Traceback" in completed.stderr


@pytest.mark.parametrize(
    ("shell", "status"), [("| head -n 1 && exit ${PIPESTATUS[0]}", 141), (">&- 2>/dev/null", 0)]
)
def test_closed_output_is_not_an_error(shell: str, status: int) -> None:
    completed = run("for i in range(100000): print(i)", shell=shell)
    assert completed.returncode == status
    assert completed.stderr == ""


def test_output_to_a_full_disk_is_a_one_line_error() -> None:
    completed = run("print('x' * 100000)", shell="> /dev/full")
    assert completed.returncode == 1
    assert completed.stderr.endswith("No space left on device\n")
    assert len(completed.stderr.splitlines()) == 1


def test_text_is_printed_in_any_encoding() -> None:
    completed = run("print('ü')", env={"PYTHONIOENCODING": "ascii"})
    assert completed.returncode == 0
    assert completed.stdout == "\\xfc\n"
