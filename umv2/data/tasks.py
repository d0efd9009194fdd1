"""Documents of the long-context suite, to train on."""

from collections.abc import Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2.config import DataConfig
from umv2.data.documents import (
    Documents,
    DocumentSubset,
    InMemoryDocuments,
    JoinedDocuments,
)
from umv2.data.sources import content_hashes
from umv2.data.tokenizers import Tokenizer
from umv2.evaluation.long_context import TASKS, make_example

_SHORTEST = 1 / 8  # of a sequence


def with_tasks(
    config: DataConfig, documents: Documents, tokenizer: Tokenizer, texts: Sequence[str]
) -> Documents:
    """Joins documents of text and of tasks, in the shares of tokens that `config` asks for.

    Text beyond `long_context.text_fraction` is left out, document by document in the order of
    their hashes, which has nothing to do with what they say.
    """
    tasks = task_documents(config, tokenizer, texts)
    fraction = config.long_context.text_fraction
    room = int(tasks.lengths.sum()) * fraction / (1 - fraction)
    order = np.argsort(documents.content_hashes, kind="stable")
    used = np.cumsum(documents.lengths[order])
    kept = order[: int(np.searchsorted(used, room, side="right"))]
    return JoinedDocuments([DocumentSubset(documents, np.sort(kept)), tasks])


def task_documents(
    config: DataConfig, tokenizer: Tokenizer, texts: Sequence[str]
) -> InMemoryDocuments:
    """Writes `config.long_context.num_documents` of each task, of the training split.

    Their lengths are spread evenly, in logarithm, from an eighth of a sequence to a whole one.

    Args:
      config: the data section.
      tokenizer: of the text.
      texts: documents of the source to cut filler from; those that train alone.
    """
    wanted, longest = config.long_context, config.sequence_length - 1  # beside the end-of-text
    jobs = [(name, index) for name in wanted.tasks for index in range(wanted.num_documents)]
    disable = None if logging.level_info() else True
    written, weights = [], []
    for name, index in tqdm(jobs, "writing tasks", unit=" documents", disable=disable):
        share = np.random.default_rng([wanted.seed, index]).random()
        length = int(longest * _SHORTEST ** (1 - share))
        example = make_example(
            TASKS[name],
            "train",
            wanted.seed,
            index,
            length=max(length, 32),
            tokenizer=tokenizer,
            texts=texts,
        )
        written.append(example.tokens)
        counted = np.full(len(example.tokens), wanted.context_weight, np.float32)
        for answer in example.answers:
            counted[answer.start : answer.stop] = 1
        weights.append(counted)
    lengths = np.array([len(tokens) for tokens in written], np.int64)
    hashes = content_hashes(tokens.tobytes() for tokens in written)
    return InMemoryDocuments(np.concatenate(written), lengths, hashes, np.concatenate(weights))
