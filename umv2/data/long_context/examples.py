"""What all tasks share: documents, tokenized examples, and disjoint seeds for the splits."""

import dataclasses
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

Split = Literal["train", "evaluation"]
# Part of every seed: the package that first held the tasks, so that equal seeds still draw equal
# documents.
_DRAWN_AS = "umv2.evaluation.long_context"
# Part of every seed, so that the splits share no random stream.
_SPLITS: dict[Split, int] = {"train": 0, "evaluation": 1}
_SHORTEST_FILLER = 16  # tokens; a smaller gap is left unfilled
SYMBOLS = string.ascii_letters + string.digits


@runtime_checkable
class Encoder(Protocol):
    """The part of the tokenizer interface that examples need."""

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the ids of a text."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and the piece of the context that contains the answer.

    Attributes:
      prompt: text before the answer.
      answer: the text that is scored.
      evidence: index of the piece of the document that the answer depends on; the first of them
        if it depends on several.
      chance: probability that a random guess among the candidate answers is right. Each task
        documents its candidates.
    """

    prompt: str
    answer: str
    evidence: int
    chance: float


@dataclasses.dataclass
class Document:
    """Pieces of context and questions, in the order of the text.

    Each piece is tokenized separately, so that an answer starts and ends at a token boundary with
    any tokenizer.
    """

    pieces: list[str | Question] = dataclasses.field(default_factory=list)

    def add(self, piece: str | Question) -> int:
        """Appends a piece and returns its index."""
        self.pieces.append(piece)
        return len(self.pieces) - 1


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a task is asked to write.

    Attributes:
      rng: source of all random draws.
      length: maximum number of tokens of the document.
      size: returns the number of tokens of a text.
      filler: draws complete lines of real text, of at most the given number of tokens.
      practice: for training: also asks questions between the facts, as soon as they can be
        answered, and not only at the end. These questions have a short context and are learned
        first; without them, the others are not learned within minutes.
    """

    rng: np.random.Generator
    length: int
    size: Callable[[str], int]
    filler: Callable[[int], str]
    practice: bool = False

    def pick[T](self, choices: Sequence[T]) -> T:
        """Draws one of the choices."""
        return choices[int(self.rng.integers(len(choices)))]

    def sample[T](self, choices: Sequence[T], count: int) -> list[T]:
        """Draws up to `count` choices without replacement, in random order."""
        return [choices[int(i)] for i in self.rng.permutation(len(choices))[:count]]


@runtime_checkable
class Task(Protocol):
    """Writes a document of at most `brief.length` tokens."""

    def __call__(self, brief: Brief) -> Document:
        """Writes the document."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Tokens [start, stop) of an example that are scored.

    Attributes:
      start: position of the first token of the answer.
      stop: position after its last token.
      depth: relative position of the evidence in the text before the answer, from 0 (start) to 1.
      chance: see `Question`.
    """

    start: int
    stop: int
    depth: float
    chance: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized document and its answers."""

    tokens: Int32[np.ndarray, "t"]
    answers: tuple[Answer, ...]


def make_example(
    task: Task,
    split: Split,
    seed: int,
    index: int,
    *,
    length: int,
    tokenizer: Encoder,
    texts: Sequence[str],
) -> Example:
    """Writes example `index` of a split; deterministic in its arguments.

    Args:
      task: one of TASKS.
      split: examples of different splits are drawn independently.
      seed: of the split.
      index: of the example.
      length: maximum number of tokens; tasks with short pieces come close to it.
      tokenizer: encodes the text.
      texts: documents that filler is drawn from.
    """
    module = getattr(task, "__module__", "").rpartition(".")[2]
    name = zlib.crc32(f"{_DRAWN_AS}.{module}".encode())
    rng = np.random.default_rng([_SPLITS[split], seed, index, name, length])

    def size(text: str) -> int:
        return len(tokenizer.encode(text))

    def filler(limit: int) -> str:
        return _cut(texts, limit, size, rng)

    document = task(Brief(rng, length, size, filler, practice=split == "train"))
    tokens: list[np.ndarray] = []
    answers: list[tuple[int, int, Question]] = []
    starts: list[int] = []
    position = 0

    def append(text: str) -> None:
        nonlocal position
        tokens.append(tokenizer.encode(text))
        position += len(tokens[-1])

    for piece in document.pieces:
        starts.append(position)
        if isinstance(piece, str):
            append(piece)
            continue
        append(piece.prompt)
        start = position
        append(piece.answer)
        answers.append((start, position, piece))
        append("\n")
    return Example(
        tokens=np.concatenate(tokens).astype(np.int32),
        answers=tuple(
            Answer(start, stop, starts[question.evidence] / start, question.chance)
            for start, stop, question in answers
        ),
    )


def names(count: int) -> list[str]:
    """Returns all strings of letters and digits of the least length that has at least `count`."""
    length = 1
    while len(SYMBOLS) ** length < count:
        length += 1
    base, strings = len(SYMBOLS), []
    for number in range(base**length):
        digits = (number // base**place % base for place in range(length))
        strings.append("".join(SYMBOLS[digit] for digit in digits))
    return strings


def _cut(
    texts: Sequence[str], limit: int, size: Callable[[str], int], rng: np.random.Generator
) -> str:
    """Returns complete lines of at most `limit` tokens, drawn from one text after another."""
    lines: list[str] = []
    used = misses = 0
    while limit - used >= _SHORTEST_FILLER and misses < 100:
        text = texts[int(rng.integers(len(texts)))]
        text_lines = text.splitlines()
        first = int(rng.integers(len(text_lines))) if text_lines else 0
        count = len(lines)
        for line in text_lines[first:]:
            needed = size(line + "\n")
            if used + needed > limit:
                break
            lines.append(line + "\n")
            used += needed
        misses = 0 if len(lines) > count else misses + 1
    return "".join(lines)
