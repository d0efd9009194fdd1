"""Tasks of lm-evaluation-harness on an untrained model: samples, and errors in tasks."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the harness is imported
pytest.importorskip("lm_eval", reason="needs the extra eval, which CI does not install")

import lm_eval.tasks.manager
from lm_eval.api.instance import Instance

from tests import meshes, tiny_run
from tests.model.drawn import drawn_weights
from umv2.config.schema import UserError
from umv2.data.tokenizers import ByteTokenizer
from umv2.evaluation import harness
from umv2.evaluation.scoring import Scorer
from umv2.inference.decode import Generator

GENERATION = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}'
TASK = f"""
task: t
dataset_path: json
dataset_kwargs: {{data_files: {{test: FOLDER/data.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{GENERATION}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@functools.cache
def model(batch_size: int = 4) -> harness.HarnessModel:
    config = tiny_run.tiny_config("unused")
    weights, mesh = drawn_weights(config.model), meshes.create()
    tokenizer = ByteTokenizer()
    return harness.HarnessModel(
        Scorer(config.model, meshes.replicate(weights, mesh), mesh),
        Generator(config.model, weights, tokenizer=tokenizer, config=config.generate),
        tokenizer,
        max_length=64,
        batch_size=batch_size,
    )


@pytest.fixture(autouse=True)
def only_local_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Skips the harness's 13,000 task files."""
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "none" / "manager.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    records = [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(3)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "broken.jsonl").write_text('{"question": \n')
    (folder / "functions.py").write_text(
        "def fails(doc):\n    raise KeyError('my field')\ndef half(doc):\n    return 'a \\ud83d'\n"
    )
    return folder


def run(folder: Path, text: str, tasks: tuple[str, ...] = ("t",), **settings: Any) -> Any:
    (folder / "t.yaml").write_text(text.replace("FOLDER", str(folder)))
    return harness.run(model(), tasks, step=1, include_path=folder, **settings)


def test_a_prompt_gets_the_requested_number_of_samples_at_every_batch_size() -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}

    def answers(batch_size: int) -> list[str]:
        request = Instance("generate_until", {}, ("2 + 2 =", settings), 0, ("t", 0, 16))
        other = Instance("generate_until", {}, ("a longer question", settings), 0, ("t", 1, 2))
        texts = model(batch_size).generate_until([request] * 16 + [other] * 2)
        assert texts[16] != texts[17]
        return texts[:16]

    sixteen = answers(4)
    assert len(set(sixteen)) == 16
    assert answers(16) == sixteen


def test_a_task_that_repeats_gets_a_sample_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def remember(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        written.extend(original(self, requests, disable_tqdm))
        return written

    original = harness.HarnessModel.generate_until
    monkeypatch.setattr(harness.HarnessModel, "generate_until", remember)
    kwargs = 'generation_kwargs: {until: [], max_gen_toks: 6, do_sample: true, temperature: "1.0"}'
    report = run(folder, TASK.replace(GENERATION, kwargs) + "repeats: 5\n", ("t", "t"))
    assert [row[:2] for row in report.rows()] == [("t", "exact_match")]
    assert len(set(written)) == 15


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "test_split: test",
            "test_split: tset",
            "'t': test_split='tset': the data has 'test'",
        ),
        ("test_split: test", "", "task 't': ValueError: .*must have valid or test docs"),
        ("{{question}}", "{{query}}", "task 't': UndefinedError: 'query' is undefined"),
        ("{{question}}", "{{query", "task 't': TemplateSyntaxError"),
        ('"{{question}}"', "!function functions.fails", "task 't': KeyError: 'my field'"),
        ('"{{question}}"', "!function functions.half", "'a .ud83d': character 2 is a lone surrog"),
        ('"{{question}}"', "!function functions.none", "has no function 'none'"),
        ("data.jsonl", "nothing.jsonl", "task 't': FileNotFoundError: .*nothing.jsonl"),
        ("data.jsonl", "broken.jsonl", "DatasetGenerationError: .*because of .*JSON parse error"),
        ("path: json", "path: some/data", "task 't': .*some/data"),
        ("dataset_path: json", "", "task 't': no dataset_path"),
        ("generate_until", "generate", "task 't': ValueError: .*invalid output_type 'generate'"),
        ("exact_match", "exact_mtch", "task 't': metric 'exact_mtch': unknown"),
        ("exact_match, aggregation: mean", "exact_mtch", r"unknown \(nearest: exact_match\)"),
        ("aggregation: mean", "aggregation: median_of", "'exact_match': unknown aggregation"),
        ("task: t", "task: t\nmisspelt: 1", "unexpected keyword argument 'misspelt'"),
        ("task: t", "task: [t", "no task 't'.*t.yaml: ParserError.*line"),
        ("task: t", "task: t\ninclude: nothing", "no task 't'.*No such file.*nothing"),
        ("task: t", "task: t\ninclude: t.yaml", "no task 't'.*Include cycle"),
        (TASK, "", "no task 't'.*t.yaml: ValueError: Expected YAML dict"),
        (TASK, "group: t\ntask: [absent]", "task 't::absent': no dataset_path"),
        (TASK, "group: t\ntask: [5]", "TypeError: Unsupported sub-entry 5"),
        (GENERATION, "generation_kwargs: {temperature: hot}", "'t': .*string to float: 'hot'"),
        (GENERATION, "generation_kwargs: 5", "'t': TypeError"),
        (
            "max_gen_toks: 4",
            "max_gen_toks: 4, top_k: -1, temperature: 1",
            "task 't': generation_kwargs.top_k=-1",
        ),
        ("max_gen_toks: 4", "until: 5, max_gen_toks: 4", "generation_kwargs.until=5: must be"),
        ("max_gen_toks: 4", "max_gen_toks: 64", "max_gen_toks=64: must be less than the 64"),
        ("task: t", "task: t\nunsafe_code: true", "marked as unsafe"),
        ("task: t", "task: t\nnum_fewshot: 9", "task 't': ValueError: Sample larger"),
        ("task: t", "task: t\nrepeats: many", "TypeError: can't multiply sequence"),
    ],
)
def test_an_error_in_a_task_is_one_line_that_names_it(
    folder: Path, old: str, new: str, message: str
) -> None:
    assert old in TASK
    with pytest.raises(UserError, match=message) as caught:
        run(folder, TASK.replace(old, new))
    assert "\n" not in str(caught.value)


def test_invalid_settings_are_rejected_before_any_task_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(harness.HarnessModel, "generate_until")
    (folder / "first.yaml").write_text(
        TASK.replace("FOLDER", str(folder)).replace("task: t", "task: first")
    )
    with pytest.raises(UserError, match=r"task 't': generation_kwargs\.num_beams=4"):
        run(
            folder, TASK.replace("max_gen_toks: 4", "max_gen_toks: 4, num_beams: 4"), ("first", "t")
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("tt",)}, r"--suite: no task 'tt' \(nearest: t\)"),
        ({"limit": 0}, "did not find any docs"),
        ({"limit": -1}, "ValueError"),
    ],
)
def test_an_invalid_argument_is_a_one_line_error(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, TASK, **settings)


@pytest.mark.parametrize("name", ["absent", "tasks/data.jsonl"])
def test_include_path_must_be_a_folder(folder: Path, name: str) -> None:
    path = folder.parent / name
    with pytest.raises(UserError, match=f"--include_path={path}: must be a folder"):
        harness.run(model(), ["t"], step=1, include_path=path)


@pytest.mark.parametrize(("owner", "name"), [(harness.decode, "encode"), (Generator, "complete")])
def test_our_own_bugs_keep_their_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(KeyError, match="a bug"):
        run(folder, TASK)


def test_a_whitespace_context_is_treated_as_empty() -> None:
    requests = [Instance("loglikelihood", {}, (context, "ab"), 0) for context in ("  ", "")]
    space, empty = model().loglikelihood(requests, disable_tqdm=True)
    assert space[0] < empty[0]  # it has two spaces more
