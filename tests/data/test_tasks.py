"""Documents of the long-context suite beside text."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from umv2.config import DataConfig, LongContextDataConfig
from umv2.data.pipeline import load_corpus, train_batches
from umv2.data.tokenizers import ByteTokenizer


def mixed(config: DataConfig, folder: Path, **changes: Any) -> DataConfig:
    tasks = LongContextDataConfig(("key_value", "needle"), 30, 0.25, 1.0, 0, 0)
    return dataclasses.replace(
        config,
        paths=(f"{folder}/*.txt",),
        sequence_length=256,
        long_context=dataclasses.replace(tasks, **changes),
    )


def test_tasks_train_beside_their_share_of_text(config: DataConfig, text_folder: Path) -> None:
    tokenizer = ByteTokenizer()

    def load(config: DataConfig) -> list[str]:
        corpus = load_corpus(config, tokenizer, vocab_size=264)
        train = corpus.train
        lengths = enumerate(train.lengths)
        return [tokenizer.decode(train.read(i, 0, int(length))) for i, length in lengths]

    without = load(mixed(config, text_folder, num_documents=0))
    for fraction in (0.05, 0.1):
        texts = load(mixed(config, text_folder, text_fraction=fraction))
        is_task = np.array([bool(re.match("\\w:|.*magic number", text, re.S)) for text in texts])
        assert is_task.sum() == 60
        sizes = np.array([len(text.encode()) for text in texts])
        share = sizes[~is_task].sum() / sizes.sum()
        assert 0.5 * fraction < share <= fraction
        assert {text for text, task in zip(texts, is_task, strict=True) if not task} < set(without)
        assert sizes[is_task].min() < 64
        assert 128 < sizes[is_task].max() < 256


def test_held_out_text_and_the_seed_of_documents(config: DataConfig, text_folder: Path) -> None:
    tokenizer = ByteTokenizer()
    plain, mixture, other = (
        load_corpus(mixed(config, text_folder, **changes), tokenizer, vocab_size=264)
        for changes in ({"num_documents": 0}, {}, {"seed": 1})
    )
    assert plain.held_out_texts == mixture.held_out_texts
    hashes = mixture.train.content_hashes
    again = load_corpus(mixed(config, text_folder), tokenizer, vocab_size=264)
    np.testing.assert_array_equal(hashes, again.train.content_hashes)
    # The shortest needles have nothing but one of a hundred codes.
    assert len(set(hashes[-60:]) & set(other.train.content_hashes[-60:])) < 6


def test_answers_alone_count_where_the_context_has_no_weight(
    config: DataConfig, text_folder: Path
) -> None:
    tokenizer = ByteTokenizer()
    settings = mixed(config, text_folder, context_weight=0.0, tasks=("needle",))
    corpus = load_corpus(settings, tokenizer, vocab_size=264)
    batches = train_batches(corpus, settings, batch_size=2)
    counted = text = 0
    for _ in range(8):
        batch = next(batches)
        for targets, weights in zip(batch.targets, batch.weights, strict=True):
            assert set(np.unique(weights)) <= {0.0, 1.0}
            ends = np.flatnonzero(targets == tokenizer.end_of_text_id)
            for start, stop in itertools.pairwise(ends):  # of documents that are whole
                document, counts = targets[start + 1 : stop], weights[start + 1 : stop] == 1
                if "magic" in tokenizer.decode(document):
                    assert re.fullmatch(r"\d\d", tokenizer.decode(document[counts]))
                    counted += 1
                else:
                    assert counts.all()
                    text += 1
    batches.close()
    assert counted > 0
    assert text > 0


def test_the_first_steps_are_of_recall_alone(config: DataConfig, text_folder: Path) -> None:
    tokenizer = ByteTokenizer()
    plain = mixed(config, text_folder)
    settings = mixed(config, text_folder, warm_up_steps=3)
    corpus = load_corpus(settings, tokenizer, vocab_size=264)
    assert corpus.warm_up is not None
    assert corpus.warm_up.lengths.sum() >= 30 * 256
    assert corpus.warm_up.lengths.min() == 12
    assert 64 < corpus.warm_up.lengths.max() <= 128

    def take(settings: DataConfig, start_step: int, count: int) -> list[np.ndarray]:
        corpus = load_corpus(settings, tokenizer, vocab_size=264)
        batches = train_batches(corpus, settings, batch_size=2, start_step=start_step)
        taken = [next(batches).inputs for _ in range(count)]
        batches.close()
        return taken

    whole = take(settings, 0, 6)
    for inputs in whole[:3]:
        assert re.fullmatch(r"[\w\n]*", tokenizer.decode(inputs[inputs != 256]))
    np.testing.assert_array_equal(whole[3:], take(plain, 0, 3))
    np.testing.assert_array_equal(whole[2:], take(settings, 2, 4))
