"""Documents of the long-context suite, to train on.

An answer whose evidence is in another sequence cannot be learned. So these documents are not cut
where sequences end: as many as fit are put together to one document that fills a sequence, with
end-of-text between them, and text is cut to pieces that lie among them.
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
    """Returns text and tasks in the fractions of tokens that `config` asks for, a sequence each.

    `config.long_context.num_documents` of each task are written, of the training split; of recall,
    the tokens of one task, if there is a warm-up. Text beyond `long_context.text_fraction` is left
    out, document by document in the order of their hashes, which has nothing to do with what they
    say.

    Args:
      config: the data section.
      documents: text, in tokens.
      tokenizer: of the text.
      texts: documents of the source to cut filler from; those that train alone.
    """
    wanted = config.long_context
    pieces = [
        _task_piece(TASKS[name], config, index, tokenizer, texts)
        for name, index in _with_bar(
            [(name, index) for name in wanted.tasks for index in range(wanted.num_documents)]
        )
    ]
    num_tokens = sum(len(tokens) for tokens, _ in pieces)
    if wanted.warm_up_steps:
        last = _recall_pieces(config, tokenizer, num_tokens // len(wanted.tasks), lambda _: 1.0)
        pieces += last
        num_tokens += sum(len(tokens) for tokens, _ in last)
    num_text_tokens = int(num_tokens * wanted.text_fraction / (1 - wanted.text_fraction))
    pieces += _text_pieces(documents, num_text_tokens, config.sequence_length - 1)
    order = np.random.default_rng(wanted.seed).permutation(len(pieces))
    return _bundled([pieces[i] for i in order], config, tokenizer)


def warm_up(config: DataConfig, tokenizer: Tokenizer) -> InMemoryDocuments:
    """Returns associative recall in the order in which it is to be learned from, a sequence each.

    Documents of the first third are as short as can be; then the longest of them grow to half a
    sequence. There are about `config.long_context.num_documents` sequences.
    """
    num_tokens = config.long_context.num_documents * config.sequence_length
    pieces = _recall_pieces(config, tokenizer, num_tokens, lambda done: 1.5 * done - 0.5)
    return _bundled(pieces, config, tokenizer)


def _with_bar[T](jobs: Sequence[T]) -> Iterator[T]:
    disable = None if logging.level_info() else True
    return iter(tqdm(jobs, "writing tasks", unit=" documents", disable=disable))


def _task_piece(
    task: Task, config: DataConfig, index: int, tokenizer: Tokenizer, texts: Sequence[str]
) -> Piece:
    """Writes one document, as long as an eighth of a sequence up to all of it.

    Those of an eighth to a quarter hold as many tokens as those of a quarter to a half, or of a
    half to all: answers are learned with little before them first.
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
    """Writes `num_tokens` of recall.

    Its `growth`, a function of the fraction that is written, says where the longest document is on
    the way from the shortest there is (0 and less) to half a sequence (1).
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
    """Cuts documents, of at most `num_tokens` in all, to pieces."""
    order = np.argsort(documents.content_hashes, kind="stable")
    used = np.cumsum(documents.lengths[order])
    for index in order[: int(np.searchsorted(used, num_tokens, side="right"))].tolist():
        end = int(documents.lengths[index])
        for start, stop in itertools.pairwise([*range(0, end, longest), end]):
            yield documents.read(index, start, stop), np.ones(stop - start, np.float32)


def _length(seed: int, index: int, shortest: float, longest: float) -> int:
    """Draws the length of a document; of the tokens of all, each octave holds as many."""
    uniform = float(np.random.default_rng([seed, index]).random())
    return int(shortest / (1 - uniform * (1 - shortest / longest)))


def _weighted(example: Example, config: DataConfig) -> Piece:
    weights = np.full(len(example.tokens), config.long_context.context_weight, np.float32)
    for answer in example.answers:
        weights[answer.start : answer.stop] = 1
    size = config.sequence_length - 1
    return example.tokens[:size], weights[:size]  # only words of many tokens make it longer


def _bundled(
    pieces: Sequence[Piece], config: DataConfig, tokenizer: Tokenizer
) -> InMemoryDocuments:
    """Puts pieces together to documents of a sequence each, in their order as far as it goes.

    A piece goes where it leaves the fewest tokens free. End-of-text, which stands between pieces
    and pads what is left, counts nothing: where a document ends is not to be known.
    """
    size = config.sequence_length - 1  # beside the end-of-text before it
    bundles: list[list[Piece]] = []
    by_free: list[list[list[Piece]]] = [[] for _ in range(size + 1)]
    for piece in pieces:
        needed = len(piece[0])
        free = next((n for n in range(needed, size + 1) if by_free[n]), size)
        if by_free[free]:
            bundle = by_free[free].pop()
        else:
            bundle = []
            bundles.append(bundle)
        bundle.append(piece)
        by_free[max(0, free - needed - 1)].append(bundle)
    tokens = np.full((len(bundles), size), tokenizer.end_of_text_id, np.int32)
    weights = np.zeros((len(bundles), size), np.float32)
    for row, bundle in enumerate(bundles):
        start = 0
        for part, counted in bundle:
            stop = start + len(part)
            tokens[row, start:stop], weights[row, start:stop] = part, counted
            start = stop + 1
    return InMemoryDocuments(
        tokens.reshape(-1),
        np.full(len(bundles), size, np.int64),
        content_hashes(row.tobytes() for row in tokens),
        weights.reshape(-1),
    )
