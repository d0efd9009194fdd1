import ast
import dataclasses
import errno
import json
import os
import pickle
import re
import resource
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.data.contents import contents
from tests.tiny_run import logged
from umv2 import files
from umv2.config import DataConfig
from umv2.data.corpus import load_corpus
from umv2.data.paths import DataError
from umv2.data.prepare import prepare, train_tokenizer
from umv2.data.shards import MANIFEST_NAME, ArrayRecordDocuments, ShardManifest, encode_record
from umv2.data.tokenizers import ByteTokenizer, load_tokenizer

SHARD_BYTES = 400


@pytest.fixture
def text(config: DataConfig, text_folder: Path) -> DataConfig:
    return dataclasses.replace(config, paths=(f"{text_folder}/*.txt",))


def shards(folder: Path) -> dict[str, bytes]:
    """Returns the finished files, without the `.unfinished_...` ones of a killed process."""
    paths = sorted(folder.glob("shard-*.array_record"))
    return {path.name: path.read_bytes() for path in paths}


def prepared(config: DataConfig, folder: Path) -> DataConfig:
    return dataclasses.replace(config, source="array_record", paths=(f"{folder}/*.array_record",))


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


def test_several_processes_write_the_same_shards(text: DataConfig, tmp_path: Path) -> None:
    prepare(text, tmp_path / "one", num_processes=1, shard_bytes=SHARD_BYTES)
    prepare(text, tmp_path / "two", num_processes=2, shard_bytes=SHARD_BYTES)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert ShardManifest.read(tmp_path / "one") == ShardManifest.read(tmp_path / "two")


def test_an_interrupted_run_resumes_with_the_missing_shards(
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


def test_a_folder_of_another_job_is_rejected(text: DataConfig, tmp_path: Path) -> None:
    prepare(text, tmp_path, num_processes=1)
    with pytest.raises(DataError, match=r"another job: origin\.text_field: 'text' -> 'body'"):
        prepare(dataclasses.replace(text, text_field="body"), tmp_path, num_processes=1)


def test_text_that_changed_between_runs_is_detected(
    text: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    last = text_folder / "39.txt"
    last.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(text, tmp_path / "out", num_processes=1, shard_bytes=SHARD_BYTES)
    last.write_bytes(b"good")
    (text_folder / "00.txt").write_text("x" * SHARD_BYTES)
    with pytest.raises(DataError, match=r"shard-00000.array_record: the text now yields other"):
        prepare(text, tmp_path / "out", num_processes=1, shard_bytes=SHARD_BYTES)


def finished_folder(text: DataConfig, folder: Path) -> ShardManifest:
    return prepare(text, folder, num_processes=1, shard_bytes=SHARD_BYTES)


def test_the_output_and_how_to_train_on_it_are_logged(text: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "a [b] 'c'"
    with logged() as messages:
        manifest = finished_folder(dataclasses.replace(text, end_of_text_id=256), folder)
    expected = f"{folder}: holds 40 documents, 3,145 tokens in {manifest.num_shards} shards"
    assert expected in messages
    (recipe,) = (message for message in messages if message.startswith("to train on it: "))
    flags = dict(flag.split("=", 1) for flag in shlex.split(recipe.partition(": ")[2]))
    paths = ast.literal_eval(flags.pop("--config.data.paths"))
    assert flags == {
        "--config.data.source": "array_record",
        "--config.data.tokenizer": "bytes",
        "--config.data.end_of_text_id": "256",
        "--config.model.vocab_size": "257",
    }
    recipe_config = dataclasses.replace(text, source="array_record", paths=paths)
    corpus = load_corpus(recipe_config, ByteTokenizer(), vocab_size=257)
    assert corpus.identity.description["documents"] == 40


def edit(folder: Path) -> None:
    (folder / "07.txt").write_text("edited")


def add(folder: Path) -> None:
    (folder / "50.txt").write_text("added")


def remove_last(folder: Path) -> None:
    (folder / "39.txt").unlink()


def rename_first(folder: Path) -> None:
    (folder / "00.txt").rename(folder / "99.txt")


def edit_in_place(folder: Path) -> None:
    path = folder / "07.txt"
    path.write_bytes(path.read_bytes().replace(b"document", b"DOCUMENT"))


@pytest.mark.parametrize("folder_is", ["finished", "without a list of files", "interrupted"])
@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (edit, r"1 file was changed \(.*07\.txt\)"),
        (edit_in_place, r"1 file was changed \(.*07\.txt\)"),
        (add, r"1 file was added \(.*50\.txt\)"),
        (remove_last, r"1 file was removed \(.*39\.txt\)"),
        (rename_first, r"1 file was added \(.*99.txt\), 1 file was removed \(.*00\.txt\)"),
    ],
)
def test_text_that_changed_since_preparation_is_detected(
    text: DataConfig,
    text_folder: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    advice: str,
    folder_is: str,
) -> None:
    out = tmp_path / "out"
    manifest = finished_folder(text, out)
    if folder_is == "without a list of files":
        dataclasses.replace(manifest, sources={}).write(out)
        advice = "; choose another folder"
    elif folder_is == "interrupted":
        dataclasses.replace(manifest, num_shards=0).write(out)
    change(text_folder)
    before = shards(out)
    if change is add and folder_is == "interrupted":  # the last shard was full
        assert finished_folder(text, out).num_documents == 41
        return
    with pytest.raises(DataError, match=f"shard-.*: the text now yields other documents.*{advice}"):
        finished_folder(text, out)
    assert shards(out) == before


def test_files_that_were_only_touched_are_not_changes(
    text: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    first = finished_folder(text, tmp_path / "out")
    os.utime(text_folder / "07.txt", (0, 0))
    with logged() as messages:
        second = finished_folder(text, tmp_path / "out")
    assert any("written before 1 file was changed" in message for message in messages)
    assert dataclasses.replace(second, sources=first.sources) == first
    assert second.sources != first.sources
    with logged() as messages:
        assert finished_folder(text, tmp_path / "out") == second
    assert any("already holds all 40 documents" in message for message in messages)


def test_a_lost_shard_is_rewritten(text: DataConfig, tmp_path: Path) -> None:
    finished_folder(text, tmp_path / "out")
    before = shards(tmp_path / "out")
    (tmp_path / "out" / "shard-00002.array_record").unlink()
    finished_folder(text, tmp_path / "out")
    assert shards(tmp_path / "out") == before


def test_concurrent_runs_are_rejected(text: DataConfig, tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "out" / ".lock", "prepare"),
        pytest.raises(files.InUse, match=r"out: is in use by process \d+ on .* \(prepare\)"),
    ):
        finished_folder(text, tmp_path / "out")


def test_leftovers_of_a_killed_run_are_removed(text: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished_99_shard-00000.array_record").write_text("half")
    finished_folder(text, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {"", ".json", ".array_record"}
    assert not list((tmp_path / "out").glob(".unfinished_*"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_full_disk_is_a_one_line_error_and_keeps_finished_shards(
    text: DataConfig, text_folder: Path, tmp_path: Path, num_processes: int
) -> None:
    # Exceeds the limit on file sizes, which stands in for a full disk.
    (text_folder / "30.txt").write_bytes(np.random.default_rng(0).bytes(400_000).hex().encode())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(files.FileError, match=r"out/shard-.*: cannot be written: File too"):
            prepare(text, tmp_path / "out", num_processes=num_processes, shard_bytes=SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finished = shards(tmp_path / "out")
    assert len(finished) > 3
    finished_folder(text, tmp_path / "out")
    assert finished.items() <= shards(tmp_path / "out").items()


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_created_is_a_one_line_error(
    text: DataConfig, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(files.FileError, match=r"file.*: cannot be created"):
        finished_folder(text, tmp_path / folder)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_keeps_finished_shards(
    text: DataConfig, text_folder: Path, tmp_path: Path
) -> None:
    """The terminal signals all processes; no traceback is shown, and finished shards are kept."""
    for number in range(40, 80):
        (text_folder / f"{number}.txt").write_text(f"{number} " * 40_000)
    (tmp_path / "config").write_bytes(pickle.dumps(text))
    program = f"""
import pickle
from pathlib import Path
from umv2 import command
from umv2.data.prepare import prepare

def main(arguments):
    config = pickle.loads(Path("config").read_bytes())
    prepare(config, Path("out"), num_processes=2, shard_bytes={SHARD_BYTES})

if __name__ == "__main__":
    command.run(main)
"""
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(shards(tmp_path / "out")) < 3:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr and process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    lines = errors.splitlines()
    assert lines[-1] == "interrupted", errors
    assert lines[-2].endswith("out: finished shards are kept; run the same command to resume")
    assert "Traceback" not in errors
    finished = shards(tmp_path / "out")
    finished_folder(text, tmp_path / "out")
    assert len(finished) >= 3
    assert finished.items() <= shards(tmp_path / "out").items()


def test_tokens_cannot_be_prepared(text: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'memmap' holds tokens, not text"):
        prepare(dataclasses.replace(text, source="memmap"), tmp_path, num_processes=1)
    with pytest.raises(DataError, match="prepare needs a tokenizer"):
        prepare(dataclasses.replace(text, tokenizer="none"), tmp_path, num_processes=1)


def test_train_tokenizer_reads_only_the_training_split(
    config: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for letter in string.ascii_lowercase:
        (tmp_path / f"{letter}.txt").write_text(f"qz{letter} " * 50)
    config = dataclasses.replace(config, paths=(f"{tmp_path}/*.txt",))
    with logged() as messages:
        train_tokenizer(config, tmp_path / "bpe.json", 1000)
    assert re.search(
        r"bpe\.json: a tokenizer of \d+ ids, for --config\.data\.tokenizer=.*bpe\.json"
        r" --config\.model\.vocab_size=\d+$",
        messages[-1],
    )
    captured = capfd.readouterr()
    assert captured.out == "" and "\n\n" not in captured.err
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
    # After the 64 bytes of the first block header and the file signature.
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"shard-00001\.array_record: (cannot be read|truncated)"):
        open_shards(shard_folder)


def test_a_shard_that_is_missing_or_foreign_is_named(
    text: DataConfig, text_folder: Path, shard_folder: Path, tmp_path: Path
) -> None:
    _, second, third = sorted(shard_folder.glob("*.array_record"))[:3]
    away = tmp_path / "away"
    second.rename(away)
    with pytest.raises(DataError, match=r"of \d+ shards, shard-00001\.array_record is missing"):
        open_shards(shard_folder)
    away.rename(shard_folder / "renamed.array_record")
    with pytest.raises(DataError, match=r"renamed\.array_record: not among its \d+ shards"):
        open_shards(shard_folder)
    (shard_folder / "renamed.array_record").unlink()
    second.write_bytes(third.read_bytes())
    with pytest.raises(DataError, match=r"shard-00001\.array_record: its documents are not those"):
        open_shards(shard_folder)


def test_a_subset_of_shards_is_a_smaller_corpus(text: DataConfig, shard_folder: Path) -> None:
    paths = sorted(shard_folder.glob("*.array_record"))
    few = dataclasses.replace(text, source="array_record", paths=tuple(map(str, paths[:4])))
    with logged() as messages:
        corpus = load_corpus(few, ByteTokenizer(), vocab_size=257)
    assert f"{shard_folder}: data.paths names 4 of {len(paths)} shards" in messages
    assert 4 <= corpus.identity.description["documents"] < 40
    paths[-1].unlink()
    with pytest.raises(DataError, match=f"{paths[-1].name} is missing"):
        load_corpus(few, ByteTokenizer(), vocab_size=257)


def test_shards_of_an_older_version_can_be_read(shard_folder: Path) -> None:
    path = shard_folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for name in ("num_tokens", "sources", "shards"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    assert len(open_shards(shard_folder).lengths) == 40


def test_an_unreadable_shard_is_not_called_damaged(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".array_record":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"shard-.*: cannot be read: Too many open files"):
        open_shards(shard_folder)


def write_records(folder: Path, *records: bytes) -> None:
    path = folder / "shard-00000.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    # The manifest has no content hashes of the shards.
    dataclasses.replace(ShardManifest.read(folder), shards={}).write(folder)


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


def test_a_record_has_a_hash_and_little_endian_tokens() -> None:
    assert encode_record(np.array([1, 258]), 5, "uint16") == bytes([5, *7 * [0], 1, 0, 2, 1])
    assert encode_record(np.array([258]), 256, "uint32") == bytes([0, 1, *6 * [0], 2, 1, 0, 0])


def test_shards_of_another_tokenizer_are_rejected(
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
    manifest = json.loads(path.read_text())
    damages = (
        *("", "[]", "[" * 99_999, json.dumps({"dtype": "uint16"})),
        *(
            json.dumps(manifest | {field: value})
            for field, value in (("colour", 1), ("dtype", "int8"), ("num_shards", "9"))
        ),
    )
    for damaged in damages:
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"tokens\.json: token shards need this file"):
            open_shards(shard_folder)
    path.unlink()
    with pytest.raises(DataError, match=r"tokens\.json: token shards need this file"):
        open_shards(shard_folder)
