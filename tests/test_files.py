"""Paths, atomic writes and locks."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from umv2 import files
from umv2.config.schema import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gs://bucket/run", "--workdir=gs://bucket/run: must be a local path, not a URL"),
        ("s3://bucket", "not a URL"),
        ("file:///tmp/x", "not a URL"),
        ("GS://bucket", "not a URL"),
        ("hdfs+x://y", "not a URL"),
        ("gs:/bucket", "not a URL"),
        ("", "must not be empty"),
        ("a\0b", "null bytes"),
        ("a\udcffb", "UTF-8"),
        ("~no_such_user_here/x", "--workdir=~no_such_user_here/x: "),
    ],
)
def test_an_invalid_path_is_rejected(given: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        files.user_path(given, "--workdir")
    assert message in str(error.value)


def test_only_the_home_folder_of_a_path_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert files.user_path("~/x", "--workdir") == Path("/somewhere/x")
    for name in ("a~b", "a:b", "a[b]", "ü", "a b", "./x", "C:x"):
        assert files.user_path(name, "--workdir") == Path(name)


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.png"
    files.write_text(path, "old")

    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), files.replacing(path) as unfinished:
        assert unfinished.suffix == ".png"
        unfinished.write_text("half")
        raise Interrupted
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.png"]
    files.write_text(path, "ü")
    assert path.read_bytes() == b"\xc3\xbc"


def test_a_new_file_has_the_default_mode(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        files.write_text(tmp_path / "file", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_system_errors_name_the_path_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(files.FileError, match=f"{tmp_path}/file/x: cannot be created: Not a"):
        files.make_folder(tmp_path / "file" / "x")
    with (
        pytest.raises(files.FileError, match=f"{tmp_path}/y: cannot be written: No space left"),
        files.replacing(tmp_path / "y"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    long = tmp_path / ("n" * 300)
    with pytest.raises(files.FileError, match="File name too long"):
        files.write_text(long, "x")


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with files.locked(path, "training"):
        with pytest.raises(files.InUse) as error, files.locked(path, "training"):
            raise AssertionError("both hold it")
        assert f"process {os.getpid()} on " in str(error.value)
        assert "(training); wait" in str(error.value)
    with files.locked(path, "again"):
        pass


def test_a_lock_of_a_dead_process_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import os, sys; from pathlib import Path; from umv2 import files\n"
        "with files.locked(Path(sys.argv[1]), 'training'): os.kill(os.getpid(), 9)"
    )
    completed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert completed.returncode == -9
    assert "(training)" in path.read_text()
    with files.locked(path, "training"):
        pass


def test_without_file_system_locks_nothing_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path / "lock", "one"), files.locked(tmp_path / "lock", "two"):
        pass
