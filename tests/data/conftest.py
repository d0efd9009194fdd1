"""A base data section, and a corpus of given token documents."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Corpus, Identity
from umv2.data.documents import InMemoryDocuments

END = 0


@pytest.fixture
def config() -> DataConfig:
    return DataConfig(
        source="text",
        paths=(),
        text_field="text",
        memmap_dtype="uint16",
        hugging_face_name="",
        hugging_face_config="",
        hugging_face_split="train",
        tokenizer="bytes",
        end_of_text_id=-1,
        sequence_length=4,
        held_out_fraction=0.5,
        long_context=LongContextDataConfig((), 0, 0.25, 1.0, 0, 0),
        mask_across_documents=True,
        num_workers=0,
        prefetch_batches=2,
        seed=0,
    )


@pytest.fixture
def make_corpus() -> Callable[[Sequence[Sequence[int]]], Corpus]:
    """Returns a function that puts the same documents into both splits; end-of-text is 0."""

    def make(token_lists: Sequence[Sequence[int]]) -> Corpus:
        documents = InMemoryDocuments(
            np.array([token for tokens in token_lists for token in tokens], np.uint16),
            np.array([len(tokens) for tokens in token_lists], np.int64),
            np.arange(len(token_lists), dtype=np.uint64),
        )
        identity = Identity(tokenizer="", documents="", held_out="", description={})
        return Corpus(documents, documents, END, None, held_out_texts=None, identity=identity)

    return make


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Forty small text files, some of them with non-ASCII characters."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        text = f"document {number}: " + "grüße, 世界! " * (number % 7 + 1)
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def corpus(make_corpus: Callable[[Sequence[Sequence[int]]], Corpus]) -> Corpus:
    """Twelve documents of 1 to 12 tokens, 90 targets in all."""
    return make_corpus([[10 * n + i for i in range(n)] for n in range(1, 13)])
