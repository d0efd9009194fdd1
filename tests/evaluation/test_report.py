"""The report with compressors for comparison, and its files."""

import bz2
import json
import lzma
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umv2 import files
from umv2.data.corpus import Corpus, Identity
from umv2.data.documents import InMemoryDocuments
from umv2.data.tokenizers import ByteTokenizer
from umv2.evaluation import report
from umv2.training.held_out import HeldOut

TEXTS = (b"the quick brown fox " * 50, bytes(range(256)) * 4)


def corpus(texts: tuple[bytes, ...] | None = TEXTS) -> Corpus:
    tokens = np.frombuffer(b"".join(TEXTS), np.uint8)
    lengths = np.array([len(text) for text in TEXTS])
    documents = InMemoryDocuments(tokens, lengths, np.zeros(len(TEXTS), np.uint64))
    identity = Identity(tokenizer="bytes", documents="", held_out="", description={})
    return Corpus(documents, documents, 256, ByteTokenizer(), texts, identity)


def held_out(bits_per_byte: float | None) -> HeldOut:
    return HeldOut(
        loss_nats_per_token=1.5,
        perplexity=math.exp(1.5),
        bits_per_byte=bits_per_byte,
        num_tokens=2026,
        num_bytes=2024,
    )


def test_compressors_by_hand() -> None:
    text = b"".join(TEXTS)
    bits = report.compressed_bits_per_byte(text)
    # gzip is raw deflate with a header of 10 bytes and a trailer of 8.
    deflate = zlib.compressobj(9, wbits=-15)
    size = len(deflate.compress(text) + deflate.flush()) + 18
    assert bits["gzip -9"] == pytest.approx(8 * size / 2024)
    assert bits["bzip2 -9"] == pytest.approx(8 * len(bz2.compress(text, 9)) / 2024)
    assert bits["xz -9"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / 2024)
    assert list(bits) == ["gzip -9", "bzip2 -9", "xz -9"]


def test_incompressible_text_takes_eight_bits_per_byte_and_a_header() -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    for bits in report.compressed_bits_per_byte(noise).values():
        assert 8 < bits < 8.1


def test_a_report_writes_its_figures_and_the_curve(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tokens": 100, "loss": 2.0},
        {"step": 1, "tokens": 100, "held_out_loss": 2.1, "held_out_bits_per_byte": 3.0},
        {"step": 2, "tokens": 200, "loss": None},  # not finite
        {"step": 3, "tokens": 300, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = report.write(tmp_path, 3, held_out(2.25), corpus())
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures == {
        "step": 3,
        "held_out_loss": 1.5,
        "held_out_perplexity": pytest.approx(4.4816890703),
        "held_out_bits_per_byte": 2.25,
        "compressors": report.compressed_bits_per_byte(b"".join(TEXTS)),
    }
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    table = written.table().splitlines()
    assert table[0] == "held-out after step 3: 2,026 tokens"
    assert [line.split()[-1] for line in table[2:4]] == ["4.482", "2.2500"]
    assert [line.split()[0] for line in table[4:]] == ["gzip", "bzip2", "xz"]


def test_without_bits_per_byte_nothing_is_compared_or_drawn(tmp_path: Path) -> None:
    written = report.write(tmp_path, 3, held_out(None), corpus(texts=None))
    assert written.compressors == {}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert "bits per byte" not in written.table()


@pytest.mark.parametrize("texts", [(b"",), (b"", b"")])
def test_an_empty_text_has_no_bits_per_byte(texts: tuple[bytes, ...], tmp_path: Path) -> None:
    assert report.write(tmp_path, 3, held_out(2.0), corpus(texts)).compressors == {}


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (1e300, "1.000e+300")]
)
def test_figures_of_a_diverged_model_are_shown_and_null_in_json(
    value: float, shown: str, tmp_path: Path
) -> None:
    broken = HeldOut(
        loss_nats_per_token=value, perplexity=value, bits_per_byte=value, num_tokens=1, num_bytes=1
    )
    written = report.write(tmp_path, 3, broken, corpus())
    assert shown in written.table(60)
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    expected = value if math.isfinite(value) else None
    assert json.loads(text)["held_out_perplexity"] == written.metrics()["held_out_loss"] == expected


GOOD = b'{"step": 1, "tokens": 100, "loss": 2.0, "held_out_bits_per_byte": 3.0}\n'
DAMAGED = {
    "torn": (GOOD + GOOD[:30], 1),
    "cut in a character": (GOOD + '{"note": "é'.encode()[:-1], 1),
    "blank": (GOOD + b"\n\n" + GOOD, 2),
    "null bytes": (GOOD + b"\0" * 4096, 1),
    "not UTF-8": (GOOD + b'{"\xff\xfe": 1}\n', 1),
    "a list": (GOOD + b"[1, 2]\n", 1),
    "nested too deep": (GOOD + b"[" * 200_000 + b"\n", 1),
    "numbers as text": (GOOD + b'{"tokens": "100", "loss": "2"}\n', 0),
    "no tokens": (GOOD + b'{"loss": 2.0}\n', 0),
    "not finite": (GOOD + b'{"tokens": 2, "loss": NaN}\n{"tokens": 3, "loss": 1e999}\n', 0),
    "beyond floats": (GOOD + b'{"tokens": 1' + b"0" * 400 + b', "loss": 1}\n', 0),
    "nothing but damage": (b"}\n", 1),
    "empty": (b"", 0),
}


@pytest.mark.parametrize(("content", "damaged"), DAMAGED.values(), ids=DAMAGED)
def test_records_are_read_despite_damaged_lines(
    content: bytes, damaged: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    records = report.read_records(path)
    assert len(records) == len(content.splitlines()) - damaged
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == bool(damaged)
    assert all(f"{path}: {damaged} of " in warning for warning in warnings)
    for name in ("loss", "held_out_bits_per_byte"):
        tokens, values = report._curve(records, name)
        assert np.isfinite([*tokens, *values]).all()


@pytest.mark.parametrize("content", [b"", DAMAGED["not finite"][0] + b"}"])
def test_a_curve_is_drawn_from_any_records(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    report.write(tmp_path, 3, held_out(2.25), corpus())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_points_that_are_not_numbers_are_skipped() -> None:
    records: list[dict[str, Any]] = [
        {"tokens": 10**6, "loss": 1},
        {"tokens": None, "loss": 2},
        {"tokens": 1, "loss": "a"},
    ]
    records += [{"tokens": 2e6, "loss": 3.5}, {"tokens": 10**400, "loss": 1}, {}]
    assert report._curve(records, "loss") == ([1.0, 2.0], [1.0, 3.5])


def test_a_folder_name_is_not_a_formula_in_the_title(tmp_path: Path) -> None:
    workdir = tmp_path / ("$\\frac$" + "a" * 150)
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_bytes(GOOD)
    report.write(workdir, 3, held_out(2.25), corpus())
    assert (workdir / "loss.png").exists()


def test_the_same_curve_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD)
    images = []
    for _ in range(2):
        report.write(tmp_path, 3, held_out(2.25), corpus())
        images.append((tmp_path / "loss.png").read_bytes())
    assert images[0] == images[1]
    assert b"Software" not in images[0]


@pytest.mark.parametrize("place", ["evaluation.json", "loss.png"])
def test_a_result_that_cannot_be_written_is_logged(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD)
    (tmp_path / place / "occupied").mkdir(parents=True)  # a folder that no file can replace
    with pytest.raises(files.FileError, match=place):
        report.write(tmp_path, 3, held_out(2.25), corpus())
    assert "bits per byte  2.2500" in caplog.text


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(files.FileError, match=r"metrics\.jsonl: cannot be read"):
        report.write(tmp_path, 3, held_out(2.25), corpus())
    assert json.loads((tmp_path / "evaluation.json").read_text())["step"] == 3
