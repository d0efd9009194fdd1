"""Scores a model on the long-context suite: exact match and log-likelihood, with heat maps.

An answer is exact if each of its tokens is the most likely one given the true tokens before it,
i.e. if greedy decoding would generate it.
"""

import dataclasses
import importlib.metadata
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from umv2 import files, pictures, tables
from umv2.config import Config, LongContextConfig, ModelConfig
from umv2.data.long_context import TASKS, Example, make_example
from umv2.data.tokenizers import Tokenizer
from umv2.evaluation.scoring import Scorer, ScoringBatch

_DEPTH_BINS = 5
_NORMAL_95 = 1.959964


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one answer; `log_likelihood` is in nats, summed over its `num_tokens`."""

    task: str
    length: int
    example: int
    depth: float
    chance: float
    exact: bool
    log_likelihood: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """Summary of one task at one length.

    `low` and `high` are the Wilson 95 % interval of the accuracy; the sample size is the number of
    examples, because answers within an example are not independent.
    """

    num_answers: int
    accuracy: float
    low: float
    high: float
    chance: float
    nats_per_token: float

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Cell":
        """Summarises the answers of one task at one length."""
        accuracy = float(np.mean([score.exact for score in scores]))
        num_examples = len({score.example for score in scores})
        low, high = wilson_interval(accuracy, num_examples)
        tokens = sum(score.num_tokens for score in scores)
        return cls(
            num_answers=len(scores),
            accuracy=accuracy,
            low=low,
            high=high,
            chance=float(np.mean([score.chance for score in scores])),
            nats_per_token=-sum(score.log_likelihood for score in scores) / tokens,
        )


def depth_bin(depth: float) -> int:
    """Returns the bin, of equal width, that the relative depth of an evidence falls into."""
    return min(int(depth * _DEPTH_BINS), _DEPTH_BINS - 1)


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a fraction observed in `count` trials (Wilson 1927)."""
    z = _NORMAL_95
    center = fraction + z * z / (2 * count)
    half = z * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


@dataclasses.dataclass(frozen=True)
class LongContextReport:
    """All answers of one checkpoint."""

    step: int
    trained_length: int
    extrapolation: str
    scores: tuple[Score, ...]

    def cells(self) -> dict[tuple[str, int], Cell]:
        """Returns the summary of each (task, length)."""
        keys = sorted({(s.task, s.length) for s in self.scores}, key=_order)
        return {key: Cell.of([s for s in self.scores if (s.task, s.length) == key]) for key in keys}

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON; None replaces non-finite values, which JSON lacks."""
        return {
            "step": self.step,
            "trained_length": self.trained_length,
            "extrapolation": self.extrapolation,
            "cells": [
                {"task": task, "length": length} | _json_values(cell)
                for (task, length), cell in self.cells().items()
            ],
        }

    def table(self, width: int | None = None) -> str:
        """Returns accuracies in percent, with 95 % intervals, as a text table.

        Args:
          width: maximum number of columns; None: the width of the terminal.
        """
        rows = [("  task", "tokens", "exact", "interval", "chance", "nats/token", "answers")]
        for (task, length), cell in self.cells().items():
            interval = f"{100 * cell.low:.1f} - {100 * cell.high:.1f}"
            percentages = f"{100 * cell.accuracy:.1f}", interval, f"{100 * cell.chance:.1f}"
            nats, answers = f"{cell.nats_per_token:.3f}", f"{cell.num_answers:,}"
            rows.append((f"  {task}", f"{length:,}", *percentages, nats, answers))
        heading = (
            f"long-context suite after step {self.step:,}: exact answers in %, 95 % interval;"
            f" trained at {self.trained_length:,} tokens, beyond: {self.extrapolation}"
        )
        return f"{tables.paragraph(heading, width)}\n{tables.table(rows, width)}"

    def write(self, folder: Path, config: Config) -> None:
        """Writes `long_context.jsonl` (a header, then one answer per line) and `long_context.png`.

        Raises:
          FileError: a file cannot be written; the table is logged then.
        """
        heading = {
            "step": self.step,
            "trained_length": self.trained_length,
            "extrapolation": self.extrapolation,
            "settings": dataclasses.asdict(config.evaluation.long_context),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        records = [heading, *map(_json_values, self.scores)]
        lines = (json.dumps(record, allow_nan=False) for record in records)
        try:
            files.write_text(folder / "long_context.jsonl", "\n".join(lines) + "\n")
            draw_heat_maps(self.scores, folder / "long_context.png")
        except files.FileError:
            logging.error("%s", self.table())
            raise


def evaluate(
    config: Config,
    scorer: Scorer,
    *,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    step: int,
) -> LongContextReport:
    """Evaluates a model on the tasks and lengths of `config.evaluation.long_context`.

    Args:
      config: of the run.
      scorer: the model.
      tokenizer: of the text.
      texts: documents to draw filler from; not training documents.
      step: of the checkpoint, for the report.
    """
    settings = config.evaluation.long_context
    scores: list[Score] = []
    jobs = [(task, length) for length in settings.lengths for task in settings.tasks]
    disable = None if logging.level_info() else True
    with tqdm(jobs, "long context", unit=" cells", disable=disable) as bar:
        for task, length in bar:
            bar.set_postfix_str(f"{task} {length}")
            examples = [
                make_example(
                    TASKS[task],
                    "evaluation",
                    settings.seed,
                    index,
                    length=length - 1,  # end-of-text precedes it
                    tokenizer=tokenizer,
                    texts=texts,
                )
                for index in range(settings.num_examples)
            ]
            scores += _scores(
                scorer,
                extrapolated(config, length),
                examples,
                task,
                length,
                settings,
                tokenizer.end_of_text_id,
            )
    return LongContextReport(
        step=step,
        trained_length=config.data.sequence_length,
        extrapolation=settings.extrapolation,
        scores=tuple(scores),
    )


def extrapolated(config: Config, length: int) -> ModelConfig:
    """Returns the model configuration for sequences of a length, possibly beyond training."""
    model, trained = config.model, config.data.sequence_length
    extrapolation = config.evaluation.long_context.extrapolation
    if length <= trained or extrapolation == "none":
        return model
    if extrapolation == "window":
        return dataclasses.replace(model, attention_window=trained)
    return dataclasses.replace(model, rope_scaling=extrapolation, rope_scale=length / trained)


def _scores(
    scorer: Scorer,
    model_config: ModelConfig,
    examples: Sequence[Example],
    task: str,
    length: int,
    settings: LongContextConfig,
    end_of_text_id: int,
) -> Iterator[Score]:
    """Scores the answers of one task at one length, in batches of about `batch_tokens`."""
    batch_size = scorer.padded_rows(max(1, settings.batch_tokens // length))
    positions = [[i for a in e.answers for i in range(a.start, a.stop)] for e in examples]
    for first in range(0, len(examples), batch_size):
        group = examples[first : first + batch_size]
        # End-of-text precedes a document, as in training, so position i of the input predicts
        # token i of the document.
        rows = [
            ([end_of_text_id, *example.tokens.tolist()], scored, example.tokens[scored].tolist())
            for example, scored in zip(group, positions[first : first + batch_size], strict=True)
        ]
        batch = ScoringBatch.padded(
            rows,
            num_rows=batch_size,
            length=length,
            num_targets=max(map(len, positions)),
            fill=end_of_text_id,
        )
        exact, likelihood = scorer.score(batch, model_config)
        for row, example in enumerate(group):
            column = 0
            for answer in example.answers:
                tokens = slice(column, column := column + answer.stop - answer.start)
                yield Score(
                    task=task,
                    length=length,
                    example=first + row,
                    depth=answer.depth,
                    chance=answer.chance,
                    exact=bool(exact[row, tokens].all()),
                    log_likelihood=float(likelihood[row, tokens].sum()),
                    num_tokens=answer.stop - answer.start,
                )


def draw_heat_maps(scores: Sequence[Score], image: Path) -> None:
    """Draws a heat map of the accuracy of each task, by length and by depth of the evidence.

    Raises:
      FileError: the file cannot be written.
    """
    exact: dict[str, dict[tuple[int, int], list[bool]]] = defaultdict(lambda: defaultdict(list))
    chances: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        exact[score.task][score.length, depth_bin(score.depth)].append(score.exact)
        chances[score.task].append(score.chance)
    percent = {
        task: {cell: 100 * float(np.mean(values)) for cell, values in cells.items()}
        for task, cells in exact.items()
    }
    chance = {task: 100 * float(np.mean(values)) for task, values in chances.items()}
    draw_accuracies(percent, chance, image)


def draw_accuracies(
    percent: Mapping[str, Mapping[tuple[int, int], float]],
    chance: Mapping[str, float],
    image: Path,
) -> None:
    """Draws accuracies as one heat map per task; draws nothing if there are none.

    Args:
      percent: accuracy in percent by task, then by (length, depth bin); empty cells may be missing.
      chance: in percent, by task.
      image: file to write.

    Raises:
      FileError: the file cannot be written.
    """
    if not percent:
        return
    tasks = sorted(percent, key=list(TASKS).index)
    lengths = sorted({length for cells in percent.values() for length, _ in cells})
    num_columns = min(4, len(tasks))
    num_rows = math.ceil(len(tasks) / num_columns)
    width = max(2.3, 0.55 * len(lengths)) * num_columns + 1.5
    figure = pictures.new(width, 2.9 * num_rows + 0.3)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        cells = np.full((_DEPTH_BINS, len(lengths)), np.nan)
        for (length, depth), value in percent[task].items():
            column = lengths.index(length)
            cells[depth, column] = value
            # Both ends of the scale are dark.
            color = "black" if 15 < value < 85 else "white"
            style: dict[str, Any] = {"ha": "center", "va": "center", "size": 8, "color": color}
            axes.text(column, depth, f"{value:.0f}", **style)
        picture = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{task}\nchance {chance[task]:.0f} %", fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        axes.tick_params(axis="x", labelrotation=45 if len(lengths) > 4 else 0)
    edges = [
        f"{100 * i // _DEPTH_BINS}-{100 * (i + 1) // _DEPTH_BINS} %" for i in range(_DEPTH_BINS)
    ]
    for axes in grid[:, 0]:
        axes.set_yticks(range(_DEPTH_BINS), edges)
    figure.supylabel("depth of the evidence", fontsize=10)
    figure.supxlabel("length, tokens", fontsize=10)
    figure.colorbar(picture, ax=list(grid.flat), label="exact answers, %", shrink=0.9)
    pictures.save(figure, image)


def _json_values(record: Score | Cell) -> dict[str, Any]:
    return files.json_value(dataclasses.asdict(record))


def _order(key: tuple[str, int]) -> tuple[int, int]:
    return list(TASKS).index(key[0]), key[1]
