"""Standard benchmarks through EleutherAI's lm-evaluation-harness (extra `eval`).

This module answers the harness's requests on the level of tokens; only `harness` imports it.
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
# The harness's names of this limit; if several are set, the first one counts.
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings that we do not support, and the value at which each has no effect.
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

    Scores the longest sequences first, in batches of similar lengths.

    Args:
      scorer: the model.
      pairs: (context, continuation) in tokens; a context has at least one token.
      max_length: maximum number of input tokens; longer sequences are truncated on the left.
      batch_size: minimum number of sequences per pass.
      fill: padding token.

    Raises:
      ValueError: a context is empty.
    """
    jobs = []
    for context, continuation in pairs:
        if not context:
            raise ValueError("a context needs at least one token, e.g. end-of-text")
        tokens = [*context, *continuation][-(max_length + 1) :]
        targets = tokens[max(1, len(tokens) - len(continuation)) :]
        inputs = tokens[:-1] if continuation else tokens
        jobs.append((inputs, range(len(inputs) - len(targets), len(inputs)), targets))

    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    num_rows = scorer.padded_rows(batch_size)
    order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index][0]))
    disable = None if logging.level_info() else True
    with tqdm(total=len(jobs), desc="log-likelihoods", unit=" texts", disable=disable) as bar:
        for first in range(0, len(order), num_rows):
            indices = order[first : first + num_rows]
            group = [jobs[index] for index in indices]
            batch = ScoringBatch.padded(
                group,
                num_rows=num_rows,
                length=min(padded_length(len(group[0][0])), max(max_length, len(group[0][0]))),
                num_targets=padded_length(max(len(targets) for _, _, targets in group)),
                fill=fill,
            )
            exact, likelihood = scorer.score(batch)
            for row, index in enumerate(indices):
                count = len(jobs[index][2])
                total = float(likelihood[row, :count].astype(np.float64).sum())
                results[index] = (total, bool(exact[row, :count].all()))
            bar.update(len(indices))
    return results


def rolling_windows(tokens: Sequence[int], *, prefix: int, max_length: int) -> list[TokenPair]:
    """Cuts a text into (context, continuation) pairs that predict each token exactly once.

    The first window is conditioned on `prefix`, each later one on the token before it. A short last
    window gets more context, so that all later windows have full length.
    """
    windows: list[TokenPair] = []
    for start in range(0, len(tokens), max_length):
        stop = min(start + max_length, len(tokens))
        # A short last window gets more context.
        first = max(0, stop - max_length)
        context = [prefix, *tokens[:start]] if first == 0 else tokens[first - 1 : start]
        windows.append((context, tokens[start:stop]))
    return windows


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How to continue the prompts of a task."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of_task(
        cls, given: Mapping[str, Any], *, task: str | None, vocab_size: int, max_length: int
    ) -> "GenerationSettings":
        """Parses `generation_kwargs` as the harness's Hugging Face backend does.

        Settings are those of transformers; numbers may be strings, and None means not set. Without
        `do_sample`, a temperature above 0 enables sampling. Without sampling, settings that shape
        the distribution have no effect. `top_p=0` keeps only the most likely token. The default of
        `top_k` is no limit, whereas that of transformers is 50.

        Args:
          given: `generation_kwargs` of the task file.
          task: its name, for messages; None: unknown.
          vocab_size: of the tokenizer.
          max_length: context length of the model.

        Raises:
          ConfigError: a setting is unknown or has an invalid value.
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
                "must be > 0 with do_sample: true; use do_sample: false for greedy decoding",
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
    """Removes the limit of new tokens from the settings and returns it."""
    given = {name: settings.pop(name) for name in _MAX_NEW_TOKENS if name in settings}
    if "max_length" in settings:
        rule = f"depends on the prompt's length; set {_MAX_NEW_TOKENS[0]}"
        reject(path + "max_length", settings["max_length"], rule)
    limits = {
        name: _number(path + name, value, int, Interval(1)) for name, value in given.items()
    } or {_MAX_NEW_TOKENS[0]: _DEFAULT_MAX_NEW_TOKENS}
    (name, count), *others = limits.items()
    if any(other != count for _, other in others):
        logging.warning("%s%s=%d takes precedence over %s", path, name, count, dict(others))
    rule = f"must be less than the model's {max_length} tokens (data.sequence_length)"
    require(count < max_length, path + name, count, rule if given else f"the default {rule}")
    return count


def _stop_strings(path: str, until: Any) -> tuple[str, ...]:
    strings = (until,) if isinstance(until, str) else until
    if not isinstance(strings, list | tuple) or not all(isinstance(x, str) for x in strings):
        reject(path + "until", until, "must be a string or a list of strings")
    return tuple(text for text in strings if text)


def _number(field: str, value: Any, kind: type, interval: Interval) -> Any:
    """Parses a number, which may be a string."""
    try:
        number = kind(value)
        same = isinstance(value, str) or number == value
        good = same and not isinstance(value, bool) and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good or not interval.holds(number):
        what = "an integer" if kind is int else "a finite number"
        reject(field, value, str(interval).replace("must be", f"must be {what}", 1))
    return number


def _flag(field: str, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        reject(field, value, "must be true or false")
    return value


def _require_without_effect(
    path: str, settings: Mapping[str, Any], neutral: Mapping[str, Any]
) -> None:
    """Rejects settings unless their values have no effect."""
    for name, value in settings.items():
        if name not in neutral:
            known = (*_WITHOUT_EFFECT, *_WITHOUT_EFFECT_ON_SAMPLES, *_MAX_NEW_TOKENS)
            nearest = nearest_name(
                str(name), (*known, "until", "do_sample", "temperature", "top_k", "top_p")
            )
            reject(f"{path}{name}", value, f"unknown setting{nearest}")
        try:
            same = float(value) == neutral[name]
        except (TypeError, ValueError):
            same = False
        rule = f"not supported; only {neutral[name]}, which has no effect, is accepted"
        require(same, path + name, value, rule)


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A context of at least one token to continue, and how."""

    task: str | None
    context: tuple[int, ...]
    settings: GenerationSettings


def continuations(
    generator: Generator, requests: Sequence[GenerationRequest], *, batch_size: int
) -> list[str]:
    """Returns the continuation of each context, up to end-of-text or a stop string.

    Equal requests of a task, such as its `repeats`, get different samples: the first one gets
    sample 0 of its context, whatever the other requests and the batches.

    Args:
      generator: the model.
      requests: of any tasks.
      batch_size: contexts per batch; the longest come first.
    """
    samples = occurrences(requests)
    groups: dict[GenerationSettings, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.settings, []).append(index)
    texts = [""] * len(requests)
    disable = None if logging.level_info() else True
    with tqdm(total=len(requests), desc="generation", unit=" texts", disable=disable) as bar:
        for settings, members in groups.items():
            order = sorted(members, key=lambda index: -len(requests[index].context))
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                generated = generator.complete(
                    [requests[index].context for index in batch],
                    max_new_tokens=settings.max_new_tokens,
                    stop=settings.stop,
                    sampling=settings.sampling,
                    samples=[samples[index] for index in batch],
                )
                for index, text in zip(batch, generated, strict=True):
                    texts[index] = text
                bar.update(len(batch))
    return texts


@dataclasses.dataclass(frozen=True)
class DownstreamReport:
    """The harness's results for one checkpoint."""

    step: int
    results: dict[str, Any]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON; None replaces non-finite values, which JSON lacks."""
        return {"step": self.step} | _plain(self.results)

    def rows(self) -> list[tuple[str, str, float, float | None, int]]:
        """Returns (task, metric, value, standard error, number of examples) of every metric."""
        rows = []
        counts = self.results["n-samples"]
        for task, metrics in self.results["results"].items():
            for name, value in metrics.items():
                metric, comma, filter_name = name.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                    continue
                error = metrics.get(f"{metric}_stderr,{filter_name}")
                error = float(error) if isinstance(error, numbers.Real) else None
                count = counts.get(task, {}).get("effective", 0)
                rows.append((task, metric, float(value), error, count))
        return rows

    def table(self) -> str:
        """Returns the metrics as a text table."""
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
          FileError: the file cannot be written.
        """
        text = json.dumps(self.metrics(), indent=2, allow_nan=False)
        files.write_text(folder / "downstream.json", text + "\n")


def _plain(value: Any) -> Any:
    """Converts a value of any type, as results of tasks contain them, to one that JSON has."""
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
    """Raises UserError if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--suite: tasks of lm-evaluation-harness require the optional extra:"
            " pip install -e '.[eval]'"
        )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "lm_eval")}
