"""Documents of the long-context suite mixed with text."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.corpus import Corpus, Purpose, load_corpus
from umv2.data.documents import Documents
from umv2.data.loader import train_batches
from umv2.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_text_id


def mixed(config: DataConfig, folder: Path, **changes: Any) -> DataConfig:
    tasks = LongContextDataConfig(("key_value", "needle"), 30, 0.25, 1.0, 0, 0)
    return dataclasses.replace(
        config,
        paths=(f"{folder}/*.txt",),
        sequence_length=256,
        long_context=dataclasses.replace(tasks, **changes),
    )


def pieces(documents: Documents) -> list[str]:
    """Returns the documents of tasks and the pieces of text that documents are packed from."""
    texts = [documents.read(i, 0, int(length)) for i, length in enumerate(documents.lengths)]
    tokens = np.concatenate([np.append(document, END) for document in texts])
    parts = np.split(tokens, np.flatnonzero(tokens == END))
    return [TOKENIZER.decode(part[part != END]) for part in parts if (part != END).any()]


def is_task(text: str) -> bool:
    return bool(re.match("\\w:|.*magic number", text, re.S))


def test_tasks_are_mixed_with_their_fraction_of_text(config: DataConfig, text_folder: Path) -> None:
    def load(**changes: Any) -> Corpus:
        return load_corpus(mixed(config, text_folder, **changes), TOKENIZER, vocab_size=264)

    plain = load(num_documents=0).train
    without = [plain.read(i, 0, int(length)) for i, length in enumerate(plain.lengths)]
    for fraction in (0.05, 0.1):
        corpus = load(text_fraction=fraction)
        parts = pieces(corpus.train)
        tasks = [text for text in parts if is_task(text)]
        texts = [text for text in parts if not is_task(text)]
        assert len(tasks) == 60
        sizes = np.array([len(text.encode()) for text in tasks])
        share = sum(len(text.encode()) for text in texts) / sum(len(t.encode()) for t in parts)
        assert 0.5 * fraction < share <= fraction
        assert set(texts) < {TOKENIZER.decode(tokens) for tokens in without}
        assert sizes.min() < 64
        assert 128 < sizes.max() < 256
        # Packed well: hardly more documents than their tokens fill.
        assert set(corpus.train.lengths) == {255}
        assert len(corpus.train.lengths) < 1.2 * sum(len(t.encode()) for t in parts) / 256 + 1


def test_no_document_of_a_task_is_cut(config: DataConfig, text_folder: Path) -> None:
    settings = mixed(config, text_folder)
    corpus = load_corpus(settings, TOKENIZER, vocab_size=264)
    expected = {text for text in pieces(corpus.train) if is_task(text)}
    batches = train_batches(corpus, settings, batch_size=len(corpus.train.lengths))
    seen = set()
    for inputs in next(batches).inputs:
        assert inputs[0] == END
        seen |= {TOKENIZER.decode(p[1:]) for p in np.split(inputs, np.flatnonzero(inputs == END))}
    batches.close()
    assert expected <= seen


def test_text_is_cut_into_sequences(config: DataConfig, tmp_path: Path) -> None:
    long = "a long text. " * 100
    for name in range(20):
        (tmp_path / f"{name}.txt").write_text(f"{name} {long}")
    settings = mixed(config, tmp_path, text_fraction=0.5)
    settings = dataclasses.replace(settings, held_out_fraction=0.3)
    corpus = load_corpus(settings, TOKENIZER, vocab_size=264)
    texts = [text for text in pieces(corpus.train) if not is_task(text)]
    assert max(map(len, texts)) == 255
    assert any(text[1:] == f" {long}"[:254] for text in texts)


def test_held_out_text_and_the_seed_of_documents(config: DataConfig, text_folder: Path) -> None:
    plain, mixture, other = (
        load_corpus(mixed(config, text_folder, **changes), TOKENIZER, vocab_size=264)
        for changes in ({"num_documents": 0}, {}, {"seed": 1})
    )
    assert plain.held_out_texts == mixture.held_out_texts
    hashes = mixture.train.content_hashes
    again = load_corpus(mixed(config, text_folder), TOKENIZER, vocab_size=264)
    np.testing.assert_array_equal(hashes, again.train.content_hashes)
    assert not set(hashes) & set(other.train.content_hashes)


def test_no_tasks_are_generated_for_evaluation(config: DataConfig, text_folder: Path) -> None:
    def load(purpose: Purpose, **changes: Any) -> Corpus:
        settings = mixed(config, text_folder, **changes)
        return load_corpus(settings, TOKENIZER, vocab_size=264, purpose=purpose)

    plain = load("train", num_documents=0)
    evaluated = load("evaluate", warm_up_steps=3)
    assert evaluated.warm_up is None
    assert evaluated.identity == plain.identity
    assert evaluated.held_out_texts == plain.held_out_texts
    np.testing.assert_array_equal(evaluated.train.content_hashes, plain.train.content_hashes)


def test_only_answers_count_if_the_context_has_no_weight(
    config: DataConfig, text_folder: Path
) -> None:
    settings = mixed(config, text_folder, context_weight=0.0, tasks=("needle",))
    corpus = load_corpus(settings, TOKENIZER, vocab_size=264)
    batches = train_batches(corpus, settings, batch_size=2)
    counted = text = 0
    for _ in range(8):
        batch = next(batches)
        for targets, weights in zip(batch.targets, batch.weights, strict=True):
            assert set(np.unique(weights)) <= {0.0, 1.0}
            ends = np.flatnonzero(targets == END)
            for start, stop in itertools.pairwise(ends):  # complete documents
                if stop == start + 1:
                    continue
                document, counts = targets[start + 1 : stop], weights[start + 1 : stop] == 1
                if "magic" in TOKENIZER.decode(document):
                    assert re.fullmatch(r"\d\d", TOKENIZER.decode(document[counts]))
                    counted += 1
                else:
                    assert counts.all()
                    text += 1
    batches.close()
    assert counted > 0
    assert text > 0


@pytest.mark.slow
def test_the_first_steps_contain_only_recall(config: DataConfig, text_folder: Path) -> None:
    settings = mixed(config, text_folder, warm_up_steps=3)
    corpus = load_corpus(settings, TOKENIZER, vocab_size=264)
    assert corpus.warm_up is not None
    assert 30 <= len(corpus.warm_up.lengths) < 45
    sizes = [len(piece) for piece in pieces(corpus.warm_up)]
    third = len(sizes) // 3
    assert set(sizes[:third]) == {12}
    assert 64 < max(sizes[-third:]) <= 128

    def take(settings: DataConfig, start_step: int, count: int) -> list[np.ndarray]:
        corpus = load_corpus(settings, TOKENIZER, vocab_size=264)
        batches = train_batches(corpus, settings, batch_size=2, start_step=start_step)
        inputs = [next(batches).inputs for _ in range(count)]
        batches.close()
        return inputs

    full = take(settings, 0, 6)
    for inputs in full[:3]:
        assert re.fullmatch(r"(\w\w\n)*", TOKENIZER.decode(inputs[inputs != END]))
    assert ":" in TOKENIZER.decode(full[3][full[3] != END])
    np.testing.assert_array_equal(full[2:], take(settings, 2, 4))
