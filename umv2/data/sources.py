"""Text documents, one after another: Python sources, local files, Hugging Face data sets."""

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from umv2 import files
from umv2.config import DataConfig
from umv2.data.paths import DataError, matching_files
from umv2.data.text_files import file_documents

# Distributions ship these folders in some packages and not in others, so leaving them out makes the
# corpus nearly the same everywhere; tests and demos are also the least edited text.
_SKIPPED_FOLDERS = re.compile(
    r"site-packages|dist-packages|__pycache__|tests?|idlelib|lib2to3|tkinter|turtledemo|config-.*"
)
# Written when Python was built or installed: they describe the machine, not the library.
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")

HASH_BYTES = 8


def content_hash(content: bytes) -> int:
    """Returns the first 64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BYTES).digest(), "little")


def content_hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, "n"]:
    """Returns the hash of each document, which decides the side of the split."""
    return np.array([content_hash(content) for content in contents], np.uint64)


def hash_of_all(content_hashes: UInt64[np.ndarray, "n"]) -> str:
    """Returns one hash of the content of many documents, in their order."""
    return hashlib.blake2b(content_hashes.astype("<u8").tobytes(), digest_size=16).hexdigest()


def text_documents(config: DataConfig) -> Iterator[str]:
    """Yields the non-empty documents of a text source in a fixed order.

    `standard_library` is one document a file of the running Python, by relative path, without
    tests, demos and installed packages; `site_packages` the same of all that is installed beside
    it, tests included, each text once. What a file of `text` holds, `file_documents` says.

    Raises:
      DataError: for a file that is empty, unreadable or not of its format, a missing package, or a
        data set that Hugging Face's library cannot read.
    """
    match config.source:
        case "standard_library" | "site_packages":
            yield from _python_sources(config)
        case "text":
            for path in source_files(config).values():
                yield from file_documents(path, config.text_field)
        case "hugging_face":
            yield from _hugging_face_documents(config)
        case _:
            raise _no_text(config)


def source_files(config: DataConfig) -> dict[str, Path]:
    """Returns the files of a text source, in order, by names; none for a data set of the Hub.

    Raises:
      DataError: there are none, or what `data.paths` names is no file, or a source of tokens.
    """
    match config.source:
        case "standard_library":
            root = Path(sysconfig.get_path("stdlib"))
            found = {
                name: path
                for name, path in _python_files(root).items()
                if not _SKIPPED_FILES.fullmatch(path.name)
                and not any(_SKIPPED_FOLDERS.fullmatch(part) for part in Path(name).parts[:-1])
            }
            roots = [root]
        case "site_packages":
            roots = sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
            found = {str(path): path for root in roots for path in _python_files(root).values()}
        case "text":
            return {str(path): path for path in matching_files(config.paths)}
        case "hugging_face":
            return {}
        case _:
            raise _no_text(config)
    if not found:
        places = ", ".join(map(str, roots))
        raise DataError(f"data.source={config.source!r}: no Python sources in {places}")
    return found


def _no_text(config: DataConfig) -> DataError:
    return DataError(f"data.source={config.source!r} holds tokens, not text")


def _python_files(root: Path) -> dict[str, Path]:
    """Returns the Python files below a folder by relative path, in its order."""
    found = (path for path in root.rglob("*.py") if path.is_file())
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _python_sources(config: DataConfig) -> Iterator[str]:
    seen: set[int] = set()
    for path in source_files(config).values():
        with files.errors(path, "cannot be read"):
            text = path.read_text(encoding="utf-8-sig", errors="replace")
        # Packages carry copies of each other's files, so of those a text counts once.
        text_hash = content_hash(text.encode())
        if text and not (config.source == "site_packages" and text_hash in seen):
            seen.add(text_hash)
            yield text


def _hugging_face_documents(config: DataConfig) -> Iterator[str]:
    name, field = config.hugging_face_name, config.text_field
    for row, record in enumerate(_hugging_face_records(config)):
        text = record.get(field) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            keys = sorted(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"data.hugging_face_name={name!r}: row {row}: no text in field"
                f" data.text_field={field!r}, only {keys}"
            )
        if text:
            yield text


def _hugging_face_records(config: DataConfig) -> Iterator[Any]:
    """Yields what the library streams; whatever it raises says why it cannot."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source='hugging_face' needs the optional extra: pip install -e '.[hugging_face]'"
        ) from error
    end = object()
    try:
        stream = iter(
            datasets.load_dataset(
                config.hugging_face_name,
                config.hugging_face_config or None,
                split=config.hugging_face_split,
                streaming=True,
            )
        )
    except Exception as error:  # of its own, of the Hub's, of HTTP: nothing they have in common
        raise _library_error(config, error) from error
    while True:
        try:
            record = next(stream, end)
        except Exception as error:  # the network may be lost at any row
            raise _library_error(config, error) from error
        if record is end:
            return
        yield record


def _library_error(config: DataConfig, error: Exception) -> DataError:
    wanted = f"data.hugging_face_name={config.hugging_face_name!r}"
    if config.hugging_face_config:
        wanted += f", hugging_face_config={config.hugging_face_config!r}"
    said = " ".join(str(error).split())
    return DataError(
        f"{wanted}, hugging_face_split={config.hugging_face_split!r}: cannot be read:"
        f" {type(error).__name__}: {said}"
    )
