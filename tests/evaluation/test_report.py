"""The report beside compressors, and its files."""

import bz2
import json
import lzma
import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from umv2.data.documents import InMemoryDocuments
from umv2.data.pipeline import Corpus, Identity
from umv2.data.tokenizers import ByteTokenizer
from umv2.evaluation import report
from umv2.evaluation.perplexity import HeldOut

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
    # gzip is zlib's stream of raw deflate between a header of 10 bytes and a trailer of 8.
    deflate = zlib.compressobj(9, wbits=-15)
    size = len(deflate.compress(text) + deflate.flush()) + 18
    assert bits["gzip -9"] == pytest.approx(8 * size / 2024)
    assert bits["bzip2 -9"] == pytest.approx(8 * len(bz2.compress(text, 9)) / 2024)
    assert bits["xz -9"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / 2024)
    assert list(bits) == ["gzip -9", "bzip2 -9", "xz -9"]


def test_what_cannot_be_compressed_takes_eight_bits_and_a_header() -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    for bits in report.compressed_bits_per_byte(noise).values():
        assert 8 < bits < 8.1


def test_a_report_writes_its_figures_and_the_curve(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tokens": 100, "loss": 2.0},
        {"step": 1, "tokens": 100, "held_out_loss": 2.1, "held_out_bits_per_byte": 3.0},
        {"step": 2, "tokens": 200, "loss": None},  # was not finite
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
