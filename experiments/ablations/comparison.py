"""Results of an ablation from its finished runs: paired differences, intervals and verdicts."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from experiments.ablations.arms import Ablation, Expected
from experiments.ablations.records import Run

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean of paired differences, and the half-width of its 95 % interval (NaN for one pair).

    The interval is Student's, over differences between runs of the same seed: the same seed draws
    the same values for parameters that both arms have, and the same batches.
    """

    mean: float
    half_width: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference exceeds the noise between seeds; never for one pair."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        if not self.pairs:
            return ""
        if math.isnan(self.half_width):
            return f"{self.mean:+.4f} (one seed)"
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and standard deviation of a sample; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def interval(differences: Sequence[float]) -> Interval:
    """Returns the mean of differences and its interval."""
    import scipy.stats

    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    half = math.nan
    if count > 1:
        quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        half = quantile * deviation / math.sqrt(count)
    return Interval(mean, half, count)


def measured(run: Run, measure: str) -> float | None:
    """Returns an ablation's measure of a run; None if the run diverged.

    The held-out loss in nats per token; its drop in the decay, from the first held-out evaluation
    to the last; or the accuracy of answers.
    """
    if run.diverged:
        return None
    match measure:
        case "held_out_loss":
            return run.held_out_losses[-1]
        case "decay_gain":
            return run.held_out_losses[0] - run.held_out_losses[-1]
        case "answer_accuracy":
            return run.answer_accuracy
        case _:
            raise ValueError(f"measure {measure!r}: not one of ablations")


def quarter_means(run: Run) -> list[float] | None:
    """Returns the mean logged training loss of each quarter of a run.

    None if the run diverged or logged nothing.
    """
    if run.diverged or not run.losses:
        return None
    size, losses = max(1, len(run.losses) // 4), run.losses
    starts = [quarter * len(losses) // 4 for quarter in range(4)]
    return [math.fsum(losses[start : start + size]) / size for start in starts]


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """The results of one arm, compared with the arm `versus`.

    `values` are the ablation's measure by seed, `difference` is paired with the other arm by seed,
    and `quarters` are the same for the training loss in each quarter of training.
    """

    name: str
    versus: str
    paper: str
    expected: Expected
    paper_difference: float | None
    runs: dict[int, Run]
    values: dict[int, float]
    difference: Interval
    quarters: tuple[Interval, ...]
    is_reference: bool

    @property
    def diverged(self) -> list[int]:
        """Seeds of the runs that diverged."""
        return [seed for seed, run in self.runs.items() if run.diverged]

    @property
    def verdict(self) -> str:
        """How the runs compare with the paper's finding, in a few words."""
        if not self.runs:
            return "not run"
        if self.is_reference:
            return ""
        if self.diverged:
            agrees = ", same sign" if self.expected == "higher" else ""
            return f"diverges ({len(self.diverged)} of {len(self.runs)}){agrees}"
        if self.difference.pairs < 2:
            return "too few seeds"
        observed = "equal"
        if self.difference.excludes_zero:
            observed = "higher" if self.difference.mean > 0 else "lower"
        return _verdict(self.expected, observed)


def _verdict(expected: Expected, observed: str) -> str:
    """Compares the expected with the observed sign; `equal` is a difference below noise."""
    match expected, observed:
        case "equal", "equal":
            return "below noise, as expected"
        case "equal", _:
            return f"{observed}, though equal in the paper"
        case _, "equal":
            return "below noise"
        case "not stated", _:
            return f"{observed}, above noise"
        case _:
            return "same sign" if observed == expected else "opposite sign"


def _quarter(run: Run, index: int) -> float | None:
    means = quarter_means(run)
    return None if means is None else means[index]


def compare(ablation: Ablation, runs: dict[str, dict[int, Run]]) -> list[ArmResult]:
    """Returns the results of an ablation's arms from its runs by arm and seed."""

    def by_seed(arm: str, get: Any) -> dict[int, float]:
        values = {seed: get(run) for seed, run in sorted(runs.get(arm, {}).items())}
        return {s: v for s, v in values.items() if v is not None and math.isfinite(v)}

    def get_measure(run: Run) -> float | None:
        return measured(run, ablation.measure)

    def paired(arm: str, versus: str, get: Any) -> Interval:
        ours, theirs = by_seed(arm, get), by_seed(versus, get)
        return interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    results = []
    for name, arm in ablation.arms.items():
        versus = ablation.versus(name)
        results.append(
            ArmResult(
                name=name,
                versus=versus,
                paper=arm.paper,
                expected=arm.expected,
                paper_difference=arm.paper_difference,
                runs=dict(sorted(runs.get(name, {}).items())),
                values=by_seed(name, get_measure),
                difference=paired(name, versus, get_measure),
                quarters=tuple(
                    paired(name, versus, functools.partial(_quarter, index=index))
                    for index in range(4)
                ),
                is_reference=name == versus or not arm.paper,
            )
        )
    return results
