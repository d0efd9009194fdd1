"""How a command exits: one line for a user error, a traceback for a bug."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
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


@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.malloc.check=0",
            "glibc.malloc.check=0:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        (None, None, "None"),
    ],
)
def test_a_process_restarts_once_with_huge_pages_if_linux_wants_to_be_asked(
    setting: str | None, given: str | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    body = f"""
    from pathlib import Path
    command.use_huge_pages(Path({str(file)!r}))
    command.write(f"{{COUNT.value}} {{os.environ.get('GLIBC_TUNABLES')}} {{os.getpid()}}")
    """
    program = PROGRAM.replace("import sys", "import os, sys", 1)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    with subprocess.Popen(
        [sys.executable, "-c", program.format(body=body), "--count=3"],
        env=environment | ({} if given is None else {"GLIBC_TUNABLES": given}),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output, _ = process.communicate()
    assert output == f"3 {expected} {process.pid}\n"


def test_a_program_that_runs_a_command_in_its_own_process_is_not_restarted(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never")
    program = f"""
import sys
from pathlib import Path
from umv2 import command
sys.argv = ["main.py", "--config=tiny"]
command.use_huge_pages(Path({str(setting)!r}))
print("not restarted")
"""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    completed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert completed.stdout == "not restarted\n"
    assert completed.stderr == ""
