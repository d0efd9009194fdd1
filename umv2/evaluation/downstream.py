"""Standard benchmarks through EleutherAI's lm-evaluation-harness (extra `eval`).

What the harness asks is answered here, in tokens; `harness` is the only module that imports it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2.evaluation.answers import Questions, Respondent
from umv2.inference.decode import padded_length
from umv2.schema import UserError

TokenPair = tuple[Sequence[int], Sequence[int]]


def log_likelihoods(
    respondent: Respondent,
    pairs: Sequence[TokenPair],
    *,
    max_length: int,
    batch_size: int,
    fill: int,
) -> list[tuple[float, bool]]:
    """Returns the log-probability of each continuation in nats, and whether it is greedy.

    Continuations are answered longest sequence first, in batches of nearly equal lengths.

    Args:
      respondent: the model.
      pairs: (context, continuation) in tokens; a context has one token at least.
      max_length: of what the model reads; what does not fit is cut from the left.
      batch_size: sequences a pass, at least.
      fill: token that pads.

    Raises:
      ValueError: a context without a token.
    """
    jobs = []
    for context, continuation in pairs:
        if not context:
            raise ValueError("a context needs a token: end-of-text where there is no text")
        whole = [*context, *continuation][-(max_length + 1) :]
        wanted = whole[max(1, len(whole) - len(continuation)) :]
        inputs = whole[:-1] if continuation else whole
        jobs.append((inputs, range(len(inputs) - len(wanted), len(inputs)), wanted))

    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    num_rows = respondent.rows_that_divide(batch_size)
    order = sorted(range(len(jobs)), key=lambda number: -len(jobs[number][0]))
    disable = None if logging.level_info() else True
    with tqdm(total=len(jobs), desc="log-likelihoods", unit=" texts", disable=disable) as bar:
        for first in range(0, len(order), num_rows):
            numbers = order[first : first + num_rows]
            group = [jobs[number] for number in numbers]
            questions = Questions.lined_up(
                group,
                num_rows=num_rows,
                length=min(padded_length(len(group[0][0])), max(max_length, len(group[0][0]))),
                num_targets=padded_length(max(len(wanted) for _, _, wanted in group)),
                fill=fill,
            )
            exact, likelihood = respondent.answer(questions)
            for row, number in enumerate(numbers):
                count = len(jobs[number][2])
                total = float(likelihood[row, :count].astype(np.float64).sum())
                results[number] = (total, bool(exact[row, :count].all()))
            bar.update(len(numbers))
    return results


def rolling_windows(tokens: Sequence[int], *, prefix: int, max_length: int) -> list[TokenPair]:
    """Cuts a text into (context, continuation) that predict each of its tokens exactly once.

    The first window starts behind `prefix`; each later one is as long as the model reads, and
    begins with what was predicted before it.
    """
    windows: list[TokenPair] = []
    for start in range(0, len(tokens), max_length):
        stop = min(start + max_length, len(tokens))
        # A last window that is short gets more to condition on.
        first = max(0, stop - max_length)
        context = [prefix, *tokens[:start]] if first == 0 else tokens[first - 1 : start]
        windows.append((context, tokens[start:stop]))
    return windows


@dataclasses.dataclass(frozen=True)
class DownstreamReport:
    """What the harness found for one checkpoint."""

    step: int
    results: dict[str, Any]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"step": self.step} | self.results

    def rows(self) -> list[tuple[str, str, float, float | None, int]]:
        """Returns (task, metric, value, standard error, examples) of every figure."""
        found = []
        counts = self.results["n-samples"]
        for task, figures in self.results["results"].items():
            for name, value in figures.items():
                metric, comma, kind = name.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = figures.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, int | float) else None
                count = counts.get(task, {}).get("effective", 0)
                found.append((task, metric, float(value), error, count))
        return found

    def table(self) -> str:
        """Returns the figures as lines of text."""
        lines = [
            f"lm-evaluation-harness {self.results['versions']['lm_eval']} after step {self.step:,}",
            f"  {'task':<28} {'metric':<18} {'value':>10} {'std. error':>11} {'examples':>9}",
        ]
        for task, metric, value, error, count in self.rows():
            spread = "" if error is None else f"{error:.4f}"
            lines.append(f"  {task:<28} {metric:<18} {value:>10.4f} {spread:>11} {count:>9,}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes `downstream.json`."""
        text = json.dumps(self.metrics(), indent=2, default=str)
        (folder / "downstream.json").write_text(text + "\n")


def require_harness() -> None:
    """Raises UserError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--suite: tasks of lm-evaluation-harness need the optional extra:"
            " pip install 'umv2[eval]'"
        )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "lm_eval")}
