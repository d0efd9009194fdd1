"""Scores of the long-context suite against decoding, and their report."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest

from tests import meshes, tiny_run
from tests.model.drawn import drawn_weights
from umv2 import modes
from umv2.config import Config, GenerateConfig, ModelConfig
from umv2.data.long_context.examples import Answer, Example
from umv2.data.tokenizers import ByteTokenizer
from umv2.evaluation import long_context
from umv2.evaluation.long_context import Cell, LongContextReport, Score, wilson_interval
from umv2.evaluation.scoring import Scorer
from umv2.inference.decode import Generator
from umv2.model.weights import Weights

TOKENIZER = ByteTokenizer()
GREEDY = GenerateConfig(max_new_tokens=3, temperature=0.0, top_k=0, top_p=1.0, stop=(), seed=0)


def suite_config(**changes: Any) -> Config:
    config = tiny_run.tiny_config("unused")
    suite = dataclasses.replace(config.evaluation.long_context, **changes)
    evaluation = dataclasses.replace(config.evaluation, long_context=suite)
    return dataclasses.replace(config, evaluation=evaluation)


@functools.cache
def small() -> tuple[ModelConfig, Weights]:
    config = tiny_run.tiny_config("unused").model
    return config, drawn_weights(config, embedding=30)


def scorer() -> Scorer:
    config, weights = small()
    mesh = meshes.create(replica=8)
    return Scorer(config, meshes.replicate(weights, mesh), mesh)


def score(**changes: Any) -> Score:
    values: dict[str, Any] = {
        "task": "needle",
        "length": 64,
        "example": 0,
        "depth": 0.1,
        "chance": 0.25,
    }
    values |= {"exact": True, "log_likelihood": -1.0, "num_tokens": 2}
    return Score(**(values | changes))


@pytest.mark.slow
def test_an_answer_is_exact_if_greedy_decoding_produces_it() -> None:
    model_config, weights = small()
    generator = Generator(model_config, weights, tokenizer=TOKENIZER, config=GREEDY)
    rng = np.random.default_rng(0)
    examples, exact = [], []
    for number in range(5):
        context = rng.integers(0, 256, size=10 + 7 * number, dtype=np.int32)
        answer = np.array(list(generator.generate_ids(context)), np.int32)
        assert len(answer) == 3
        if number % 2:  # wrong in one token
            answer[number % 3] = (answer[number % 3] + 1) % 256
        place = len(context)
        tokens = np.concatenate([context, answer])
        examples.append(Example(tokens, (Answer(place, place + 3, 0.5, 0.1),)))
        exact.append(number % 2 == 0)
    config = suite_config(batch_tokens=64)
    scores = list(
        long_context._scores(
            scorer(),
            config.model,
            examples,
            "needle",
            64,
            config.evaluation.long_context,
            TOKENIZER.end_of_text_id,
        )
    )
    assert [one.exact for one in scores] == exact
    model, store = weights.model(model_config), weights.store
    forward = jax.jit(lambda tokens: model(tokens, store=store).logits)
    for one, example in zip(scores, examples, strict=True):
        tokens = np.array([[TOKENIZER.end_of_text_id, *example.tokens]], np.int32)
        chances = np.asarray(jax.nn.log_softmax(forward(tokens[:, :-1]), axis=-1))[0, -3:]
        expected = chances[np.arange(3), example.tokens[-3:]].sum()
        assert one.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_lengths_beyond_training_are_extrapolated_as_configured() -> None:
    lengths = (16, 64)  # trained at 16
    read = {
        how: [
            long_context.extrapolated(suite_config(extrapolation=how), length) for length in lengths
        ]
        for how in ("none", "linear", "ntk", "window")
    }
    plain = tiny_run.tiny_config("unused").model
    assert all(models[0] == plain for models in read.values())
    assert read["none"][1] == plain
    assert (read["linear"][1].rope_scaling, read["linear"][1].rope_scale) == ("linear", 4.0)
    assert read["ntk"][1].rope_scaling == "ntk"
    assert read["window"][1].attention_window == 16


def test_wilson_intervals_match_the_textbook() -> None:
    low, high = wilson_interval(0.0, 10)
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_cell_treats_examples_rather_than_answers_as_independent() -> None:
    scores = [score(example=i // 4, exact=i % 2 == 0) for i in range(40)]
    cell = Cell.of(scores)
    assert (cell.num_answers, cell.accuracy, cell.chance) == (40, 0.5, 0.25)
    assert (cell.low, cell.high) == wilson_interval(0.5, 10)
    assert cell.nats_per_token == 0.5


def test_a_report_is_aligned_and_in_the_order_of_tasks_and_lengths() -> None:
    scores = (score(length=128), score(), score(task="memorize", exact=False))
    report = LongContextReport(step=3, trained_length=64, extrapolation="ntk", scores=scores)
    assert list(report.cells()) == [("memorize", 64), ("needle", 64), ("needle", 128)]
    _, *lines = report.table(200).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell["accuracy"] for cell in report.metrics()["cells"]] == [0, 1, 1]


@pytest.mark.slow
def test_the_mode_writes_every_answer_and_a_figure(finished: tiny_run.Run) -> None:
    suite = dataclasses.replace(
        finished.config.evaluation.long_context,
        tasks=("key_value", "needle"),
        lengths=(64, 128),
        num_examples=3,
    )
    evaluation = dataclasses.replace(finished.config.evaluation, long_context=suite)
    config = dataclasses.replace(finished.config, evaluation=evaluation)
    report = modes.evaluate_long_context(config, finished.workdir)
    assert len(report.cells()) == 4
    heading, *answers = (finished.workdir / "long_context.jsonl").read_text().splitlines()
    assert json.loads(heading)["settings"]["num_examples"] == 3
    assert len(answers) == len(report.scores)
    assert (finished.workdir / "long_context.png").stat().st_size > 1000
    again = modes.evaluate_long_context(config, finished.workdir)
    assert again.scores == report.scores
