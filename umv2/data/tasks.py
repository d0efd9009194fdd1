"""Training data from the long-context suite, mixed with text.

An answer cannot be learned if its evidence is in another sequence. So task documents are never cut
at the end of a sequence: documents and pieces of text are packed into documents that each fill one
sequence, with end-of-text between them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float32, Int32
from tqdm import tqdm

from umv2.config import DataConfig
from umv2.data.documents import Documents, InMemoryDocuments
from umv2.data.hashing import content_hashes
from umv2.data.long_context import TASKS, Example, Task, make_example, recall
from umv2.data.tokenizers import Tokenizer

_SHORTEST = 1 / 8  # of a sequence
_LONGEST_RECALL = 1 / 2  # of a sequence

Piece = tuple[Int32[np.ndarray, "_"], Float32[np.ndarray, "_"]]  # tokens and their weights


def mixture(
    config: DataConfig, documents: Documents, tokenizer: Tokenizer, texts: Sequence[str]
) -> InMemoryDocuments:
    """Returns a mixture of text and tasks, packed into documents of one sequence each.

    Writes `config.long_context.num_documents` documents of each task, from the training split. With
    a warm-up, adds as many tokens of recall as one task has. Text makes up
    `long_context.text_fraction` of the tokens: documents are taken in the order of their hashes,
    which is independent of their content, and the rest is dropped.

    Args:
      config: the data section.
      documents: tokenized text.
      tokenizer: of the text.
      texts: training documents of the source, to draw filler from.
    """
    settings = config.long_context
    pieces = [
        _task_piece(TASKS[name], config, index, tokenizer, texts)
        for name, index in _with_bar(
            [(name, index) for name in settings.tasks for index in range(settings.num_documents)]
        )
    ]
    num_tokens = sum(len(tokens) for tokens, _ in pieces)
    if settings.warm_up_steps:
        recalls = _recall_pieces(
            config, tokenizer, num_tokens // len(settings.tasks), lambda _: 1.0
        )
        pieces += recalls
        num_tokens += sum(len(tokens) for tokens, _ in recalls)
    num_text_tokens = int(num_tokens * settings.text_fraction / (1 - settings.text_fraction))
    pieces += _text_pieces(documents, num_text_tokens, config.sequence_length - 1)
    order = np.random.default_rng(settings.seed).permutation(len(pieces))
    return _packed([pieces[i] for i in order], config, tokenizer)


def warm_up(config: DataConfig, tokenizer: Tokenizer) -> InMemoryDocuments:
    """Returns a curriculum of associative recall, packed into documents of one sequence each.

    In the first third of the tokens, all recall documents have the minimum length; after that, the
    maximum length grows to half a sequence. There are about `config.long_context.num_documents`
    sequences.
    """
    num_tokens = config.long_context.num_documents * config.sequence_length
    pieces = _recall_pieces(config, tokenizer, num_tokens, lambda done: 1.5 * done - 0.5)
    return _packed(pieces, config, tokenizer)


def _with_bar[T](jobs: Sequence[T]) -> Iterator[T]:
    disable = None if logging.level_info() else True
    return iter(tqdm(jobs, "writing tasks", unit=" documents", disable=disable))


def _task_piece(
    task: Task, config: DataConfig, index: int, tokenizer: Tokenizer, texts: Sequence[str]
) -> Piece:
    """Writes one document, of an eighth of a sequence up to a full one.

    Each octave of lengths (1/8 to 1/4, 1/4 to 1/2, 1/2 to 1) gets equally many tokens, because
    answers are learned in short contexts first.
    """
    seed, longest = config.long_context.seed, config.sequence_length - 1.0
    length = max(_length(seed, index, _SHORTEST * longest, longest), 32)
    example = make_example(
        task, "train", seed, index, length=length, tokenizer=tokenizer, texts=texts
    )
    return _weighted(example, config)


def _recall_pieces(
    config: DataConfig, tokenizer: Tokenizer, num_tokens: int, growth: Callable[[float], float]
) -> list[Piece]:
    """Writes `num_tokens` of recall documents.

    `growth` maps the fraction of the tokens written so far to the maximum length of a document, on
    a logarithmic scale: the minimum length at 0 and below, half a sequence at 1.
    """
    pieces: list[Piece] = []
    written = 0
    shortest = float(recall.FEWEST_LINES * len(tokenizer.encode("ab\n")))
    longest = max(shortest, _LONGEST_RECALL * config.sequence_length)
    seed = config.long_context.seed
    while written < num_tokens:
        index = len(pieces)
        limit = shortest * (longest / shortest) ** max(0.0, growth(written / num_tokens))
        length = _length(seed, index, shortest, limit)
        example = make_example(
            recall.write, "train", seed, index, length=length, tokenizer=tokenizer, texts=()
        )
        pieces.append(_weighted(example, config))
        written += len(example.tokens)
    return pieces


def _text_pieces(documents: Documents, num_tokens: int, longest: int) -> Iterator[Piece]:
    """Cuts documents of at most `num_tokens` in total into pieces of at most `longest` tokens."""
    order = np.argsort(documents.content_hashes, kind="stable")
    used = np.cumsum(documents.lengths[order])
    for index in order[: int(np.searchsorted(used, num_tokens, side="right"))].tolist():
        end = int(documents.lengths[index])
        for start, stop in itertools.pairwise([*range(0, end, longest), end]):
            yield documents.read(index, start, stop), np.ones(stop - start, np.float32)


def _length(seed: int, index: int, shortest: float, longest: float) -> int:
    """Draws a length from a density ~ 1 / length^2, which gives each octave equally many tokens."""
    uniform = float(np.random.default_rng([seed, index]).random())
    return int(shortest / (1 - uniform * (1 - shortest / longest)))


def _weighted(example: Example, config: DataConfig) -> Piece:
    weights = np.full(len(example.tokens), config.long_context.context_weight, np.float32)
    for answer in example.answers:
        weights[answer.start : answer.stop] = 1
    size = config.sequence_length - 1
    return example.tokens[:size], weights[:size]  # longer only if words take many tokens


def _packed(pieces: Sequence[Piece], config: DataConfig, tokenizer: Tokenizer) -> InMemoryDocuments:
    """Packs pieces into documents of one sequence each, roughly in order, by best fit.

    End-of-text separates the pieces and pads each document. It has weight 0, because the model
    cannot know where a document ends.
    """
    size = config.sequence_length - 1  # without the end-of-text before the document
    bins: list[list[Piece]] = []
    by_free: list[list[list[Piece]]] = [[] for _ in range(size + 1)]
    for piece in pieces:
        needed = len(piece[0])
        free = next((n for n in range(needed, size + 1) if by_free[n]), size)
        if by_free[free]:
            best = by_free[free].pop()
        else:
            best = []
            bins.append(best)
        best.append(piece)
        by_free[max(0, free - needed - 1)].append(best)
    tokens = np.full((len(bins), size), tokenizer.end_of_text_id, np.int32)
    weights = np.zeros((len(bins), size), np.float32)
    for row, contents in enumerate(bins):
        start = 0
        for piece_tokens, piece_weights in contents:
            stop = start + len(piece_tokens)
            tokens[row, start:stop], weights[row, start:stop] = piece_tokens, piece_weights
            start = stop + 1
    return InMemoryDocuments(
        tokens.reshape(-1),
        np.full(len(bins), size, np.int64),
        content_hashes(row.tobytes() for row in tokens),
        weights.reshape(-1),
    )
