"""Evaluation and generation from the checkpoints of a run."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests import tiny_run
from tests.tiny_run import Run
from umv2 import modes
from umv2.config import ConfigError
from umv2.config.schema import UserError
from umv2.data import corpus, tasks


def test_evaluation_reproduces_the_held_out_loss_of_the_run(finished: Run) -> None:
    report = modes.evaluate(None, finished.workdir)
    last = json.loads((finished.workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert report.step == last["step"] == 12
    assert report.held_out.loss_nats_per_token == pytest.approx(last["held_out_loss"], rel=1e-6)
    assert report.held_out.bits_per_byte == pytest.approx(last["held_out_bits_per_byte"], rel=1e-6)
    saved = json.loads((finished.workdir / "evaluation.json").read_text())
    assert saved == report.metrics()
    assert (finished.workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_generates_no_long_context_documents(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("wrote documents of tasks")

    config = tiny_run.tiny_config(finished.paths)
    suite = dataclasses.replace(config.data.long_context, num_documents=4, tasks=("key_value",))
    data = dataclasses.replace(config.data, long_context=suite)
    monkeypatch.setattr(tasks, "mixture", refuse)
    with pytest.raises(AssertionError, match="wrote documents of tasks"):
        corpus.open_corpus(data, config.model.vocab_size)
    monkeypatch.setattr(modes, "_run_config", lambda *_: dataclasses.replace(config, data=data))
    assert modes.evaluate(None, finished.workdir).held_out.loss_nats_per_token > 0


def test_generation_continues_the_prompt_and_is_reproducible(finished: Run) -> None:
    first, again = ("".join(modes.generate(None, finished.workdir, "Doc")) for _ in range(2))
    assert first.startswith("Doc")
    assert len(first) > len("Doc")
    assert first == again


def test_a_model_other_than_that_of_the_run_is_rejected(finished: Run) -> None:
    other = tiny_run.tiny_config(finished.paths, model__ffn_size=32)
    for mode in (
        lambda: modes.evaluate(other, finished.workdir),
        lambda: list(modes.generate(other, finished.workdir, "Doc")),
    ):
        with pytest.raises(ConfigError, match=r"model\.ffn_size: 16 -> 32"):
            mode()


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        modes.evaluate(None, tmp_path)
