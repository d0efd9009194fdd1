"""The lm-evaluation-harness adapter: its arithmetic, and the harness itself if installed."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.benchmarks import harness_equality
from tests import meshes, tiny_run
from tests.model.drawn import drawn_weights
from umv2.config import GenerateConfig, ModelConfig
from umv2.config.schema import UserError
from umv2.data.tokenizers import ByteTokenizer
from umv2.evaluation import downstream
from umv2.evaluation.scoring import Scorer
from umv2.inference.decode import Generator
from umv2.inference.sampling import Sampling
from umv2.model.weights import Weights

FILL = 256


@functools.cache
def small() -> tuple[ModelConfig, Weights]:
    """A model whose predictions vary with the token."""
    config = tiny_run.tiny_config("unused").model
    return config, drawn_weights(config, embedding=10)


@functools.cache
def scorer() -> Scorer:
    """A scorer of the same model, sharded over 8 devices."""
    config, weights = small()
    mesh = meshes.create(replica=8)
    return Scorer(config, meshes.replicate(weights, mesh), mesh)


@functools.cache
def forward() -> Callable[[np.ndarray], jax.Array]:
    """Returns the function from tokens to logits of the same model on one device."""
    config, weights = small()  # not in a trace: its result is kept
    return jax.jit(lambda tokens: weights.model(config)(tokens, store=weights.store).logits)


def by_hand(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Scores one sequence without padding or batching."""
    tokens = np.array([[*context, *continuation]], np.int32)
    logits = forward()(tokens[:, :-1])
    chances = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0, len(context) - 1 :]
    places = np.arange(len(continuation))
    total = float(chances[places, continuation].sum())
    return total, bool((chances.argmax(axis=-1) == continuation).all())


def ask(pairs: list[Any], **settings: int) -> list[tuple[float, bool]]:
    settings = {"max_length": 64, "batch_size": 4, "fill": FILL} | settings
    return downstream.log_likelihoods(scorer(), pairs, **settings)


def greedy(context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(forward()(np.array([ids], np.int32))[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.slow
def test_log_likelihoods_match_single_sequences_in_the_order_of_requests() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 256, size=a).tolist(), rng.integers(0, 256, size=b).tolist())
        for a, b in [(3, 1), (40, 9), (1, 30), (7, 7), (12, 3)]
    ]
    pairs.append((pairs[0][0], greedy(pairs[0][0], 3)))
    expected = [by_hand(*pair) for pair in pairs]
    assert [flag for _, flag in expected] == [False] * 5 + [True]
    for settings in ({}, {"batch_size": 16}):
        got = ask(pairs, **settings)
        assert [flag for _, flag in got] == [flag for _, flag in expected]
        np.testing.assert_allclose(
            [x for x, _ in got], [x for x, _ in expected], rtol=1e-5, atol=1e-5
        )


def test_long_requests_are_truncated_from_the_left() -> None:
    rng = np.random.default_rng(1)
    context, continuation = rng.integers(0, 256, size=50).tolist(), [3, 4]
    # The model reads 16 tokens: all but the last of 17.
    expected = by_hand(context[-15:], continuation)
    full = by_hand(context, continuation)
    assert abs(expected[0] - full[0]) > 1e-3
    (got,) = ask([(context, continuation)], max_length=16)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    # In a still longer continuation, tokens without a preceding token are not scored.
    (got,) = ask([([1], context)], max_length=16)
    np.testing.assert_allclose(got[0], by_hand(context[-17:-16], context[-16:])[0], rtol=1e-5)


def test_a_context_needs_a_token() -> None:
    with pytest.raises(ValueError, match="end-of-text"):
        ask([([], [1])])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 19])
def test_rolling_windows_predict_every_token_once(count: int) -> None:
    tokens = list(range(100, 100 + count))
    windows = downstream.rolling_windows(tokens, prefix=FILL, max_length=8)
    assert [token for _, continuation in windows for token in continuation] == tokens
    assert windows[0][0] == [FILL]
    for context, continuation in windows[1:]:
        # As long as the model allows, with the original tokens before them.
        assert len(context) + len(continuation) == 9
        start = tokens.index(continuation[0])
        assert list(context) == tokens[start - len(context) : start]
    assert downstream.rolling_windows([], prefix=FILL, max_length=8) == []


# --- settings of generation, and continuations ---

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, vocab_size=257)


def settings_of(**given: Any) -> downstream.GenerationSettings:
    return downstream.GenerationSettings.of_task(given, task="x", vocab_size=257, max_length=300)


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"temperature": 0}, {}),
        ({"temperature": 0.0, "do_sample": False}, {}),
        ({"temperature": 0.7, "do_sample": False}, {}),
        ({"temperature": "0.7", "do_sample": "False"}, {}),
        ({"do_sample": False, "top_k": -1, "top_p": 3, "min_p": 0.1}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": "0.7"}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": None}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": "true", "temperature": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 1e-40}, {"temperature": 1e-40}),
        ({"temperature": 1, "top_k": 0}, {"temperature": 1.0}),
        ({"temperature": 1, "top_k": "50"}, {"temperature": 1.0, "top_k": 50}),
        ({"temperature": 1, "top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        ({"temperature": 1, "top_k": None, "top_p": None}, {"temperature": 1.0}),
        ({"temperature": 1, "top_p": 1}, {"temperature": 1.0}),
        ({"temperature": 1, "top_p": "0.9"}, {"temperature": 1.0, "top_p": 0.9}),
        # Only the most likely token is left.
        ({"temperature": 1, "top_p": 0}, {}),
        ({"temperature": 1, "min_p": 0.0, "typical_p": 1.0}, {"temperature": 1.0}),
        ({"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": "1.0"}, {}),
        ({"num_return_sequences": 1, "early_stopping": False, "use_cache": True}, {}),
        ({"no_repeat_ngram_size": 0, "min_length": None, "guidance_scale": None}, {}),
    ],
)
def test_generation_settings_have_the_semantics_of_transformers(
    given: dict[str, Any], changes: dict[str, Any]
) -> None:
    settings = settings_of(**given)
    assert settings.sampling == dataclasses.replace(GREEDY, **changes)
    assert settings.max_new_tokens == 256
    assert settings.stop == ()


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"max_gen_toks": 24}, 24),
        ({"max_gen_toks": "24"}, 24),
        ({"max_gen_toks": 24.0}, 24),
        ({"max_new_tokens": 24, "max_gen_toks": None}, 24),
        ({"max_tokens": 24}, 24),
        ({"max_completion_tokens": 24}, 24),
        ({"max_completion_tokens": 9, "max_tokens": 8, "max_new_tokens": 24}, 24),
        ({"max_new_tokens": 9, "max_gen_toks": 24}, 24),
    ],
)
def test_the_limit_of_new_tokens_has_the_harness_names(given: dict[str, Any], count: int) -> None:
    assert settings_of(**given).max_new_tokens == count


@pytest.mark.parametrize(
    ("until", "stop"),
    [("a", ("a",)), (["a", "", "b"], ("a", "b")), (None, ()), ([], ()), ("", ()), (("a",), ("a",))],
)
def test_texts_end_at_every_valid_stop_string(until: Any, stop: tuple[str, ...]) -> None:
    assert settings_of(until=until).stop == stop


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": True, "temperature": 0}, r"temperature=0.0: must be > 0 with do_sample"),
        ({"do_sample": True, "temperature": "0.0"}, r"temperature=0.0: must be > 0"),
        ({"do_sample": True, "temperature": -1}, r"temperature=-1: must be a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf: must be a finite number"),
        ({"temperature": "hot"}, "temperature='hot': must be a finite number"),
        ({"temperature": True}, "temperature=True: must be a finite number"),
        ({"temperature": [0.5]}, r"temperature=\[0.5\]: must be a finite number"),
        ({"temperature": 10**400}, "temperature=10+: must be a finite number"),
        ({"do_sample": "yes"}, "do_sample='yes': must be true or false"),
        ({"do_sample": 1}, "do_sample=1: must be true or false"),
        ({"do_sample": []}, r"do_sample=\[\]: must be true or false"),
        ({"temperature": 1, "top_k": -1}, "top_k=-1: must be an integer >= 0"),
        ({"temperature": 1, "top_k": 2.5}, "top_k=2.5: must be an integer >= 0"),
        ({"temperature": 1, "top_k": "all"}, "top_k='all': must be an integer >= 0"),
        ({"temperature": 1, "top_k": float("inf")}, "top_k=inf: must be an integer"),
        ({"temperature": 1, "top_p": 1.5}, "top_p=1.5: must be a finite number >= 0 and <= 1"),
        ({"temperature": 1, "top_p": -0.1}, "top_p=-0.1: must be"),
        ({"temperature": 1, "top_p": {}}, r"top_p=\{\}: must be"),
        ({"temperature": 1, "min_p": 0.1}, "min_p=0.1: not supported; only 0,"),
        ({"temperature": 1, "typical_p": 0.9}, "typical_p=0.9: not supported; only 1,"),
        ({"num_beams": 4}, "num_beams=4: not supported; only 1,"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: not supported; only 1,"),
        ({"early_stopping": "never"}, "early_stopping='never': not supported; only False,"),
        ({"no_repeat_ngram_size": [3]}, "no_repeat_ngram_size="),
        ({"temprature": 0.7}, r"temprature=0.7: unknown setting \(nearest: temperature\)"),
        ({"bad_words_ids": [[1]]}, "bad_words_ids=.*: unknown setting"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be an integer >= 1"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5: must be an integer >= 1"),
        ({"max_gen_toks": True}, "max_gen_toks=True: must be an integer >= 1"),
        ({"max_gen_toks": 300}, "max_gen_toks=300: must be less than the model's 300 tokens"),
        ({"max_gen_toks": 10**30}, "max_gen_toks=10+: must be less than the model's 300 tokens"),
        ({"max_length": 64}, "max_length=64: depends on the prompt's length; set max_gen_toks"),
        ({"until": 5}, "until=5: must be a string or a list of strings"),
        ({"until": ["a", 5]}, r"until=\['a', 5\]: must be a string or a list of strings"),
        ({"until": {"a": 1}}, "until=.*: must be a string or a list of strings"),
    ],
)
def test_invalid_settings_are_a_one_line_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^task 'x': generation_kwargs\.{message}") as caught:
        settings_of(**given)
    assert "\n" not in str(caught.value)


def test_a_default_limit_that_is_too_long_is_reported_as_the_default() -> None:
    with pytest.raises(
        UserError, match="max_gen_toks=256: the default must be less than the model's 64"
    ):
        downstream.GenerationSettings.of_task({}, task=None, vocab_size=257, max_length=64)


@functools.cache
def generator() -> Generator:
    config = GenerateConfig(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, stop=(), seed=0)
    return Generator(*small(), tokenizer=ByteTokenizer(), config=config)


def request(text: str, task: str = "x", **given: Any) -> downstream.GenerationRequest:
    settings = settings_of(**{"max_gen_toks": 6, "temperature": 20} | given)
    return downstream.GenerationRequest(task, tuple(text.encode()), settings)


@pytest.mark.slow
def test_samples_of_a_prompt_differ_and_do_not_depend_on_the_rest_of_the_batch() -> None:
    sixteen = [request("2 + 2 =")] * 16
    alone_batch = downstream.continuations(generator(), sixteen, batch_size=16)
    assert len(set(alone_batch)) == 16
    assert downstream.continuations(generator(), sixteen, batch_size=4) == alone_batch
    # Mixed with longer requests, other settings and other tasks, which are sorted.
    others = [request("longer than the other"), request("2 + 2 =", temperature=10)]
    others += [request("2 + 2 =", task="y")]
    mixed_batch = downstream.continuations(generator(), [*others, *sixteen[:5]], batch_size=4)
    assert mixed_batch[-5:] == alone_batch[:5]
    assert mixed_batch[2] == alone_batch[0]  # the same question, in any task
    assert downstream.continuations(generator(), [], batch_size=4) == []


# --- reports ---


def test_report_figures_are_aligned() -> None:
    results = {
        "results": {"one": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "one"}},
        "n-samples": {"one": {"original": 9, "effective": 4}},
        "versions": {"lm_eval": "0"},
    }
    report = downstream.DownstreamReport(step=7, results=results)
    assert report.rows() == [("one", "acc", 0.5, 0.1, 4)]
    heading, names, row = report.table().splitlines()
    assert "step 7" in heading
    assert len(names) == len(row)


def test_a_report_is_strict_json_for_any_task_result(tmp_path: Path) -> None:
    figures = {
        "a,none": float("nan"),
        "a_stderr,none": "N/A",
        "b,none": np.float32(0.5),
        "b_stderr,none": np.float64("inf"),
        "c,none": np.bool(True),
        "d,none": np.arange(2),
        "e,none": {1: {"x"}, "function": len},
    }
    results = {"results": {"one": figures}, "n-samples": {}, "versions": {"lm_eval": "0"}}
    report = downstream.DownstreamReport(step=7, results=results)
    assert [(row[1], row[3]) for row in report.rows()] == [("a", None), ("b", math.inf)]
    report.write(tmp_path)
    written = json.loads((tmp_path / "downstream.json").read_text(), parse_constant=pytest.fail)
    assert written == report.metrics()
    one = written["results"]["one"]
    assert [one[f"{name},none"] for name in "abcd"] == [None, 0.5, True, [0, 1]]
    assert one["b_stderr,none"] is None
    assert one["e,none"] == {"1": ["x"], "function": str(len)}


def test_a_report_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = downstream.DownstreamReport(step=7, results={})
    with pytest.raises(UserError, match="file: cannot be created"):
        report.write(tmp_path / "file")


def test_without_the_harness_a_one_line_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(downstream.UserError, match=r"pip install -e '.\[eval\]'"):
        downstream.require_harness()


# --- with the harness ---


@pytest.mark.slow(minutes=2)
def test_the_harness_runs_local_tasks_from_the_command_line(finished: tiny_run.Run) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval, which CI does not install")
    command = [sys.executable, "main.py", "--mode=evaluate", f"--workdir={finished.workdir}"]
    command += ["--include_path=tests/evaluation/tasks", "--limit=3"]

    def run(suite: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, f"--suite={suite}"],
            capture_output=True,
            text=True,
            check=False,
            env=tiny_run.environment(finished.cache) | {"JAX_PLATFORMS": "cpu"},
        )

    done = run("umv2_choices,umv2_texts")
    assert done.returncode == 0, done.stderr
    assert "umv2_choices" in done.stdout
    assert (finished.workdir / "downstream.json").exists()
    assert "(nearest: umv2_texts)" in run("umv2_text").stderr


@pytest.mark.slow(minutes=3)
def test_scores_equal_those_of_the_hugging_face_backend(tmp_path: Path) -> None:
    for name in ("lm_eval", "torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason="needs the extras eval and reference, gigabytes")
    assert os.environ.get("JAX_PLATFORMS") == "cpu"
    records = harness_equality.run(tmp_path)
    assert records[-1]["different_texts"] == 2  # some tokens are greedy, some are not
    for record in records:
        assert record["requests"] > 0
        assert record["greatest_difference_nats"] < 1e-3
        assert record["unequal_texts_and_flags"] == 0
        assert record["ours"].keys() == record["hugging_face"].keys()
        for name, value in record["ours"].items():
            assert value == pytest.approx(record["hugging_face"][name], rel=1e-4)
