"""Golden numbers: the same text must always give the same split, batches and identity.

A checkpoint stores the identity of its corpus and resumes at a step of its batches, so a change
that alters a number here breaks every existing run.
"""

import dataclasses
import hashlib
import itertools
import sys
import sysconfig
import types
import typing
from pathlib import Path

import numpy as np
import pytest

from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Corpus, load_corpus
from umv2.data.loader import held_out_batches, train_batches
from umv2.data.prepare import prepare, train_tokenizer
from umv2.data.shards import ShardManifest
from umv2.data.tokenizers import ByteTokenizer, Tokenizer

SEQUENCE_LENGTH = 64


@pytest.fixture
def text(config: DataConfig, text_folder: Path) -> DataConfig:
    return dataclasses.replace(
        config, paths=(f"{text_folder}/*.txt",), sequence_length=SEQUENCE_LENGTH
    )


@pytest.fixture
def python_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the modules of this Python with forty small ones, each of them twice."""
    root = tmp_path / "lib"
    for number in range(40):
        for name in (f"m{number:02d}.py", f"copies/m{number:02d}.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"x = {number}\n" * (number + 1), encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(root))


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the library with a dataset of forty rows."""
    rows = [{"text": f"row {number}: " + "ö" * number} for number in range(40)]
    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: rows, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)


def memmap_file(folder: Path) -> str:
    """Writes thirty documents of tokens, each ended by 256; returns the path."""
    documents = [np.arange(3 * number, dtype="<u2") % 200 for number in range(1, 31)]
    np.concatenate([np.append(d, 256) for d in documents]).astype("<u2").tofile(folder / "t.bin")
    return f"{folder}/t.bin"


def opened(config: DataConfig) -> Corpus:
    return load_corpus(config, ByteTokenizer(), vocab_size=257)


def digest(corpus: Corpus, config: DataConfig) -> str:
    """Returns one hash of the first training batches and all held-out batches."""
    state = hashlib.blake2b(digest_size=8)
    training = train_batches(corpus, config, batch_size=4)
    for batch in (
        *itertools.islice(training, 40),
        *held_out_batches(corpus, config, batch_size=4),
    ):
        for field in dataclasses.fields(batch):
            state.update(np.ascontiguousarray(getattr(batch, field.name)).tobytes())
    training.close()
    return state.hexdigest()


@dataclasses.dataclass(frozen=True)
class Expected:
    """The identity of a corpus, and the hash of its batches."""

    documents: str
    held_out: str
    batches: str
    counts: tuple[int, int, int, int]  # documents and tokens of all, and of those held out


TEXT = ("e0ca30cc527ed27a8dfd35d07ec20119", "89fff159e7a0fd5017619d2b96e74223")
TEXT_COUNTS = (40, 3145, 23, 1755)
EXPECTED = {
    "text": Expected(*TEXT, "6105288de615e826", TEXT_COUNTS),
    "array_record": Expected(*TEXT, "6105288de615e826", TEXT_COUNTS),
    "memmap": Expected(
        "a848453c0062b44147aa9f7e316ea0bc",
        "b966e04238a8ab11ad5f15a4a23fae01",
        "1295ae337b776848",
        (30, 1395, 15, 657),
    ),
    "hugging_face": Expected(
        "467ecb2c7274e269e5541ad2164b38f5",
        "33871cacef54da7b6232822c15ee4a0e",
        "7aa23e18f374ba46",
        (40, 1870, 26, 1266),
    ),
    "standard_library": Expected(
        "1a2eefcbb19791bce0cd074d7f3f1c11",
        "4146429f42fd2e82af68763a4c8a160a",
        "c9887aef0250dc38",
        (80, 11370, 32, 5430),
    ),
    "site_packages": Expected(
        "1ba0d045975679d4f3d17e7f290c6838",
        "792c6c474f99c664edf49c839df848f1",
        "6dab83d1a9621a0a",
        (40, 5685, 16, 2715),
    ),
}


def of_source(name: str, text: DataConfig, folder: Path) -> DataConfig:
    """Returns a configuration that trains on a source, or on its shards if it is streamed."""
    if name == "memmap":
        return dataclasses.replace(text, source=name, paths=(memmap_file(folder),))
    if name == "text":
        return text
    if name in ("array_record", "hugging_face"):
        if name == "hugging_face":
            text = dataclasses.replace(text, source=name, paths=(), hugging_face_name="rows")
        prepare(text, folder / "shards", num_processes=1, shard_bytes=500)
        paths = (f"{folder}/shards/*.array_record",)
        return dataclasses.replace(text, source="array_record", paths=paths)
    return dataclasses.replace(text, source=name, paths=())


@pytest.mark.usefixtures("python_files", "hugging_face")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_source_has_the_same_identity_and_batches(
    name: str, text: DataConfig, tmp_path: Path
) -> None:
    config, expected = of_source(name, text, tmp_path), EXPECTED[name]
    corpus = opened(config)
    found = corpus.identity
    assert found.tokenizer == "bytes"
    assert (found.documents, found.held_out) == (expected.documents, expected.held_out)
    description = dict(found.description)
    assert description.pop("source") == config.source
    assert tuple(description.values()) == expected.counts
    assert digest(corpus, config) == expected.batches


def test_documents_of_tasks_and_their_warm_up_are_the_same(text: DataConfig) -> None:
    tasks = LongContextDataConfig(("key_value", "needle"), 30, 0.25, 0.5, 3, 0)
    config = dataclasses.replace(text, long_context=tasks)
    corpus = opened(config)
    assert (corpus.identity.documents, corpus.identity.held_out) == TEXT
    assert digest(corpus, config) == "4297c558fd985f40"


@pytest.mark.usefixtures("hugging_face")
def test_shards_belong_to_the_same_job(text: DataConfig, tmp_path: Path) -> None:
    """Shards prepared by an older version are neither rejected nor remade."""
    config = dataclasses.replace(
        text, source="hugging_face", paths=("unread",), hugging_face_name="rows"
    )
    prepare(config, tmp_path, num_processes=1, shard_bytes=500)
    manifest = ShardManifest.read(tmp_path)
    assert list(manifest.origin.items()) == [
        ("source", "hugging_face"),
        ("paths", ["unread"]),
        ("text_field", "text"),
        ("hugging_face_name", "rows"),
        ("hugging_face_config", ""),
        ("hugging_face_split", "train"),
        ("shard_bytes", 500),
    ]
    assert list(manifest.shards.values()) == [
        "9b458331f10363a539995003f83b674b",
        "ccbfbd286edd7c0f9d23c5d54413f806",
        "efdd29d594807ca9dca8bddb2ce3e2d2",
        "a17028a630c44c65f3acac241946fd09",
    ]


def test_cached_tokens_have_the_same_name(text: DataConfig, tmp_path: Path) -> None:
    plain = ByteTokenizer()
    others = types.SimpleNamespace(
        vocab_size=257,
        end_of_text_id=256,
        fingerprint="golden",
        encode=plain.encode,
        decode=plain.decode,
        token_bytes=plain.token_bytes,
    )
    tokenizer = typing.cast(Tokenizer, others)
    load_corpus(text, tokenizer, vocab_size=257, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "tokens-2333974149d8f9c4.npz"


def test_a_tokenizer_is_trained_on_the_same_text(
    text: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(
        "umv2.data.prepare.train_bpe", lambda given, size, path: texts.extend(given)
    )
    train_tokenizer(text, tmp_path / "bpe.json", 300)
    assert (
        hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest() == "980f894ed804a46a"
    )
