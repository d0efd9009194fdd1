"""What all tasks use: documents, the examples that they become, and how splits stay apart."""

import dataclasses
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

Split = Literal["train", "evaluation"]
# Drawn from by name, so that no seed of one split is a seed of another.
# Where tasks stood when their documents were first drawn: equal seeds draw equal documents.
_DRAWN_AS = "umv2.evaluation.long_context"
_SPLITS: dict[Split, int] = {"train": 0, "evaluation": 1}
_SHORTEST_FILLER = 16  # tokens; a gap that is smaller stays
SYMBOLS = string.ascii_letters + string.digits


@runtime_checkable
class Encoder(Protocol):
    """The part of a tokenizer that examples need."""

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the ids of a text."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and where in the context the answer stands.

    Attributes:
      prompt: text before the answer.
      answer: the text that is scored.
      evidence: number of the piece of the document that the answer depends on; where it depends on
        several, of the one that stands first.
      chance: probability that a guess is right which knows the task and the candidates for the
        answer, and not which of them it is. The task says what its candidates are.
    """

    prompt: str
    answer: str
    evidence: int
    chance: float


@dataclasses.dataclass
class Document:
    """Pieces of context and questions, in the order of the text.

    A piece is encoded on its own, so that answers begin and end with a token, whatever the
    tokenizer.
    """

    pieces: list[str | Question] = dataclasses.field(default_factory=list)

    def add(self, piece: str | Question) -> int:
        """Appends a piece and returns its number."""
        self.pieces.append(piece)
        return len(self.pieces) - 1


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a task is asked for.

    Attributes:
      rng: of everything that is drawn.
      length: tokens that the document may have.
      size: tokens of a text.
      filler: draws real text of at most so many tokens that ends a line.
      practice: for training: asks wherever an answer can be known already, and not only at the end,
        so that every document has questions with little before them. Those are learned first, and
        without them the others are not within minutes.
    """

    rng: np.random.Generator
    length: int
    size: Callable[[str], int]
    filler: Callable[[int], str]
    practice: bool = False

    def pick[T](self, choices: Sequence[T]) -> T:
        """Draws one."""
        return choices[int(self.rng.integers(len(choices)))]

    def sample[T](self, choices: Sequence[T], count: int) -> list[T]:
        """Draws several different ones, in random order."""
        return [choices[int(i)] for i in self.rng.permutation(len(choices))[:count]]


@runtime_checkable
class Task(Protocol):
    """Writes a document of at most `brief.length` tokens."""

    def __call__(self, brief: Brief) -> Document:
        """Writes it."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Tokens [start, stop) of an example that are scored.

    Attributes:
      start: first token of the answer.
      stop: token after it.
      depth: place of the evidence in what stands before the question, from 0 (first) to 1.
      chance: see `Question`.
    """

    start: int
    stop: int
    depth: float
    chance: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A document in tokens."""

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
    """Writes example `index` of a split: the same for equal arguments.

    Args:
      task: one of TASKS.
      split: examples of different splits are drawn independently.
      seed: of the split.
      index: of the example.
      length: tokens that it may have; it has nearly as many where the task's pieces are short.
      tokenizer: of the text.
      texts: documents that filler is cut from.
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
    place = 0

    def put(text: str) -> None:
        nonlocal place
        tokens.append(tokenizer.encode(text))
        place += len(tokens[-1])

    for piece in document.pieces:
        starts.append(place)
        if isinstance(piece, str):
            put(piece)
            continue
        put(piece.prompt)
        start = place
        put(piece.answer)
        answers.append((start, place, piece))
        put("\n")
    return Example(
        tokens=np.concatenate(tokens).astype(np.int32),
        answers=tuple(
            Answer(start, stop, starts[question.evidence] / start, question.chance)
            for start, stop, question in answers
        ),
    )


def names(count: int) -> list[str]:
    """Returns `count` different strings of letters and digits, all of the least length."""
    length = 1
    while len(SYMBOLS) ** length < count:
        length += 1
    base, made = len(SYMBOLS), []
    for number in range(base**length):
        digits = (number // base**place % base for place in range(length))
        made.append("".join(SYMBOLS[digit] for digit in digits))
    return made


def _cut(
    texts: Sequence[str], limit: int, size: Callable[[str], int], rng: np.random.Generator
) -> str:
    """Cuts complete lines of at most `limit` tokens out of texts, going on from text to text."""
    lines: list[str] = []
    used = misses = 0
    while limit - used >= _SHORTEST_FILLER and misses < 100:
        text = texts[int(rng.integers(len(texts)))]
        every = text.splitlines()
        first = int(rng.integers(len(every))) if every else 0
        count = len(lines)
        for line in every[first:]:
            needed = size(line + "\n")
            if used + needed > limit:
                break
            lines.append(line + "\n")
            used += needed
        misses = 0 if len(lines) > count else misses + 1
    return "".join(lines)
