"""The adapter to lm-evaluation-harness: its arithmetic here, the harness itself where installed."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness_equality
from tests import meshes, tiny_run
from umv2.evaluation import downstream
from umv2.evaluation.answers import Respondent
from umv2.training.state import create_model, split_model

FILL = 256


@functools.cache
def small() -> tuple[Any, Any]:
    """A model whose predictions vary, and its value tables."""
    config = tiny_run.tiny_config("unused").model
    key = jax.random.key(0, impl="unsafe_rbg")
    model, store = jax.jit(lambda: create_model(config, key))()
    model.embedding[...] *= 10
    return model, store


@functools.cache
def respondent() -> Respondent:
    """The same, dividing its work over 8 devices."""
    model, store = small()
    mesh = meshes.create(replica=8)
    _, params, buffers = split_model(model)
    placed = meshes.replicate((params, buffers, store), mesh)
    return Respondent(model.config, *placed, mesh)


def by_hand(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One sequence, without padding or batch."""
    model, store = small()
    tokens = np.array([[*context, *continuation]], np.int32)
    logits = jax.jit(lambda t: model(t, store=store).logits)(tokens[:, :-1])
    chances = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0, len(context) - 1 :]
    places = np.arange(len(continuation))
    total = float(chances[places, continuation].sum())
    return total, bool((chances.argmax(axis=-1) == continuation).all())


def ask(pairs: list[Any], **settings: int) -> list[tuple[float, bool]]:
    settings = {"max_length": 64, "batch_size": 4, "fill": FILL} | settings
    return downstream.log_likelihoods(respondent(), pairs, **settings)


def greedy(context: list[int], count: int) -> list[int]:
    model, store = small()
    ids = list(context)
    for _ in range(count):
        logits = model(jnp.array([ids], jnp.int32), store=store).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(context) :]


def test_log_likelihoods_are_those_of_one_sequence_alone_in_the_order_of_the_requests() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 256, size=a).tolist(), rng.integers(0, 256, size=b).tolist())
        for a, b in [(3, 1), (40, 9), (1, 30), (7, 7), (12, 3)]
    ]
    pairs.append((pairs[0][0], greedy(pairs[0][0], 3)))
    wanted = [by_hand(*pair) for pair in pairs]
    assert [flag for _, flag in wanted] == [False] * 5 + [True]
    for settings in ({}, {"batch_size": 16}):
        got = ask(pairs, **settings)
        assert [flag for _, flag in got] == [flag for _, flag in wanted]
        np.testing.assert_allclose(
            [x for x, _ in got], [x for x, _ in wanted], rtol=1e-5, atol=1e-5
        )


def test_what_does_not_fit_is_cut_from_the_left() -> None:
    rng = np.random.default_rng(1)
    context, continuation = rng.integers(0, 256, size=50).tolist(), [3, 4]
    # The model reads 16 tokens: all but the last of 17.
    wanted = by_hand(context[-15:], continuation)
    whole = by_hand(context, continuation)
    assert abs(wanted[0] - whole[0]) > 1e-3
    (got,) = ask([(context, continuation)], max_length=16)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    # Of a continuation that is longer still, what has no token before it is not answered.
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
        # As long as the model reads, and what stands before is what stood before.
        assert len(context) + len(continuation) == 9
        start = tokens.index(continuation[0])
        assert list(context) == tokens[start - len(context) : start]
    assert downstream.rolling_windows([], prefix=FILL, max_length=8) == []


def test_a_report_lines_its_figures_up() -> None:
    results = {
        "results": {"one": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "one"}},
        "n-samples": {"one": {"original": 9, "effective": 4}},
        "versions": {"lm_eval": "0"},
    }
    found = downstream.DownstreamReport(step=7, results=results)
    assert found.rows() == [("one", "acc", 0.5, 0.1, 4)]
    heading, names, row = found.table().splitlines()
    assert "step 7" in heading
    assert len(names) == len(row)


def test_without_the_harness_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(downstream.UserError, match=r"pip install 'umv2\[eval\]'"):
        downstream.require_harness()


# --- with the harness ---


@pytest.mark.slow(minutes=2)
def test_the_harness_runs_local_tasks_by_command_line(finished: tiny_run.Run) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval, which CI leaves out")
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
    assert records[-1]["different_texts"] == 2  # some tokens are the likeliest, some are not
    for record in records:
        assert record["requests"] > 0
        assert record["greatest_difference_nats"] < 1e-3
        assert record["unequal_texts_and_flags"] == 0
        assert record["ours"].keys() == record["hugging_face"].keys()
        for name, value in record["ours"].items():
            assert value == pytest.approx(record["hugging_face"][name], rel=1e-4)
