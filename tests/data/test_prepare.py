import dataclasses
import json
import pickle
import string
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from umv2.config import DataConfig
from umv2.data.documents import Documents
from umv2.data.paths import DataError
from umv2.data.pipeline import load_corpus
from umv2.data.prepare import prepare, train_tokenizer
from umv2.data.shards import MANIFEST_NAME, ArrayRecordDocuments, ShardManifest, encode_record
from umv2.data.tokenizers import ByteTokenizer, load_tokenizer

SHARD_BYTES = 400


@pytest.fixture
def text(config: DataConfig, text_folder: Path) -> DataConfig:
    return dataclasses.replace(config, paths=(f"{text_folder}/*.txt",))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record"))}


def prepared(config: DataConfig, folder: Path) -> DataConfig:
    return dataclasses.replace(config, source="array_record", paths=(f"{folder}/*.array_record",))


def contents(documents: Documents) -> list[list[int]]:
    return [documents.read(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]


def test_prepared_shards_are_the_same_corpus_as_the_text(text: DataConfig, tmp_path: Path) -> None:
    manifest = prepare(text, tmp_path / "out", num_processes=1, shard_bytes=SHARD_BYTES)
    assert manifest.num_documents == 40
    assert manifest.num_shards == len(shards(tmp_path / "out")) > 5
    direct = load_corpus(text, ByteTokenizer(), vocab_size=257)
    tokens = load_corpus(prepared(text, tmp_path / "out"), ByteTokenizer(), vocab_size=257)
    assert contents(tokens.train) == contents(direct.train)
    assert contents(tokens.held_out) == contents(direct.held_out)
    assert tokens.held_out_bytes == direct.held_out_bytes
    assert tokens.held_out_text() == direct.held_out_text()
    assert tokens.held_out.read(0, 2, 5).tolist() == direct.held_out.read(0, 2, 5).tolist()


def test_processes_write_the_same_shards(text: DataConfig, tmp_path: Path) -> None:
    prepare(text, tmp_path / "one", num_processes=1, shard_bytes=SHARD_BYTES)
    prepare(text, tmp_path / "two", num_processes=2, shard_bytes=SHARD_BYTES)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert ShardManifest.read(tmp_path / "one") == ShardManifest.read(tmp_path / "two")


def test_an_interrupted_run_resumes_with_what_is_missing(
    text: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    prepare(text, tmp_path / "whole", num_processes=1, shard_bytes=SHARD_BYTES)
    last = text_folder / "39.txt"
    good = last.read_bytes()
    last.write_bytes(b"\xff")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"39\.txt: not UTF-8"):
        prepare(text, out, num_processes=1, shard_bytes=SHARD_BYTES)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert 0 < len(done) < len(shards(tmp_path / "whole"))
    with pytest.raises(DataError, match="prepare has not finished these shards"):
        load_corpus(prepared(text, out), ByteTokenizer(), vocab_size=257)

    last.write_bytes(good)
    (out / "shard-00099.array_record.tmp").write_bytes(b"what a kill leaves")
    prepare(text, out, num_processes=1, shard_bytes=SHARD_BYTES)
    assert shards(out) == shards(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    load_corpus(prepared(text, out), ByteTokenizer(), vocab_size=257)


def test_a_finished_folder_is_left_alone(
    text: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(text, tmp_path, num_processes=1)
    monkeypatch.setattr("umv2.data.prepare.text_documents", lambda config: pytest.fail("read"))
    assert prepare(text, tmp_path, num_processes=1) == first


def test_a_folder_of_another_job_is_refused(text: DataConfig, tmp_path: Path) -> None:
    prepare(text, tmp_path, num_processes=1)
    with pytest.raises(DataError, match="belongs to another job: origin is"):
        prepare(dataclasses.replace(text, text_field="body"), tmp_path, num_processes=1)


def test_text_that_changed_between_runs_is_noticed(
    text: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    last = text_folder / "39.txt"
    last.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(text, tmp_path / "out", num_processes=1, shard_bytes=SHARD_BYTES)
    last.write_bytes(b"good")
    (text_folder / "00.txt").write_text("x" * SHARD_BYTES)
    with pytest.raises(DataError, match=r"shard-00000.array_record: holds \d documents, but"):
        prepare(text, tmp_path / "out", num_processes=1, shard_bytes=SHARD_BYTES)


def test_tokens_cannot_be_prepared(text: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'memmap' holds tokens, not text"):
        prepare(dataclasses.replace(text, source="memmap"), tmp_path, num_processes=1)
    with pytest.raises(DataError, match="prepare needs a tokenizer"):
        prepare(dataclasses.replace(text, tokenizer="none"), tmp_path, num_processes=1)


def test_train_tokenizer_sees_the_training_side_alone(config: DataConfig, tmp_path: Path) -> None:
    for letter in string.ascii_lowercase:
        (tmp_path / f"{letter}.txt").write_text(f"qz{letter} " * 50)
    config = dataclasses.replace(config, paths=(f"{tmp_path}/*.txt",))
    train_tokenizer(config, tmp_path / "bpe.json", 1000)
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    corpus = load_corpus(config, ByteTokenizer(), vocab_size=257)
    decode = ByteTokenizer().decode
    assert tokenizer is not None
    for side, is_one_token in ((corpus.train, True), (corpus.held_out, False)):
        for tokens in contents(side):
            word = decode(tokens[3:7])  # " qza"
            assert (len(tokenizer.encode(word)) == 1) == is_one_token, word


@pytest.fixture
def shard_folder(text: DataConfig, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    prepare(text, folder, num_processes=1, shard_bytes=SHARD_BYTES)
    return folder


def open_shards(folder: Path, *, vocab_size: int = 257, end: int = 256) -> ArrayRecordDocuments:
    return ArrayRecordDocuments(
        sorted(folder.glob("*.array_record")),
        end_of_text_id=end,
        vocab_size=vocab_size,
        tokenizer_fingerprint=None,
    )


def test_shards_need_no_tokenizer(shard_folder: Path) -> None:
    documents = open_shards(shard_folder)
    assert len(documents.lengths) == 40
    assert bytes(documents.read(0, 0, 8).tolist()) == b"document"
    in_worker = pickle.loads(pickle.dumps(documents))
    assert contents(in_worker) == contents(documents)


def test_a_truncated_or_damaged_shard_is_named(shard_folder: Path) -> None:
    path = shard_folder / "shard-00001.array_record"
    content = path.read_bytes()
    for damaged in (b"", content[:-10], content[: len(content) // 2], b"hello" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard-00001\.array_record: truncated, empty or not"):
            open_shards(shard_folder)
    # Past the 64 bytes of its first block header and the file signature.
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"shard-00001\.array_record: (cannot be read|truncated)"):
        open_shards(shard_folder)


def write_records(folder: Path, *records: bytes) -> None:
    path = folder / "shard-00000.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_a_bad_record_is_named(shard_folder: Path) -> None:
    good = encode_record(np.array([1, 2, 3]), 7, "uint16")
    write_records(shard_folder, good, good[:-1])
    with pytest.raises(DataError, match="record 1: truncated at byte 13"):
        open_shards(shard_folder)
    write_records(shard_folder, good, good[:5])
    with pytest.raises(DataError, match="record 1: truncated at byte 5"):
        open_shards(shard_folder)
    write_records(shard_folder, good, encode_record(np.array([1, 300, 2]), 7, "uint16"))
    with pytest.raises(DataError, match="record 1, token 1: token id 300 is not below vocab_size"):
        open_shards(shard_folder)


def test_a_record_is_a_hash_and_little_endian_tokens() -> None:
    assert encode_record(np.array([1, 258]), 5, "uint16") == bytes([5, *7 * [0], 1, 0, 2, 1])
    assert encode_record(np.array([258]), 256, "uint32") == bytes([0, 1, *6 * [0], 2, 1, 0, 0])


def test_shards_of_another_tokenizer_are_refused(
    text: DataConfig, shard_folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(text, tmp_path / "bpe.json", 300)
    config = prepared(
        dataclasses.replace(text, tokenizer=str(tmp_path / "bpe.json"), end_of_text_id=256),
        shard_folder,
    )
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_text_id)
    with pytest.raises(DataError, match="made with another tokenizer"):
        load_corpus(config, tokenizer, vocab_size=300)
    with pytest.raises(DataError, match="end_of_text_id=256, but the configuration has 3"):
        open_shards(shard_folder, end=3)

    prepare(
        dataclasses.replace(config, source="text", paths=text.paths),
        tmp_path / "bpe",
        num_processes=1,
    )
    both = dataclasses.replace(
        config, paths=(*config.paths, f"{tmp_path}/bpe/*.array_record"), tokenizer="none"
    )
    with pytest.raises(DataError, match=r"bpe and .*shards were made with different tokenizers"):
        load_corpus(both, None, vocab_size=300)


def test_a_missing_or_damaged_manifest_is_named(shard_folder: Path) -> None:
    path = shard_folder / MANIFEST_NAME
    whole = json.loads(path.read_text())
    for damaged in ("", "[]", json.dumps(whole | {"colour": 1}), json.dumps({"dtype": "uint16"})):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"tokens\.json: token shards need this file"):
            open_shards(shard_folder)
    path.unlink()
    with pytest.raises(DataError, match=r"tokens\.json: token shards need this file"):
        open_shards(shard_folder)
