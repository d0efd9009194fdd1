"""Multi-hop documents: every answer follows from the facts, and from nothing else."""

import itertools
from pathlib import Path

import pytest

from configs import base
from experiments.ablations import corpora, scales
from experiments.ablations.catalogue import configuration
from tests import tiny_run
from umv2.config import from_config_dict
from umv2.training.train import train


def facts_and_questions(text: str) -> tuple[dict[str, str], list[tuple[str, int, str]]]:
    facts, _, asked = text.partition("; ")
    return (
        {fact[0]: fact[1] for fact in facts.split()},
        [(question[0], int(question[1]), question[2]) for question in asked.split()],
    )


def test_answers_follow_from_the_facts() -> None:
    for text in corpora.multi_hop_documents(200):
        places, asked = facts_and_questions(text)
        assert len(asked) == 8
        for start, hops, answer in asked:
            place = start
            for _ in range(hops):
                place = places[place]
            assert place == answer


def test_answers_do_not_follow_from_the_question() -> None:
    """The same question has different answers in different documents."""
    answers: dict[tuple[str, int], set[str]] = {}
    for text in corpora.multi_hop_documents(2000):
        for start, hops, answer in facts_and_questions(text)[1]:
            answers.setdefault((start, hops), set()).add(answer)
    assert len(answers) == 26 * 4
    assert all(len(places) > 10 for places in answers.values())


def test_the_order_of_the_facts_is_uninformative() -> None:
    """The next fact of a chain comes before a fact as often as after it."""
    before = total = 0
    for text in corpora.multi_hop_documents(500):
        order = text.partition(";")[0].split()
        for (i, first), (j, second) in itertools.permutations(enumerate(order), 2):
            if first[1] == second[0]:
                before += j < i
                total += 1
    assert 0.45 < before / total < 0.55


def test_documents_depend_only_on_the_seed() -> None:
    assert list(corpora.multi_hop_documents(5)) == list(corpora.multi_hop_documents(5))
    assert list(corpora.multi_hop_documents(5)) != list(corpora.multi_hop_documents(5, seed=1))


def test_questions_are_located_at_their_answers() -> None:
    assert list(corpora.questions("ab bc; a2c b1c")) == [(9, 2), (13, 1)]


def test_missing_files_of_a_configuration_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, tokenizer = str(tmp_path / "a" / "hops.jsonl"), str(tmp_path / "b" / "x_bpe_280.json")
    monkeypatch.setattr(scales, "MULTI_HOP_TEXT", text)
    monkeypatch.setattr(scales, "CORPORA", str(tmp_path / "b"))
    monkeypatch.setattr(corpora, "_NUM_DOCUMENTS", 50)
    config = base.get_config()
    config.data.source = "text"
    config.data.paths = (text,)
    config.data.tokenizer = tokenizer
    config.model.vocab_size = 280
    corpora.prepare(config)
    assert len(Path(text).read_text().splitlines()) == 50
    assert Path(tokenizer).exists()
    before = Path(text).stat().st_mtime_ns
    corpora.prepare(config)
    assert Path(text).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("corpus", "source", "paths"),
    [
        ("site_packages", "site_packages", ()),
        ("a/*.txt,b/*.txt", "text", ("a/*.txt", "b/*.txt")),
    ],
)
def test_an_arm_can_use_another_corpus(corpus: str, source: str, paths: tuple[str, ...]) -> None:
    config = base.get_config()
    name = corpora.use(config, corpus, 1001)
    assert (config.data.source, config.data.paths) == (source, paths)
    assert config.data.tokenizer == f"{scales.CORPORA}/{name}.json"
    assert name.endswith("_bpe_1001")
    assert config.model.vocab_size == 1008
    asking = configuration("multi_hop", "dense", "cpu")
    before = asking.to_json()
    corpora.use(asking, corpus, 1001)
    assert asking.to_json() == before


@pytest.mark.slow
def test_a_model_is_asked_every_held_out_question(tmp_path: Path) -> None:
    path = tmp_path / "text" / "hops.txt"
    path.parent.mkdir()
    # One file per document: the split depends only on the text.
    documents = list(corpora.multi_hop_documents(40))
    for index, text in enumerate(documents):
        path.with_name(f"{index}.txt").write_text(text)
    config = tiny_run.tiny_config(f"{path.parent}/*.txt", data__sequence_length=128)
    with tiny_run.quick_compilation(tmp_path / "compiled"):
        train(config, tmp_path / "run")
        answers = corpora.answers(tmp_path / "run")
    held_out = corpora.fingerprint(config)["held_out_bytes"] / len(documents[0])
    assert answers["num_questions"] == 8 * held_out
    assert set(answers["by_hops"]) <= {"1", "2", "3", "4"}
    assert 0 <= answers["accuracy"] < 0.5  # after 12 steps it guesses
    assert from_config_dict(base.get_config()).data.source != config.data.source
