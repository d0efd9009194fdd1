"""Standard benchmarks through EleutherAI's lm-evaluation-harness (extra `eval`).

What the harness asks is answered here, in tokens; `harness` is the only module that imports it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2 import files, tables
from umv2.config.schema import Interval, UserError, nearest_name, reject, require
from umv2.evaluation.scoring import Scorer, ScoringBatch
from umv2.inference.decode import Generator, occurrences, padded_length
from umv2.inference.sampling import Sampling

TokenPair = tuple[Sequence[int], Sequence[int]]

_DEFAULT_MAX_NEW_TOKENS = 256  # of the harness's Hugging Face backend
# Names for the same, as the harness has them: where there are several, the first counts.
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What is not here, and the value at which it changes nothing.
_WITHOUT_EFFECT = {
    "diversity_penalty": 0,
    "early_stopping": False,
    "encoder_repetition_penalty": 1,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "length_penalty": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "use_cache": True,
}
_WITHOUT_EFFECT_ON_SAMPLES = {
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "min_p": 0,
    "typical_p": 1,
}


def log_likelihoods(
    scorer: Scorer,
    pairs: Sequence[TokenPair],
    *,
    max_length: int,
    batch_size: int,
    fill: int,
) -> list[tuple[float, bool]]:
    """Returns the log-probability of each continuation in nats, and whether it is greedy.

    Continuations are answered longest sequence first, in batches of nearly equal lengths.

    Args:
      scorer: the model.
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
        tokens = [*context, *continuation][-(max_length + 1) :]
        wanted = tokens[max(1, len(tokens) - len(continuation)) :]
        inputs = tokens[:-1] if continuation else tokens
        jobs.append((inputs, range(len(inputs) - len(wanted), len(inputs)), wanted))

    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    num_rows = scorer.padded_rows(batch_size)
    order = sorted(range(len(jobs)), key=lambda number: -len(jobs[number][0]))
    disable = None if logging.level_info() else True
    with tqdm(total=len(jobs), desc="log-likelihoods", unit=" texts", disable=disable) as bar:
        for first in range(0, len(order), num_rows):
            numbers = order[first : first + num_rows]
            group = [jobs[number] for number in numbers]
            batch = ScoringBatch.padded(
                group,
                num_rows=num_rows,
                length=min(padded_length(len(group[0][0])), max(max_length, len(group[0][0]))),
                num_targets=padded_length(max(len(wanted) for _, _, wanted in group)),
                fill=fill,
            )
            exact, likelihood = scorer.score(batch)
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
class GenerationSettings:
    """How a task wants its prompts continued."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of_task(
        cls, given: Mapping[str, Any], *, task: str | None, vocab_size: int, max_length: int
    ) -> "GenerationSettings":
        """Reads `generation_kwargs` as the harness's Hugging Face backend does.

        Settings are those of transformers; numbers may be quoted, and None is as if left out.
        Without `do_sample`, a temperature above 0 asks for samples. Where none are asked for, what
        shapes their distribution has no effect. `top_p=0` leaves the likeliest token alone. A limit
        of `top_k` must be set: by itself there is none, where transformers has one of 50.

        Args:
          given: of the task file.
          task: its name, for messages; None: unknown.
          vocab_size: of the tokenizer.
          max_length: of what the model reads.

        Raises:
          ConfigError: a setting that there is not, or a value that it cannot have.
        """
        path = f"task {task!r}: generation_kwargs." if task else "generation_kwargs."
        settings = {name: value for name, value in given.items() if value is not None}
        stop = _stop_strings(path, settings.pop("until", ()))
        max_new_tokens = _max_new_tokens(path, settings, max_length)
        temperature = settings.pop("temperature", None)
        if temperature is not None:
            temperature = _number(path + "temperature", temperature, float, Interval(0))
        do_sample = _flag(path + "do_sample", settings.pop("do_sample", bool(temperature)))
        shape = {
            name: settings.pop(name)
            for name in ("top_k", "top_p", *_WITHOUT_EFFECT_ON_SAMPLES)
            if name in settings
        }
        _require_without_effect(path, settings, _WITHOUT_EFFECT)
        sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, vocab_size=vocab_size)
        if do_sample:
            require(
                temperature != 0,
                path + "temperature",
                temperature,
                "must be > 0 with do_sample: true; do_sample: false takes the likeliest tokens",
            )
            top_k = _number(path + "top_k", shape.pop("top_k", 0), int, Interval(0))
            top_p = _number(path + "top_p", shape.pop("top_p", 1.0), float, Interval(0, 1))
            _require_without_effect(path, shape, _WITHOUT_EFFECT_ON_SAMPLES)
            if top_p > 0:
                sampling = dataclasses.replace(
                    sampling,
                    temperature=1.0 if temperature is None else temperature,
                    top_k=top_k,
                    top_p=top_p,
                )
        elif shape or temperature:
            names = ", ".join([*(["temperature"] if temperature else []), *shape])
            logging.warning("%s%s: no effect without do_sample: true", path, names)
        return cls(max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)


def _max_new_tokens(path: str, settings: dict[str, Any], max_length: int) -> int:
    """Takes the limit of new tokens out of the settings."""
    given = {name: settings.pop(name) for name in _MAX_NEW_TOKENS if name in settings}
    if "max_length" in settings:
        rule = f"depends on the prompt's length; set {_MAX_NEW_TOKENS[0]}"
        reject(path + "max_length", settings["max_length"], rule)
    limits = {
        name: _number(path + name, value, int, Interval(1)) for name, value in given.items()
    } or {_MAX_NEW_TOKENS[0]: _DEFAULT_MAX_NEW_TOKENS}
    (name, count), *others = limits.items()
    if any(other != count for _, other in others):
        logging.warning("%s%s=%d counts, and not %s", path, name, count, dict(others))
    rule = f"must be less than the {max_length} tokens that the model reads (data.sequence_length)"
    require(count < max_length, path + name, count, rule if given else f"the default {rule}")
    return count


def _stop_strings(path: str, until: Any) -> tuple[str, ...]:
    strings = (until,) if isinstance(until, str) else until
    if not isinstance(strings, list | tuple) or not all(isinstance(x, str) for x in strings):
        reject(path + "until", until, "must be a string or a list of strings")
    return tuple(text for text in strings if text)


def _number(field: str, value: Any, kind: type, interval: Interval) -> Any:
    """Reads a number, quoted or not."""
    try:
        number = kind(value)
        same = isinstance(value, str) or number == value
        good = same and not isinstance(value, bool) and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good or not interval.holds(number):
        what = "a whole number" if kind is int else "a finite number"
        reject(field, value, str(interval).replace("must be", f"must be {what}", 1))
    return number


def _flag(field: str, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        reject(field, value, "must be true or false")
    return value


def _require_without_effect(
    path: str, settings: Mapping[str, Any], harmless: Mapping[str, Any]
) -> None:
    """Rejects settings unless their values change nothing."""
    for name, value in settings.items():
        if name not in harmless:
            known = (*_WITHOUT_EFFECT, *_WITHOUT_EFFECT_ON_SAMPLES, *_MAX_NEW_TOKENS)
            nearest = nearest_name(
                str(name), (*known, "until", "do_sample", "temperature", "top_k", "top_p")
            )
            reject(f"{path}{name}", value, f"unknown setting{nearest}")
        try:
            same = float(value) == harmless[name]
        except (TypeError, ValueError):
            same = False
        require(same, path + name, value, f"not supported but for {harmless[name]}, no effect")


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A context in tokens, one at least, that a task wants continued."""

    task: str | None
    context: tuple[int, ...]
    settings: GenerationSettings


def continuations(
    generator: Generator, requests: Sequence[GenerationRequest], *, batch_size: int
) -> list[str]:
    """Returns the text that follows each context, up to end-of-text or a stop string.

    Equal requests of a task, such as its `repeats`, get different samples: the first gets sample 0
    of its context, whatever else is asked for and in whichever batches.

    Args:
      generator: the model.
      requests: of any tasks.
      batch_size: contexts continued together; the longest come first.
    """
    samples = occurrences(requests)
    groups: dict[GenerationSettings, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.settings, []).append(number)
    texts = [""] * len(requests)
    disable = None if logging.level_info() else True
    with tqdm(total=len(requests), desc="generation", unit=" texts", disable=disable) as bar:
        for settings, members in groups.items():
            order = sorted(members, key=lambda number: -len(requests[number].context))
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                written = generator.complete(
                    [requests[number].context for number in batch],
                    max_new_tokens=settings.max_new_tokens,
                    stop=settings.stop,
                    sampling=settings.sampling,
                    samples=[samples[number] for number in batch],
                )
                for number, text in zip(batch, written, strict=True):
                    texts[number] = text
                bar.update(len(batch))
    return texts


@dataclasses.dataclass(frozen=True)
class DownstreamReport:
    """What the harness found for one checkpoint."""

    step: int
    results: dict[str, Any]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON; None where there is no number, which JSON cannot write."""
        return {"step": self.step} | _plain(self.results)

    def rows(self) -> list[tuple[str, str, float, float | None, int]]:
        """Returns (task, metric, value, standard error, examples) of every figure."""
        found = []
        counts = self.results["n-samples"]
        for task, figures in self.results["results"].items():
            for name, value in figures.items():
                metric, comma, kind = name.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                    continue
                error = figures.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, numbers.Real) else None
                count = counts.get(task, {}).get("effective", 0)
                found.append((task, metric, float(value), error, count))
        return found

    def table(self) -> str:
        """Returns the figures as lines of text."""
        heading = tables.paragraph(
            f"lm-evaluation-harness {self.results['versions']['lm_eval']} after step {self.step:,}"
        )
        figures = [
            (task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{count:,}")
            for task, metric, value, error, count in self.rows()
        ]
        titles = ("task", "metric", "value", "std. error", "examples")
        return f"{heading}\n{tables.table([titles, *figures], left=(0, 1))}"

    def write(self, folder: Path) -> None:
        """Writes `downstream.json`.

        Raises:
          FileError: the operating system refuses.
        """
        text = json.dumps(self.metrics(), indent=2, allow_nan=False)
        files.write_text(folder / "downstream.json", text + "\n")


def _plain(value: Any) -> Any:
    """Returns what JSON has for a value, of which a task's results may be any."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def require_harness() -> None:
    """Raises UserError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--suite: tasks of lm-evaluation-harness need the optional extra:"
            " pip install -e '.[eval]'"
        )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "lm_eval")}
