"""Adapter of our models to lm-evaluation-harness; the only module that imports `lm_eval`."""

import contextlib
import logging as std_logging
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lm_eval
from absl import logging
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import Task, TaskConfig
from lm_eval.tasks import TaskManager

from umv2.config.schema import UserError, nearest_name
from umv2.data.tokenizers import Tokenizer
from umv2.evaluation import downstream
from umv2.evaluation.downstream import DownstreamReport, GenerationRequest, GenerationSettings
from umv2.evaluation.scoring import Scorer
from umv2.inference import decode
from umv2.inference.decode import Generator

_REASON_LENGTH = 500  # maximum number of characters of the reason why a task failed


class HarnessModel(TemplateLM):
    """Answers requests of the harness as its Hugging Face backend does for a causal model.

    Text is encoded without a BOS token; end-of-text replaces an empty context. Sequences longer
    than `max_length` are truncated on the left.
    """

    def __init__(
        self,
        scorer: Scorer,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
    ):
        """Takes one model twice: as a scorer of log-likelihoods and as a text generator."""
        super().__init__()
        self._scorer, self._generator, self._tokenizer = scorer, generator, tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    @property
    def eot_token_id(self) -> int:
        """The id of end-of-text."""
        return self._tokenizer.end_of_text_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text; our tokenizers add no special tokens.

        Raises:
          UserError: the text contains a lone surrogate.
        """
        del add_special_tokens, kwargs
        return decode.encode(self._tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # A whitespace context is empty here: the harness moves whitespace to the continuation.
        start = [self.eot_token_id]
        return self._log_likelihoods(
            [(context or start, continuation) for _, context, continuation in requests]
        )

    def _log_likelihoods(self, pairs: Sequence[downstream.TokenPair]) -> list[tuple[float, bool]]:
        return downstream.log_likelihoods(
            self._scorer,
            pairs,
            max_length=self.max_length,
            batch_size=self.batch_size,
            fill=self.eot_token_id,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text."""
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
        """Continues each context up to a stop string; greedy unless the task asks for samples.

        A sample is a function of the seed (`generate.seed`), the context, and the number of equal
        requests of the same task before it.

        Raises:
          ConfigError: a setting is unknown, has an invalid value, or asks for more tokens than the
            model's context length.
        """
        del disable_tqdm
        settings: dict[tuple[str | None, str], GenerationSettings] = {}
        generations = []
        for request in requests:
            text, given = request.args
            task = getattr(request, "task_name", None)
            key = task, repr(given)
            if key not in settings:
                settings[key] = self.settings(given, task)
            num_tokens = self.max_length - settings[key].max_new_tokens
            context = (self.tok_encode(text) or [self.eot_token_id])[-num_tokens:]
            generations.append(GenerationRequest(task, tuple(context), settings[key]))
        return downstream.continuations(self._generator, generations, batch_size=self.batch_size)

    def settings(self, given: Mapping[str, Any], task: str | None) -> GenerationSettings:
        """Parses a task's `generation_kwargs`; see `GenerationSettings.of_task`."""
        return GenerationSettings.of_task(
            given, task=task, vocab_size=self._tokenizer.vocab_size, max_length=self.max_length
        )


class _TaskManager(TaskManager):
    """Checks tasks when they are loaded, so that a mistake does not surface after hours."""

    def __init__(self, model: HarnessModel, include_path: Path | None):
        super().__init__(include_path=None if include_path is None else str(include_path))
        self._model = model

    def load(self, task_list: Any) -> Any:
        """Loads and checks tasks; before 0.4.12 the harness does not call it: no early checks."""
        loaded = super().load(task_list)
        for name, task in loaded["tasks"].items():
            for metric, aggregation in task.aggregation().items():
                if aggregation is None:
                    raise UserError(f"task {name!r}: metric {metric!r}: unknown aggregation")
            if task.OUTPUT_TYPE == "generate_until":
                self._check_generation(name, task)
        return loaded

    def _check_generation(self, name: str, task: Task) -> None:
        given = task.get_config("generation_kwargs")
        if isinstance(given, Mapping):
            self._model.settings(given, name)
        if task.get_config("process_results") is None:  # otherwise it replaces these functions
            for metric, function in getattr(task, "_metric_fn_list", {}).items():
                if function is None:
                    raise UserError(f"task {name!r}: metric {metric!r}: unknown")


def run(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    step: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> DownstreamReport:
    """Runs tasks of the harness, or local tasks.

    Args:
      model: to evaluate.
      tasks: names.
      step: of the checkpoint, for the report.
      num_fewshot: examples before each question; None: the task's default.
      limit: questions per task; None: all.
      include_path: folder of local task files.

    Raises:
      UserError: a task does not exist, the harness cannot run it, or its data is not available.
    """
    tasks = list(dict.fromkeys(tasks))
    suite = f"--suite={','.join(tasks)}"
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path={include_path}: must be a folder of task files")
    try:
        with _skipped_files() as skipped:
            manager = _TaskManager(model, include_path)
        unusable = [
            f"{path}: {reason}"
            for path, reason in skipped
            if include_path is not None and path.is_relative_to(include_path)
        ]
        for line in unusable:
            logging.warning("skipped task file %s", line)
        for name in tasks:
            if name not in manager.all_tasks:
                reasons = f"; skipped task files: {'; '.join(unusable)}" if unusable else ""
                nearest = nearest_name(name, manager.all_tasks)
                raise UserError(f"--suite: no task {name!r}{nearest}{reasons}")
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:
        # Task files, datasets and metrics raise any type. Do not hide a bug in our own code.
        if _is_ours(error):
            raise
        logging.debug("%s failed", suite, exc_info=True)
        raise UserError(f"{suite}: {_explanation(error)}") from error
    assert results is not None  # on the first process
    selected = {key: results[key] for key in ("results", "configs", "n-shot", "n-samples")}
    return DownstreamReport(step=step, results=selected | {"versions": downstream.versions()})


@contextlib.contextmanager
def _skipped_files() -> Iterator[list[tuple[Path, str]]]:
    """Collects the task files that the harness skips, and why, from its debug logs."""
    skipped: list[tuple[Path, str]] = []
    logger = std_logging.getLogger("lm_eval.tasks._index")
    level, shown = logger.level, logger.getEffectiveLevel()

    def collect(record: std_logging.LogRecord) -> bool:
        match record.args:
            case (Path() as path, Exception() as error):
                skipped.append((path, _reason(error)))
        return record.levelno >= shown

    logger.addFilter(collect)
    logger.setLevel(std_logging.DEBUG)
    try:
        yield skipped
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def _frames(error: Exception) -> list[FrameType]:
    """Returns the stack frames of an error, innermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _is_ours(error: Exception) -> bool:
    """Returns whether our code raised an error, rather than the harness or a task."""
    packages = (frame.f_globals.get("__name__", "").partition(".")[0] for frame in _frames(error))
    return next(package for package in packages if package in ("lm_eval", "umv2")) == "umv2"


def _explanation(error: Exception) -> str:
    """Returns one line that says which task failed, and why."""
    for value in (value for frame in _frames(error) for value in frame.f_locals.values()):
        if isinstance(value, Task | TaskConfig):
            config = value if isinstance(value, TaskConfig) else getattr(value, "config", None)
            if config is not None:
                mistake = _mistake(config, getattr(value, "dataset", None))
                return f"task {config.task!r}: {mistake}{_reason(error)}"
    return f"lm-evaluation-harness: {_reason(error)}"


def _mistake(config: TaskConfig, splits: Any) -> str:
    """Returns what is wrong with a task, for mistakes that the harness reports poorly."""
    if config.dataset_path is None and config.custom_dataset is None:
        return "no dataset_path, which a member of a group needs unless it names a task file: "
    for split in ("training", "validation", "test", "fewshot"):
        name = getattr(config, f"{split}_split")
        if isinstance(splits, Mapping) and name is not None and name not in splits:
            return f"{split}_split={name!r}: the data has {', '.join(map(repr, splits))}: "
    for entry in config.metric_list if isinstance(config.metric_list, list) else ():
        name = entry.get("metric") if isinstance(entry, Mapping) else None
        if isinstance(name, str) and config.process_results is None and name not in METRIC_REGISTRY:
            return f"metric={name!r}: unknown{nearest_name(name, METRIC_REGISTRY)}: "
    return ""


def _reason(error: BaseException) -> str:
    """Returns one line with the message of an error and that of its root cause."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    messages = [f"{type(x).__name__}: {x}" for x in ([error] if root is error else [error, root])]
    return textwrap.shorten("; because of ".join(messages), _REASON_LENGTH, placeholder=" ...")
