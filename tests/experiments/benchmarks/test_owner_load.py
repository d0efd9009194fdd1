"""The loads of owners, on selections whose loads are known."""

from pathlib import Path

import numpy as np
import pytest

from experiments import measurements
from experiments.benchmarks import owner_load
from umv2.model.memory import exchange

RESULTS = Path(__file__).parents[3] / "experiments" / "results"


def test_rows_are_drawn_without_replacement_by_their_probabilities() -> None:
    rows = owner_load.draw(np.array([8.0, 4.0, 2.0, 1.0, 1.0]), 500, 3)
    assert all(len(set(token)) == 3 for token in rows)
    hits = np.bincount(rows.reshape(-1), minlength=5)
    assert hits.sum() == 1500
    assert list(np.argsort(-hits)[:3]) == [0, 1, 2]
    # P(first row is among three) = 0.947 by enumeration.
    assert hits[0] / 500 == pytest.approx(0.947, abs=0.03)


def test_load_and_rounds_of_known_selections() -> None:
    # Each of 4 owners has 4 of 16 rows, and gets 2 of every token's 8 selections.
    even = np.tile(np.array([0, 1, 4, 5, 8, 9, 12, 13]), (64, 1))
    assert owner_load.group_load(even, 16, 4) == (1.0, 1)
    # All selections are of one owner's rows.
    sizes = exchange.groups(64, 8, 1, 4)
    load, rounds = owner_load.group_load(even % 4, 16, 4)
    assert load == 4.0
    assert rounds == 1 + -(-(64 * -(-8 // sizes.size) - sizes.capacity) // sizes.later) > 1


def test_effective_rows() -> None:
    assert owner_load.effective_rows(np.array([3, 3, 0, 0])) == 0.5
    assert owner_load.effective_rows(np.array([5, 0, 0, 0])) == 0.25


def test_the_page_shows_the_stored_results() -> None:
    records = measurements.read(RESULTS / "owner_load.jsonl")
    assert owner_load.table(records) in (RESULTS / "README.md").read_text()
    # The capacity is chosen for these: one round, or a second of an eighth of its size.
    assert max(record.get("rounds", 1) for record in records) == 2
