"""Python code: the standard library of the running Python, or its installed packages."""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from umv2 import files
from umv2.config import DataConfig
from umv2.config.data import SOURCE_RULES
from umv2.data.hashing import content_hash
from umv2.data.paths import DataError
from umv2.data.sources.entry import TextSource

# Some distributions of Python omit these folders, so skipping them makes the corpus nearly the same
# everywhere. Tests and demos are also the least edited text.
_SKIPPED_FOLDERS = re.compile(
    r"site-packages|dist-packages|__pycache__|tests?|idlelib|lib2to3|tkinter|turtledemo|config-.*"
)
# Generated when Python is built or installed: they describe the machine, not the library.
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")


def _standard_library_files(config: DataConfig) -> dict[str, Path]:
    """Returns the files by relative path, without tests, demos and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    selected = {
        name: path
        for name, path in _python_files(root).items()
        if not _SKIPPED_FILES.fullmatch(path.name)
        and not any(_SKIPPED_FOLDERS.fullmatch(part) for part in Path(name).parts[:-1])
    }
    _require_files(config, selected, [root])
    return selected


def _site_packages_files(config: DataConfig) -> dict[str, Path]:
    """Returns the files of all installed packages, including tests."""
    roots = sorted({Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib")})
    selected = {str(path): path for root in roots for path in _python_files(root).values()}
    _require_files(config, selected, roots)
    return selected


def _python_files(root: Path) -> dict[str, Path]:
    """Returns the Python files below a folder, by relative path and sorted by it."""
    below = (path for path in root.rglob("*.py") if path.is_file())
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in below))


def _require_files(config: DataConfig, selected: dict[str, Path], roots: list[Path]) -> None:
    if not selected:
        folders = ", ".join(map(str, roots))
        raise DataError(f"data.source={config.source!r}: no Python sources in {folders}")


def _standard_library(config: DataConfig) -> Iterator[str]:
    return map(_read, _standard_library_files(config).values())


def _site_packages(config: DataConfig) -> Iterator[str]:
    """Yields each text once: packages vendor copies of each other's files."""
    seen: set[int] = set()
    for path in _site_packages_files(config).values():
        text = _read(path)
        text_hash = content_hash(text.encode())
        if text_hash not in seen:
            seen.add(text_hash)
            yield text


def _read(path: Path) -> str:
    with files.errors(path, "cannot be read"):
        return path.read_text(encoding="utf-8-sig", errors="replace")


STANDARD_LIBRARY = TextSource(
    "standard_library",
    documents=_standard_library,
    files=_standard_library_files,
    rule=SOURCE_RULES["standard_library"],
)
SITE_PACKAGES = TextSource(
    "site_packages",
    documents=_site_packages,
    files=_site_packages_files,
    rule=SOURCE_RULES["site_packages"],
)
