"""Which cases the command of docs/plans.md plans, and what it stores."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import measurements
from experiments.benchmarks import plans
from umv2.config.schema import UserError
from umv2.planning import ahead_of_time

CASES = tuple(plans.Case("tiny", machine) for machine in ("v5e:2x2", "h200:8", "v6e:2x2"))
NAMES = [case.name for case in CASES]


class Runs:
    """Takes the place of `plans.run`; `fail` may raise an error for a case, or wait."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fail: Callable[[str], None] = lambda _: None

    def __call__(self, case: plans.Case) -> list[dict[str, Any]]:
        self.names.append(case.name)
        self.fail(case.name)
        about = {"case": case.name, "identity": plans.identity(case)}
        return [about | {"error": "first"}, about | {"error": "second"}]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """No stored plans, three cases that are planned one at a time."""
    runs = Runs()
    monkeypatch.setattr(plans, "run", runs)
    monkeypatch.setattr(plans, "cases", lambda: iter(CASES))
    monkeypatch.setattr(plans, "RESULTS", tmp_path / "plans.jsonl")
    monkeypatch.setattr(plans, "DOCUMENT", tmp_path / "plans.md")
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        flags.FLAGS["workers"].value = 1
        yield runs


def stored() -> list[str]:
    return [record["case"] for record in measurements.read(plans.RESULTS)]


def test_every_case_is_planned_once_and_its_programs_stored(runs: Runs) -> None:
    plans.main([])
    assert runs.names == NAMES
    assert stored() == [name for name in NAMES for _ in range(2)]
    assert plans.DOCUMENT.read_text().startswith("# Plans")
    plans.main([])
    assert runs.names == NAMES


def test_a_run_that_was_interrupted_continues_where_it_stopped(runs: Runs) -> None:
    def fail(name: str) -> None:
        if name == NAMES[1]:
            raise KeyboardInterrupt

    runs.fail = fail
    with pytest.raises(KeyboardInterrupt):
        plans.main([])
    assert runs.names[:2] == NAMES[:2]
    assert set(stored()) == {NAMES[0]}
    runs.names, runs.fail = [], lambda _: None
    plans.main([])
    assert runs.names == NAMES[1:]
    assert set(stored()) == set(NAMES)


def test_cases_that_have_changed_are_planned_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [{"case": NAMES[1], "error": "old"}, {"case": "a case that no longer exists"}]
    measurements.append(plans.RESULTS, [*old, *Runs()(CASES[0])])
    plans.main([])
    assert runs.names == NAMES[1:]
    assert stored() == [name for name in NAMES for _ in range(2)]
    assert "old" not in plans.RESULTS.read_text()
    runs.names = []
    monkeypatch.setattr(plans, "_REVISION", plans._REVISION + 1)
    plans.main([])
    assert runs.names == NAMES
    assert len(stored()) == 6


def test_the_identity_is_that_of_the_configuration() -> None:
    case = CASES[0]
    fields = plans.Case(case.model, case.machine, (("train.batch_size", 16),))
    assert plans.identity(case) == plans.identity(CASES[1])  # their names differ
    assert plans.identity(case) != plans.identity(fields)


def test_cases_are_planned_side_by_side(runs: Runs) -> None:
    together = threading.Barrier(3, timeout=30)

    def wait(_: str) -> None:
        together.wait()

    runs.fail = wait
    flags.FLAGS["workers"].value = 3
    plans.main([])
    assert set(stored()) == set(NAMES)


@pytest.mark.parametrize("always", [False, True])
def test_a_case_that_was_killed_is_planned_again_after_the_others(always: bool, runs: Runs) -> None:
    def fail(name: str) -> None:
        if name == NAMES[0] and (always or len(runs.names) == 1):
            raise ahead_of_time.Killed("killed")

    runs.fail = fail
    plans.main([])
    assert runs.names == [*NAMES, NAMES[0]]
    # It is not stored as an error, so that another run tries again.
    assert set(stored()) == set(NAMES[1:] if always else NAMES)


@flagsaver.flagsaver
def test_a_model_that_cannot_fit_is_stored_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from umv2.planning import search, topology

    pytest.importorskip("libtpu", reason="a topology is parsed only if its compiler is installed")
    flags.FLAGS.mark_as_parsed()
    found = search.Search(plans=(), num_candidates=0, least_bytes=2**40)
    monkeypatch.setattr(search, "search", lambda *_, **__: found)
    (record,) = plans.run(CASES[0])
    capacity = topology.parse("v5e:2x2").chip.memory_bytes
    assert (record["case"], record["least_bytes"]) == (NAMES[0], 2**40)
    assert record["capacity"] == capacity
    row = plans._table([("tiny", [record])])
    assert "at least 1,024.0 of 15.8" in row
    assert "cannot fit" in row

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("the reason")

    monkeypatch.setattr(search, "search", fail)
    (record,) = plans.run(CASES[0])
    assert record["error"] == "the reason"
