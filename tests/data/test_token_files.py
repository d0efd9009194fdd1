import dataclasses
import gzip
import lzma
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.data.contents import contents
from umv2.config import DataConfig
from umv2.data import token_files
from umv2.data.corpus import load_corpus
from umv2.data.documents import DocumentSubset
from umv2.data.paths import DataError
from umv2.data.token_files import MemmapDocuments

END = 9


def write_raw(path: Path, tokens: Sequence[int], dtype: str = "uint16") -> Path:
    np.array(tokens, np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_and_npy_files_have_the_same_documents(tmp_path: Path, dtype: str) -> None:
    tokens = [1, 2, END, END, 3, END, 4, 5]
    raw = write_raw(tmp_path / "a.npy", tokens, dtype)
    real = tmp_path / "b.npy"
    np.save(real, np.array(tokens, dtype))
    assert raw.read_bytes() != real.read_bytes()
    documents = MemmapDocuments([raw, real], dtype, END, vocab_size=10)
    assert contents(documents) == 2 * [[1, 2], [3], [4, 5]]
    assert documents.content_hashes[:3].tolist() == documents.content_hashes[3:].tolist()
    assert len(set(documents.content_hashes.tolist())) == 3
    assert documents.read(4, 0, 1).tolist() == [3]


def test_documents_may_cross_chunks_of_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raw(tmp_path / "a.npy", [1, 2, 3, 4, 5, END, 6, END])
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", 3)
    documents = MemmapDocuments([path], "uint16", END, vocab_size=10)
    assert contents(documents) == [[1, 2, 3, 4, 5], [6]]
    with pytest.raises(DataError, match=r"byte offset 8 \(token 4\): token id 5 is not below"):
        MemmapDocuments([path], "uint16", 2, vocab_size=5)


def test_a_document_has_the_same_hash_in_both_dtypes(tmp_path: Path) -> None:
    small = write_raw(tmp_path / "a.npy", [1, 2, END], "uint16")
    large = write_raw(tmp_path / "b.npy", [1, 2, END], "uint32")
    hashes = [
        MemmapDocuments([path], dtype, END, vocab_size=10).content_hashes.tolist()
        for path, dtype in ((small, "uint16"), (large, "uint32"))
    ]
    assert hashes[0] == hashes[1]


def test_pickling_leaves_the_tokens_on_disk(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.npy", [*range(8), END] * 10_000)
    full = MemmapDocuments([path], "uint16", END, vocab_size=10)
    documents = DocumentSubset(full, np.arange(2))
    before = contents(documents)
    assert contents(pickle.loads(pickle.dumps(documents))) == before
    num_bytes = len(pickle.dumps(documents))
    assert num_bytes < 10_000 * 28 + 2_000, "28 bytes a document"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.npy: cannot be read"),
        (b"\x01\x00\x09\x00\x02", "a.npy: truncated at byte offset 5"),
        (b"\x01\x00\x0b\x00\x09\x00", r"a.npy: byte offset 2 \(token 1\): token id 11 is not bel"),
        (b"\x01\x00\x02\x00", "no token is end_of_text_id=9"),
        (b"\x93NUMPY", "a.npy: cannot be read"),
    ],
)
def test_an_invalid_token_file_names_file_and_offset(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=message):
        MemmapDocuments([tmp_path / "a.npy"], "uint16", END, vocab_size=10)


def test_offsets_in_an_npy_file_include_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([1, END, 12], np.uint16))
    offset = path.stat().st_size - 2
    with pytest.raises(DataError, match=rf"byte offset {offset} \(token 2\)"):
        MemmapDocuments([path], "uint16", END, vocab_size=10)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.npy: cannot be read"):
        MemmapDocuments([path], "uint16", END, vocab_size=10)


@pytest.mark.parametrize("tokens", [np.ones(4, np.int64), np.ones((2, 2), np.uint16)])
def test_an_npy_file_of_another_dtype_is_named(tmp_path: Path, tokens: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", tokens)
    with pytest.raises(DataError, match=f"a.npy: holds {tokens.dtype} of shape"):
        MemmapDocuments([tmp_path / "a.npy"], "uint16", END, vocab_size=10)


def tokens_like_text(vocab_size: int, end: int, count: int = 6_000) -> np.ndarray:
    """Returns tokens with the skewed frequencies of text, in documents of about 300 tokens."""
    rng = np.random.default_rng(vocab_size)
    tokens = np.minimum(rng.zipf(1.2, count), vocab_size) - 1
    return np.where(rng.random(count) < 1 / 300, end, tokens)


NAMES = {
    "<u2": "uint16",
    ">u2": "big-endian uint16",
    "<u4": "uint32",
    ">u4": "big-endian uint32",
    "<u8": "uint64",
}


@pytest.mark.parametrize("vocab_size", [257, 2_000, 50_304, 65_536, 128_256])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("declared", ["uint16", "uint32"])
def test_tokens_of_another_dtype_are_detected(
    tmp_path: Path, vocab_size: int, is_last: bool, declared: Literal["uint16", "uint32"]
) -> None:
    end = vocab_size - 1 if is_last else 0
    tokens = tokens_like_text(vocab_size, end)
    for kind, name in NAMES.items():
        if kind.endswith("u2") and vocab_size > 1 << 16:
            continue
        path = tmp_path / "a.bin"
        tokens.astype(kind).tofile(path)
        if name == declared:
            read = MemmapDocuments([path], declared, end, vocab_size)
            assert read.lengths.sum() == (tokens != end).sum()
            continue
        with pytest.raises(
            DataError,
            match=rf"a\.bin: (by its values, .* holds {name} tok|.*; as (big-endian )?uint16 the)",
        ):
            MemmapDocuments([path], declared, end, vocab_size)


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 0] * 500,  # documents of one token
        [0, 5, 0, 7] * 500,
        [*range(8), END] * 1_000,
        [0, 1] * 30 + [END],
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_unusual_tokens_of_the_right_dtype_are_accepted(
    tmp_path: Path, tokens: list[int], dtype: str
) -> None:
    end = END if END in tokens else 0
    path = write_raw(tmp_path / "a.bin", tokens, dtype)
    documents = MemmapDocuments([path], dtype, end, vocab_size=51_200)
    assert documents.lengths.sum() == sum(token != end for token in tokens)


@pytest.mark.parametrize("kind", [">u2", "<u8", ">i4", "<f4"])
def test_a_header_with_another_dtype_is_named(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "a.npy", np.array([1, END], kind))
    with pytest.raises(DataError, match=r"a\.npy: holds .* of shape \(2,\), not a non-empty 1-D"):
        MemmapDocuments([tmp_path / "a.npy"], "uint16", END, vocab_size=10)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", gzip.compress(b"x", mtime=0)),
        ("xz", lzma.compress(b"x")),
        ("Parquet", b"PAR1" * 9),
        ("zip", b"PK\x03\x04" * 9),
    ],
)
def test_a_file_of_another_format_is_not_a_token_file(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.bin: starts like {name}; token files are raw"):
        MemmapDocuments([tmp_path / "a.bin"], "uint16", END, vocab_size=65_536)


@pytest.mark.parametrize(
    "header", [b"{'descr'", b"\x01\x00\xff\xff", b"\x01\x00v\x00{" + b"(" * 117]
)
def test_a_damaged_header_is_a_one_line_error(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY" + header)
    with pytest.raises(DataError, match=r"a\.npy: cannot be read: "):
        MemmapDocuments([tmp_path / "a.npy"], "uint16", END, vocab_size=10)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.npy: cannot be read"):
        MemmapDocuments([tmp_path / "gone.npy"], "uint16", END, vocab_size=10)


def test_a_corpus_of_token_files_needs_no_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = [[*rng.integers(0, END, 5).tolist(), END] for _ in range(30)]
    path = write_raw(tmp_path / "a.npy", [i for document in tokens for i in document])
    config = dataclasses.replace(
        config, source="memmap", paths=(str(path),), tokenizer="none", end_of_text_id=END
    )
    corpus = load_corpus(config, None, vocab_size=10)
    both = contents(corpus.train) + contents(corpus.held_out)
    assert sorted(both) == sorted(document[:-1] for document in tokens)
    assert corpus.held_out_bytes is None
    with pytest.raises(DataError, match="cannot decode tokens without a tokenizer"):
        corpus.held_out_text()
