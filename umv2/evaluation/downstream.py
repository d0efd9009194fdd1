"""Standard benchmarks through EleutherAI's lm-evaluation-harness (extra `eval`).

What the harness asks is answered here, in tokens; `harness` is the only module that imports it.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2.config import Config, to_dict
from umv2.data.tokenizers import Tokenizer
from umv2.evaluation.answers import Questions, Respondent
from umv2.inference.decode import Generator
from umv2.inference.sampling import Sampling
from umv2.schema import UserError

# Lengths of padded sequences are powers of two from here on: few programs serve them all.
_SMALLEST_BUCKET = 32
# What tasks call the most tokens to write; the first that is given counts.
_MAX_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MAX_NEW_TOKENS = 256  # of the harness's Hugging Face backend

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
    num_too_long = sum(len(continuation) > max_length for _, continuation in pairs)
    if num_too_long:
        logging.warning(
            "%d of %d continuations are longer than the %d tokens that the model reads:"
            " of these, the last tokens alone are scored",
            num_too_long,
            len(pairs),
            max_length,
        )
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
                length=min(_bucket(len(group[0][0])), max(max_length, len(group[0][0]))),
                num_targets=_bucket(max(len(wanted) for _, _, wanted in group)),
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
        context = [prefix] if start == 0 else tokens[first - 1 : start]
        windows.append((context, tokens[start:stop]))
    return windows


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a request wants text written: strings that end it, its greatest length, the draw."""

    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], *, max_length: int, vocab_size: int
    ) -> "GenerationSettings":
        """Reads the words of transformers, with the harness's defaults; greedy unless asked.

        Args:
          settings: `generation_kwargs` of a task.
          max_length: tokens that the model reads.
          vocab_size: of the tokenizer.

        Raises:
          UserError: for a way to write that is not here, or for more tokens than fit.
        """
        left = dict(settings)
        until = left.pop("until", None) or ()
        counts = [left.pop(name, None) for name in _MAX_NEW_TOKENS_NAMES]
        count = int(next((given for given in counts if given is not None), _MAX_NEW_TOKENS))
        if not 0 < count < max_length:
            raise UserError(
                f"max_gen_toks={count}: must be more than 0 and less than the {max_length} tokens"
                " that the model reads (data.sequence_length)"
            )
        temperature = float(left.pop("temperature", None) or 0.0)
        samples = left.pop("do_sample", None)
        if samples is None:
            samples = temperature > 0
        sampling = Sampling(
            temperature=(temperature or 1.0) if samples else 0.0,
            top_k=int(left.pop("top_k", None) or 0),
            top_p=float(left.pop("top_p", None) or 1.0),
            vocab_size=vocab_size,
        )
        if left.get("num_beams") == 1:
            del left["num_beams"]
        if left:
            raise UserError(f"generation_kwargs {left}: there is none such here")
        stop = (until,) if isinstance(until, str) else tuple(until)
        return cls(tuple(text for text in stop if text), count, sampling)


def completions(
    generator: Generator,
    requests: Sequence[tuple[str, GenerationSettings]],
    *,
    tokenizer: Tokenizer,
    max_length: int,
    batch_size: int,
) -> list[str]:
    """Returns what follows each context; those of equal settings are written together.

    Args:
      generator: the model.
      requests: contexts, and how each is continued.
      tokenizer: of the text; end-of-text stands for a context that is empty.
      max_length: of context and continuation; a context that leaves no room is cut from the left.
      batch_size: contexts that are continued at once.
    """
    encoded: list[list[int]] = []
    members: dict[GenerationSettings, list[int]] = {}
    for number, (context, settings) in enumerate(requests):
        ids = tokenizer.encode(context).tolist() or [tokenizer.end_of_text_id]
        encoded.append(ids[-(max_length - settings.max_new_tokens) :])
        members.setdefault(settings, []).append(number)
    texts = [""] * len(requests)
    disable = None if logging.level_info() else True
    with tqdm(total=len(requests), desc="completions", unit=" texts", disable=disable) as bar:
        for settings, numbers_of_settings in members.items():
            order = sorted(numbers_of_settings, key=lambda number: -len(encoded[number]))
            for first in range(0, len(order), batch_size):
                group = order[first : first + batch_size]
                written = generator.complete(
                    [encoded[number] for number in group],
                    max_new_tokens=settings.max_new_tokens,
                    stop=settings.stop,
                    sampling=settings.sampling,
                )
                for number, text in zip(group, written, strict=True):
                    texts[number] = text
                bar.update(len(group))
    return texts


def _bucket(length: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class DownstreamReport:
    """What the harness found for one checkpoint, and the versions that it depends on."""

    step: int
    config_hash: str
    results: dict[str, Any]
    versions: dict[str, str]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        own = {"step": self.step, "config_hash": self.config_hash, "versions": self.versions}
        return own | json.loads(json.dumps(self.results, default=_plain))

    def rows(self) -> list[tuple[str, str, float, float | None, int | None]]:
        """Returns (task, metric, value, standard error, examples) of every figure.

        A group of tasks has no number of examples.
        """
        found = []
        counts = self.results["n-samples"]
        for task, figures in self.results["results"].items():
            for name, value in figures.items():
                metric, comma, kind = name.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                    continue
                error = figures.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, numbers.Real) else None
                count = counts[task]["effective"] if task in counts else None
                found.append((task, metric, float(value), error, count))
        return found

    def table(self) -> str:
        """Returns the figures as lines of text."""
        rows = [("task", "metric", "value", "std. error", "examples")]
        for task, metric, value, error, count in self.rows():
            number = "" if count is None else f"{count:,}"
            rows.append((task, metric, _figure(value), _figure(error), number))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"lm-evaluation-harness {self.versions['lm_eval']} after step {self.step:,}"]
        for row in rows:
            names = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
            figures = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
            lines.append(("  " + "  ".join(names + figures)).rstrip())
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes `downstream.json`."""
        (folder / "downstream.json").write_text(json.dumps(self.metrics(), indent=2) + "\n")


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _plain(value: Any) -> Any:
    """Returns numpy's numbers as Python's, and what else a task's settings hold as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def config_hash(config: Config) -> str:
    """Returns 12 digits that are equal for equal configurations."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
