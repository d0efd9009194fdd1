"""Our models as lm-evaluation-harness wants them; the only importer of `lm_eval`."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from umv2.data.tokenizers import Tokenizer
from umv2.evaluation import downstream
from umv2.evaluation.answers import Respondent
from umv2.evaluation.downstream import GenerationSettings
from umv2.inference.decode import Generator
from umv2.schema import UserError, nearest_name

# Resamples behind a standard error that has no formula: two digits of it.
_BOOTSTRAP_SAMPLES = 1000


class HarnessModel(TemplateLM):
    """Answers requests of the harness as its Hugging Face backend does for a causal model.

    Text is encoded without a token before it; where there is no context, end-of-text stands for
    it. What is longer than `max_length` is cut from the left.
    """

    def __init__(
        self,
        respondent: Respondent,
        create_generator: Callable[[], Generator],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
    ):
        """Takes a model that answers questions, and what lays it out for writing if it must."""
        super().__init__()
        self._respondent, self._tokenizer = respondent, tokenizer
        self._create_generator = create_generator
        self.max_length, self.batch_size = max_length, batch_size

    @functools.cached_property
    def _generator(self) -> Generator:
        return self._create_generator()

    @property
    def eot_token_id(self) -> int:
        """End-of-text."""
        return self._tokenizer.end_of_text_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text; there are no special tokens to add."""
        del add_special_tokens, kwargs
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        return self._log_likelihoods([(before, after) for _, before, after in requests])

    def _log_likelihoods(self, pairs: Sequence[downstream.TokenPair]) -> list[tuple[float, bool]]:
        return downstream.log_likelihoods(
            self._respondent,
            pairs,
            max_length=self.max_length,
            batch_size=self.batch_size,
            fill=self.eot_token_id,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each whole text."""
        del disable_tqdm
        windows = [
            downstream.rolling_windows(
                self.tok_encode(request.args[0]),
                prefix=self.eot_token_id,
                max_length=self.max_length,
            )
            for request in requests
        ]
        answers = iter(self._log_likelihoods([pair for group in windows for pair in group]))
        return [sum(next(answers)[0] for _ in group) for group in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns what follows each context up to a stop string, greedily unless asked to sample.

        Raises:
          UserError: a request for a way to generate that is not here, or for more tokens than fit.
        """
        del disable_tqdm
        return downstream.completions(
            self._generator,
            [
                (request.args[0], _settings(request.args[1], self._tokenizer, self.max_length))
                for request in requests
            ],
            tokenizer=self._tokenizer,
            max_length=self.max_length,
            batch_size=self.batch_size,
        )


def _settings(given: Any, tokenizer: Tokenizer, max_length: int) -> GenerationSettings:
    return GenerationSettings.of(
        given or {}, max_length=max_length, vocab_size=tokenizer.vocab_size
    )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks of the harness, with their data, and who found them."""

    manager: TaskManager
    members: Sequence[Any]


def load_tasks(
    names: Sequence[str], *, include_path: Path | None, tokenizer: Tokenizer, max_length: int
) -> Tasks:
    """Loads tasks, and checks that we can do what they want.

    Args:
      names: of tasks, of groups, or of tags, which stand for several tasks.
      include_path: folder of local task files.
      tokenizer: of the text.
      max_length: tokens that the model reads.

    Raises:
      UserError: a task that there is not, whose data cannot be had, or that wants text written in
        a way that is not here.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path={include_path}: no such folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--suite: no task {name!r}{nearest_name(name, manager.all_tasks)}")
    members: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except (OSError, ValueError, ImportError, DatasetsError) as error:
            reason = str(error).strip().splitlines() or [repr(error)]
            raise UserError(f"--suite: {name} cannot be loaded: {reason[0]}") from error
        for task in loaded["tasks"].values():
            _check_generation(task.config, tokenizer, max_length)
        group = loaded["groups"].get(name)
        members += loaded["tasks"].values() if group is None else [group]
    return Tasks(manager, members)


def _check_generation(config: Any, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError before any work where a task wants text that we would not write."""
    if config.output_type != "generate_until":
        return
    try:
        settings = _settings(config.generation_kwargs, tokenizer, max_length)
    except UserError as error:
        raise UserError(f"--suite: {config.task}: {error}") from error
    if jax.process_count() > 1:
        raise UserError(f"--suite: {config.task}: text is written by one process alone")
    if config.repeats > 1 and settings.sampling.temperature > 0:
        # A draw depends on a row's number in its batch, so that batches would repeat each other.
        raise UserError(f"--suite: {config.task}: repeats={config.repeats}: only 1 when sampling")


def run(
    model: HarnessModel, tasks: Tasks, *, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Lets a model do tasks of `load_tasks`; returns the harness's figures and settings.

    Args:
      model: who answers.
      tasks: what is asked.
      num_fewshot: examples before each question; None: as the task says.
      limit: questions of each task; None: all.
    """
    # Where it resamples in several processes, the harness forks this one, with JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    # It prints what it does; our standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.members),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    assert found is not None  # every process is the harness's first
    return {key: found[key] for key in ("results", "configs", "n-shot", "n-samples")}
