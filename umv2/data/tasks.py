"""Documents of the long-context suite, to train on."""

from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Float32
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
from umv2.evaluation.long_context import TASKS, Example, make_example, recall

_SHORTEST = 1 / 8  # of a sequence
_LONGEST_RECALL = 1 / 2  # of a sequence


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

    Those from an eighth of a sequence to a quarter hold as many tokens as those from there to a
    half, or from there to a whole: answers are learned with little before them first.

    Args:
      config: the data section.
      tokenizer: of the text.
      texts: documents of the source to cut filler from; those that train alone.
    """
    wanted, longest = config.long_context, config.sequence_length - 1.0  # beside the end-of-text
    jobs = [(name, index) for name in wanted.tasks for index in range(wanted.num_documents)]
    disable = None if logging.level_info() else True
    bar = tqdm(jobs, "writing tasks", unit=" documents", disable=disable)
    written = [
        make_example(
            TASKS[name],
            "train",
            wanted.seed,
            index,
            length=max(_length(wanted.seed, index, _SHORTEST * longest, longest), 32),
            tokenizer=tokenizer,
            texts=texts,
        )
        for name, index in bar
    ]
    return _documents(written, wanted.context_weight)


def recall_documents(config: DataConfig, tokenizer: Tokenizer) -> InMemoryDocuments:
    """Writes documents of associative recall, in the order in which they are to be learned from.

    They hold the tokens of `config.long_context.num_documents` sequences. Those of the first third
    are as short as can be; then the longest of them grow to half a sequence.
    """
    wanted, written, num_tokens = config.long_context, list[Example](), 0
    shortest = recall.FEWEST_LINES * len(tokenizer.encode("ab\n"))
    growth = max(1.0, _LONGEST_RECALL * config.sequence_length / shortest)
    enough = wanted.num_documents * config.sequence_length
    while num_tokens < enough:
        index = len(written)
        longest = shortest * growth ** max(0.0, 1.5 * num_tokens / enough - 0.5)
        example = make_example(
            recall.write,
            "train",
            wanted.seed,
            index,
            length=_length(wanted.seed, index, float(shortest), longest),
            tokenizer=tokenizer,
            texts=(),
        )
        written.append(example)
        num_tokens += len(example.tokens)
    return _documents(written, wanted.context_weight)


def _length(seed: int, index: int, shortest: float, longest: float) -> int:
    """Draws the length of a document; of the tokens of all, each octave holds as many."""
    share = float(np.random.default_rng([seed, index]).random())
    return int(shortest / (1 - share * (1 - shortest / longest)))


def _documents(examples: Sequence[Example], context_weight: float) -> InMemoryDocuments:
    def weights(example: Example) -> Float32[np.ndarray, "t"]:
        counted = np.full(len(example.tokens), context_weight, np.float32)
        for answer in example.answers:
            counted[answer.start : answer.stop] = 1
        return counted

    return InMemoryDocuments(
        np.concatenate([example.tokens for example in examples]),
        np.array([len(example.tokens) for example in examples], np.int64),
        content_hashes(example.tokens.tobytes() for example in examples),
        np.concatenate([weights(example) for example in examples]),
    )
