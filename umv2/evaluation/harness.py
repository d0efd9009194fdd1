"""Our models as lm-evaluation-harness wants them; the only importer of `lm_eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.tasks import TaskManager

from umv2.data.tokenizers import Tokenizer
from umv2.evaluation import downstream
from umv2.evaluation.answers import Respondent
from umv2.evaluation.downstream import DownstreamReport
from umv2.inference.decode import Generator
from umv2.inference.sampling import Sampling
from umv2.schema import UserError, nearest_name

_MAX_NEW_TOKENS = 256  # of the harness's Hugging Face backend


class HarnessModel(TemplateLM):
    """Answers requests of the harness as its Hugging Face backend does for a causal model.

    Text is encoded without a token before it; where there is no context, end-of-text stands for
    it. What is longer than `max_length` is cut from the left.
    """

    def __init__(
        self,
        respondent: Respondent,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
    ):
        """Takes a model in both its forms: that answers questions, and that writes."""
        super().__init__()
        self._respondent, self._generator, self._tokenizer = respondent, generator, tokenizer
        self.max_length, self.batch_size = max_length, batch_size

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
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._log_likelihoods(pairs)

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
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = dict(requests[numbers[0]].args[1])
            stop = handle_stop_sequences(settings.pop("until", None), eos=None)
            count = int(settings.pop("max_gen_toks", _MAX_NEW_TOKENS))
            if count >= self.max_length:
                raise UserError(
                    f"max_gen_toks={count}: must be less than the {self.max_length} tokens that"
                    " the model reads (data.sequence_length)"
                )
            sampling = self._sampling(settings)
            contexts = {
                number: (self.tok_encode(requests[number].args[0]) or [self.eot_token_id])[
                    -(self.max_length - count) :
                ]
                for number in numbers
            }
            order = sorted(numbers, key=lambda number: -len(contexts[number]))
            for first in range(0, len(order), self.batch_size):
                group = order[first : first + self.batch_size]
                written = self._generator.complete(
                    [contexts[number] for number in group],
                    max_new_tokens=count,
                    stop=[text for text in stop if text],
                    sampling=sampling,
                )
                for number, text in zip(group, written, strict=True):
                    texts[number] = text
        return texts

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Reads what a request says about sampling, in the words of transformers."""
        temperature = float(settings.pop("temperature", None) or 0.0)
        do_sample = settings.pop("do_sample", temperature > 0)
        sampling = Sampling(
            temperature=(temperature or 1.0) if do_sample else 0.0,
            top_k=int(settings.pop("top_k", None) or 0),
            top_p=float(settings.pop("top_p", None) or 1.0),
            vocab_size=self._tokenizer.vocab_size,
        )
        if settings.pop("num_beams", 1) != 1 or settings:
            raise UserError(f"generation settings {settings or 'num_beams'}: there is none such")
        return sampling


def run(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    step: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> DownstreamReport:
    """Runs tasks of the harness, or local ones.

    Args:
      model: who answers.
      tasks: names.
      step: of the checkpoint, for the report.
      num_fewshot: examples before each question; None: as the task says.
      limit: questions of each task; None: all.
      include_path: folder of local task files.

    Raises:
      UserError: a task that there is not, or whose data cannot be had.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"--suite: no task {name!r}{nearest_name(name, manager.all_tasks)}")
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"--suite={','.join(tasks)}: the data cannot be had: {reason}") from error
    assert found is not None  # on the first process
    kept = {key: found[key] for key in ("results", "configs", "n-shot", "n-samples")}
    return DownstreamReport(step=step, results=kept | {"versions": downstream.versions()})
