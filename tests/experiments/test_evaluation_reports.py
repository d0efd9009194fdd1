"""The reports of the long-context campaign and of decode latency, from made-up measurements."""

import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from experiments import latency_report, long_context
from umv2.schema import UserError


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def write_answers(path: Path, accuracy: float) -> None:
    answers = [
        {
            "task": task,
            "length": length,
            "depth": i / 10,
            "exact": i < accuracy * 10,
            "chance": 0.25,
            "log_likelihood": -1.5,
            "num_tokens": 2,
        }
        for task in ("needle", "key_value")
        for length in (512, 256)
        for i in range(10)
    ]
    records: list[dict[str, Any]] = [{"step": 1}, *answers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = long_context.summary(path)
    cells = [json.loads(line) for line in text.splitlines()[1:]]
    assert len(cells) == 2 * 2 * 5
    assert {(cell["answers"], cell["log_likelihood"]) for cell in cells} == {(2, -3.0)}
    path.write_text(text)


def test_a_campaign_is_reported_as_mean_and_range_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    for seed, accuracy in enumerate((0.2, 0.4)):
        write_answers(tmp_path / f"moe_{seed}.jsonl", accuracy)
    long_context.report()
    text = (tmp_path / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| needle", "| key_value"))]
    assert rows[0] == "| needle | 256 | 25.0 | 30.0 (20.0 to 40.0) |"
    assert [row.split("|")[2].strip() for row in rows] == ["256", "512"] * 2
    assert "| moe | 2 |" in text
    assert "![moe](moe.png)" in text
    images = [(tmp_path / name).read_bytes() for name in ("accuracy.png", "moe.png")]
    long_context.report()
    assert images == [(tmp_path / name).read_bytes() for name in ("accuracy.png", "moe.png")]


def test_runs_of_a_family_are_not_those_of_one_whose_name_begins_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    for name in ("moe_10", "moe_2", "moe_2_of_16_0", "moe_x", "dense_0"):
        (tmp_path / f"{name}.jsonl").touch()
    assert list(long_context._stored("moe")) == [2, 10]
    assert list(long_context._stored("moe_2_of_16")) == [0]
    assert not long_context._stored("pkm")


def test_a_campaign_without_a_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="no run of ultramem_v2, moe, dense is stored there"):
        long_context.report()
    assert not list(tmp_path.iterdir())


def test_a_likelihood_that_is_not_finite_is_null_in_a_sum() -> None:
    assert long_context._sum([1.0, None]) is None
    assert long_context._sum([1.0, -2.0, 0.0]) == -1.0


def record(family: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "decode",
        "size": "227m_1b2",
        "family": family,
        "batch": 8,
        "context": 256,
        "seconds": seconds,
        "traffic_bytes": 4e9,
        "read_bytes_per_second": [8e9],
        "memory": {"needed": 1e9},
    } | changes


def test_ratios_of_a_step_are_taken_round_by_round() -> None:
    # A machine that became slower in the last rounds, for both.
    reference = record("ultramem_v2", [1.0, 1.0, 4.0, 4.0])
    other = record("moe", [2.0, 2.0, 8.0, 8.0], traffic_bytes=6e9)
    assert latency_report.ratio(other, reference) == (2.0, 2.0, 2.0)
    cells = latency_report.decode_cells([reference, other, record("moe", [9.0])])
    rows = latency_report.table(cells["227m_1b2", 256])[2:]
    assert rows[1].split(" | ")[2:4] == ["2.00 (2.00 to 2.00)", "1.50"]
    # 4 GB in 2.5 s where a pass over memory brings 8 GB a second.
    assert rows[0].split(" | ")[4:] == ["2500.0", "3", "1.6", "20 % |"]
