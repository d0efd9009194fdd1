"""Documents of the suite: answers follow from the context, and from nothing else."""

import re
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from umv2.config import LongContextTask
from umv2.data.long_context import TASKS, Example, make_example, recall
from umv2.data.long_context.examples import Split, names
from umv2.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
TEXTS = [f"line {i} of a text\n" * 40 for i in range(10)]


class Words:
    """A word-level tokenizer, so that pieces and tokens differ."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> np.ndarray:
        parts = re.findall(r"\+=|\w+[ :]?|\W", text)
        return np.array([self.ids.setdefault(part, len(self.ids)) for part in parts], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        known = list(self.ids)
        return "".join(known[i] for i in ids)


def example(name: str, index: int = 0, length: int = 512, split: Split = "train") -> Example:
    return make_example(
        TASKS[name], split, 7, index, length=length, tokenizer=TOKENIZER, texts=TEXTS
    )


def asked(example: Example) -> list[tuple[str, str, str]]:
    """Returns (all text before the line of the question, the question, its answer) per answer."""
    questions = []
    for answer in example.answers:
        before = TOKENIZER.decode(example.tokens[: answer.start])
        context, _, prompt = before.rpartition("\n")
        questions.append(
            (context + "\n", prompt, TOKENIZER.decode(example.tokens[answer.start : answer.stop]))
        )
    return questions


# --- text solvers, one per task ---


def solve_key_value(context: str, prompt: str) -> str:
    (value,) = set(re.findall(rf"^{prompt}(\w)$", context, re.M))
    return value


def solve_in_context(context: str, prompt: str) -> str:
    shown = re.findall(rf"^{prompt}(\d)$", context, re.M)
    assert len(set(shown)) == 1
    return shown[0]


def solve_multi_round(context: str, prompt: str) -> str:
    assert prompt == "< "
    person = re.findall(r"^> where is (\w)\?$", context, re.M)[-1]
    place = "unknown"
    for line in context.splitlines():
        if moved := re.fullmatch(rf"> {person} is at (\w+)\.", line):
            place = moved[1]
        elif line == f"> {person} left.":
            place = "unknown"
    return place


def solve_memorize(context: str, prompt: str) -> str:
    subject = re.fullmatch(r"The (\w+) of (\w+)\? ", prompt)
    assert subject
    (value,) = re.findall(rf"^The {subject[1]} of {subject[2]} is (\w+)\.$", context, re.M)
    return value


def solve_needle(context: str, prompt: str) -> str:
    assert prompt == "Recall: the magic number is "
    (code,) = re.findall(r"^The magic number is (\d\d)\.$", context, re.M)
    return code


def solve_multi_hop(context: str, prompt: str) -> str:
    question = re.fullmatch(r"(\w+)\+([234])\? ", prompt)
    assert question
    outer = dict(re.findall(r"^(\w+) in (\w+)$", context, re.M))
    thing = question[1]
    for _ in range(int(question[2])):
        thing = outer[thing]
    return thing


def solve_reasoning(context: str, prompt: str) -> str:
    values: dict[str, int] = {}
    for variable, change, what in re.findall(r"^(\w)(\+?=)(\w)$", context, re.M):
        amount = int(what) if what.isdigit() else values[what]
        values[variable] = amount if change == "=" else (values[variable] + amount) % 10
    return str(values[prompt[0]])


SOLVERS: dict[str, Callable[[str, str], str]] = {
    "memorize": solve_memorize,
    "multi_round": solve_multi_round,
    "in_context": solve_in_context,
    "needle": solve_needle,
    "key_value": solve_key_value,
    "multi_hop": solve_multi_hop,
    "reasoning": solve_reasoning,
}


def test_the_configuration_lists_every_task() -> None:
    assert list(TASKS) == list(get_args(LongContextTask)) == list(SOLVERS)


@pytest.mark.parametrize("name", TASKS)
def test_answers_follow_from_the_context(name: str) -> None:
    for index in range(20):
        for length in (64, 300, 1000):
            for context, prompt, answer in asked(example(name, index, length)):
                assert SOLVERS[name](context, prompt) == answer


@pytest.mark.parametrize("name", TASKS)
def test_answers_do_not_follow_from_the_question(name: str) -> None:
    answers: dict[str, set[str]] = {}
    length = 256 if name == "key_value" else 512  # there are few one-letter keys
    for index in range(60):
        for context, prompt, answer in asked(example(name, index, length)):
            question = context.splitlines()[-1] if name == "multi_round" else prompt
            answers.setdefault(question, set()).add(answer)
    repeated = [answers_given for question, answers_given in answers.items()]
    # The same question has other answers in other documents, nearly as many as chance implies.
    assert np.mean([len(answers_given) > 1 for answers_given in repeated]) > 0.5


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_asked_once_between_changes(name: str) -> None:
    for index in range(5):
        questions = [
            (context.splitlines()[-1] if name == "multi_round" else "", prompt, answer)
            for context, prompt, answer in asked(example(name, index, split="evaluation"))
        ]
        if name != "multi_round":  # there, updates come between the questions
            assert len(set(questions)) == len(questions)
        assert questions


@pytest.mark.parametrize("name", TASKS)
def test_a_document_is_a_function_of_its_arguments(name: str) -> None:
    same = [example(name).tokens.tolist() for _ in range(2)]
    assert same[0] == same[1]
    others = [
        example(name, index=1),
        example(name, split="evaluation"),
        make_example(TASKS[name], "train", 8, 0, length=512, tokenizer=TOKENIZER, texts=TEXTS),
    ]
    assert all(other.tokens.tolist() != same[0] for other in others)


@pytest.mark.slow(fast=["needle", "reasoning"])
@pytest.mark.parametrize("name", TASKS)
def test_no_document_of_one_split_is_in_the_other(name: str) -> None:
    documents = {
        split: {example(name, index, 256, split).tokens.tobytes() for index in range(200)}
        for split in ("train", "evaluation")
    }
    assert len(documents["train"]) > 150
    assert not documents["train"] & documents["evaluation"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [64, 256, 2048, 32768])
def test_documents_nearly_fill_the_allowed_length(name: str, length: int) -> None:
    document = example(name, length=length)
    assert len(document.tokens) <= length
    assert len(document.tokens) > (0.7 if length > 64 else 0.5) * length
    for answer in document.answers:
        assert 0 < answer.start < answer.stop <= len(document.tokens)
        assert 0 <= answer.depth < 1
        assert 0 < answer.chance < 1


@pytest.mark.parametrize("name", TASKS)
def test_answers_begin_and_end_with_a_token_of_any_tokenizer(name: str) -> None:
    words = Words()
    document = make_example(TASKS[name], "train", 0, 3, length=400, tokenizer=words, texts=TEXTS)
    text = words.decode(document.tokens)
    assert len(document.tokens) < len(text)
    for answer in document.answers:
        before = words.decode(document.tokens[: answer.start])
        context, _, prompt = before.rpartition("\n")
        answered = words.decode(document.tokens[answer.start : answer.stop])
        assert SOLVERS[name](context + "\n", prompt) == answered


@pytest.mark.parametrize("name", ["key_value", "in_context"])
def test_training_asks_throughout_and_evaluation_at_the_end(name: str) -> None:
    for index in range(5):
        practice, evaluation = example(name, index), example(name, index, split="evaluation")
        assert len(practice.answers) >= len(evaluation.answers)
        assert practice.answers[0].start < 0.2 * len(practice.tokens)
        first = evaluation.answers[0].start
        assert first > 0.4 * len(evaluation.tokens)
        lines = TOKENIZER.decode(evaluation.tokens[first:]).count("\n")
        assert lines == len(evaluation.answers)


def test_recall_asks_for_the_partner_of_a_symbol() -> None:
    for length in (12, 40, 300):
        document = make_example(
            recall.write, "train", 0, length, length=length, tokenizer=TOKENIZER, texts=()
        )
        assert 0.7 * length < len(document.tokens) <= length
        for context, prompt, answer in asked(document):
            (partner,) = set(re.findall(rf"^{prompt}(\w)$", context, re.M))
            assert partner == answer
        assert len(document.answers) == min(length // 6, 62)


def test_needles_are_placed_at_all_depths() -> None:
    depths = [example("needle", index, 1024).answers[0].depth for index in range(200)]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert counts.min() > 15


def test_chance_is_the_accuracy_of_guessing_among_the_candidates() -> None:
    pairs = example("key_value", split="evaluation")
    text = TOKENIZER.decode(pairs.tokens[: pairs.answers[0].start])
    values = re.findall(r"^\w+:(\w)$", text, re.M)
    for answer, (_, _, value) in zip(pairs.answers, asked(pairs), strict=True):
        assert answer.chance == pytest.approx(values.count(value) / len(values))
    facts = example("multi_hop")
    num_facts = len(re.findall(r"^\w in \w$", TOKENIZER.decode(facts.tokens), re.M))
    assert facts.answers[0].chance == pytest.approx(1 / num_facts)


def test_names_are_distinct_and_as_short_as_possible() -> None:
    for count, length in [(62, 1), (63, 2), (3844, 2), (3845, 3)]:
        chosen = names(count)
        assert len(set(chosen)) == len(chosen) >= count
        assert {len(name) for name in chosen} == {length}
