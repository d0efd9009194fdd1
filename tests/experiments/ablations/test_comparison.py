"""Intervals and verdicts, checked by hand."""

import math

import pytest

from experiments.ablations.arms import Ablation, Arm, Expected
from experiments.ablations.comparison import (
    ArmResult,
    compare,
    interval,
    mean_and_deviation,
    quarter_means,
)
from experiments.ablations.records import Run


def run(seed: int, held_out: float, *, training: float = 1.0, diverged: str | None = None) -> Run:
    """A run of eight logged steps with the given mean loss in the last quarter."""
    losses = [9.0] * 6 + [training - 0.5, training + 0.5]
    steps = [{"loss": loss, "tokens": 10 * i} for i, loss in enumerate(losses, start=1)]
    evaluations = [{"held_out_loss": 7.0}, {"held_out_loss": held_out}]
    end = {"diverged": diverged, "answers": {"accuracy": held_out / 10}, "health": {}}
    return Run({"seed": seed}, steps, evaluations, end)


def ablation(expected: Expected = "higher", **changes: object) -> Ablation:
    arms = {"base": Arm(), "other": Arm({}, "+0.1", expected=expected)}
    return Ablation(question="", source="", finding="", arms=arms, **changes)  # type: ignore[arg-type]  # of a test


def other(expected: Expected, base: list[float], ours: list[float]) -> ArmResult:
    runs = {
        "base": {seed: run(seed, value) for seed, value in enumerate(base)},
        "other": {seed: run(seed, value) for seed, value in enumerate(ours)},
    }
    return compare(ablation(expected), runs)[1]


def test_the_interval_is_students_t() -> None:
    result = interval([1.0, 2.0, 3.0])
    assert result.mean == pytest.approx(2.0)
    # t = 4.302653 for two degrees of freedom, s = 1.
    assert result.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not result.excludes_zero
    assert interval([1.9, 2.0, 2.1]).excludes_zero


def test_one_pair_has_no_interval_and_is_never_above_noise() -> None:
    result = interval([5.0])
    assert math.isnan(result.half_width)
    assert not result.excludes_zero
    assert str(result) == "+5.0000 (one seed)"
    assert str(interval([])) == ""


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert math.isnan(mean_and_deviation([])[0])


@pytest.mark.parametrize(
    ("expected", "ours", "verdict"),
    [
        ("higher", [4.1, 5.1, 6.1], "same sign"),
        ("lower", [4.1, 5.1, 6.1], "opposite sign"),
        ("lower", [3.9, 4.9, 5.9], "same sign"),
        ("higher", [4.5, 4.5, 6.5], "below noise"),
        ("equal", [4.5, 4.5, 6.5], "below noise, as expected"),
        ("equal", [4.1, 5.1, 6.1], "higher, though equal in the paper"),
        ("not stated", [3.9, 4.9, 5.9], "lower, above noise"),
        ("not stated", [4.5, 4.5, 6.5], "below noise"),
        ("higher", [4.1], "too few seeds"),
        ("higher", [], "not run"),
    ],
)
def test_verdicts(expected: Expected, ours: list[float], verdict: str) -> None:
    """Noise is shared by pairs: losses differ by 1 between seeds, and by 0.1 between arms."""
    assert other(expected, [4.0, 5.0, 6.0], ours).verdict == verdict


def test_runs_are_paired_by_seed() -> None:
    runs = {
        "base": {0: run(0, 4.0), 2: run(2, 6.0)},
        "other": {1: run(1, 9.0), 2: run(2, 6.5), 0: run(0, 4.5)},
    }
    _, result = compare(ablation(), runs)
    assert result.difference.pairs == 2
    assert result.difference.mean == pytest.approx(0.5)
    assert result.values == {0: 4.5, 1: 9.0, 2: 6.5}


@pytest.mark.parametrize(
    ("expected", "verdict"),
    [("higher", "diverges (1 of 2), same sign"), ("lower", "diverges (1 of 2)")],
)
def test_a_diverged_run_has_a_verdict_but_no_loss(expected: Expected, verdict: str) -> None:
    runs = {
        "base": {0: run(0, 4.0), 1: run(1, 5.0)},
        "other": {0: run(0, 4.5), 1: run(1, math.nan, diverged="step 3")},
    }
    _, result = compare(ablation(expected), runs)
    assert (result.verdict, result.values, result.difference.pairs) == (verdict, {0: 4.5}, 1)


def test_the_training_loss_is_compared_by_quarters() -> None:
    assert quarter_means(run(0, 4.0, training=2.0)) == pytest.approx([9.0, 9.0, 9.0, 2.0])
    assert quarter_means(run(0, 4.0, diverged="step 3")) is None
    runs = {"base": {0: run(0, 4.0)}, "other": {0: run(0, 4.0, training=3.5)}}
    _, result = compare(ablation(), runs)
    assert [quarter.mean for quarter in result.quarters] == pytest.approx([0.0, 0.0, 0.0, 2.5])


@pytest.mark.parametrize(("measure", "value"), [("decay_gain", 3.0), ("answer_accuracy", 0.4)])
def test_measures(measure: str, value: float) -> None:
    base, _ = compare(ablation(measure=measure), {"base": {0: run(0, 4.0)}})
    assert base.values == {0: pytest.approx(value)}
    assert base.verdict == ""


def test_an_arm_may_be_compared_with_an_arm_other_than_the_baseline() -> None:
    arms = {"a": Arm(), "b": Arm(), "c": Arm({}, "+", expected="higher", versus="b")}
    entry = Ablation(question="", source="", finding="", arms=arms)
    runs = {name: {0: run(0, value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 5.0))}
    a, b, c = compare(entry, runs)
    assert c.difference.mean == pytest.approx(3.0)
    # b has a difference, but the paper has none to compare with.
    assert (a.verdict, b.verdict, b.difference.mean) == ("", "", 1.0)
